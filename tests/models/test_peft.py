"""Adapters that PEFT wrote: part of a model, or chosen by requests, with the values that PEFT gives them itself."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from cenote import LLM, LoRARequest
from cenote.errors import BadRequest, CheckpointError
from cenote.models import lora, lora_changes
from cenote.models.audit import Audit
from tests import checkpoints
from tests.checkpoints import edit_json, read_json

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT reads it
    "ignore:.*fan_in_fan_out is set to False:UserWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning",
    r"ignore:Adapter 'default'. \d+ LoRA tensor.s. have invalid shape:UserWarning",  # a bias has one dimension
)
TEXTS = checkpoints.SHORT[:4]
ATTENTION = ["query", "value"]


def trained(model: Any, folder: Path, *, seed: int = 5, base: Path | None = None, **settings: Any) -> Any:
    """Give `model` an adapter with weights from `seed`, write it into `folder`, and return the whole."""
    torch.manual_seed(seed)
    whole = peft.get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "bias": "none", **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.1 * float(parameter.abs().mean()) if "magnitude" in name else 0.4))
    whole.peft_config["default"].base_model_name_or_path = str(base or "")
    whole.save_pretrained(folder, save_embedding_layers=False)
    return whole.eval()


def bert(folder: Path, **options: Any) -> Path:
    return checkpoints.bert(folder, **options)


def states(model: Any, folder: Path, pool: Callable[[Any], Any] = lambda x: x[0]) -> np.ndarray:
    """The normalised vector of each text, one at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    with torch.inference_mode():
        for text in TEXTS:
            rows.append(pool(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def embedded(llm: LLM, **options: Any) -> np.ndarray:
    return np.array([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False, **options)])


def vectors(folder: Path, **options: Any) -> np.ndarray:
    with LLM(str(folder), **options) as llm:
        return embedded(llm)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ATTENTION},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "ranks": {"target_modules": ATTENTION, "rank_pattern": {"query": 2}, "alpha_pattern": {r"layer\.1\..*value": 3}},
    "anchored": {"target_modules": ATTENTION, "rank_pattern": {r"^encoder\.layer\.0\.attention\.self\.query": 2}},
    "expression": {"target_modules": r".*\.(key|dense)"},
    "all linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layer"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": 0},
    "without some": {"target_modules": [*ATTENTION, "dense"], "exclude_modules": ["intermediate.dense"]},
    "embeddings": {"target_modules": [*ATTENTION, "word_embeddings", "token_type_embeddings"]},
    "dora": {"target_modules": [*ATTENTION, "dense"], "use_dora": True},
    "dora of embeddings": {"target_modules": ["query", "word_embeddings"], "use_dora": True, "use_rslora": True},
    "biases of its own": {"target_modules": ATTENTION, "lora_bias": True},
    "all biases": {"target_modules": ATTENTION, "bias": "all"},
    "biases of its layers": {"target_modules": ATTENTION, "bias": "lora_only"},
    "dora with biases": {"target_modules": ATTENTION, "use_dora": True, "bias": "all"},
    "whole modules": {"target_modules": ATTENTION, "modules_to_save": ["output.dense", "position_embeddings"]},
    "orthogonal": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the adapters of `KINDS` are for."""
    return bert(tmp_path_factory.mktemp("peft") / "base")


@pytest.fixture(scope="module")
def alone(base: Path) -> np.ndarray:
    """Its vectors without any."""
    return vectors(base)


@pytest.fixture(scope="module")
def other(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Another adapter of it, and the vectors of both together by PEFT."""
    folder = tmp_path_factory.mktemp("peft") / "other"
    return folder, states(
        trained(transformers.AutoModel.from_pretrained(base), folder, seed=9, target_modules=["key"]), base
    )


@pytest.fixture(scope="module", params=list(KINDS))
def adapted(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, np.ndarray]:
    """The base, an adapter of it, and the vectors of both together by PEFT."""
    adapter = tmp_path_factory.mktemp("peft") / "adapter"
    whole = trained(transformers.AutoModel.from_pretrained(base), adapter, **KINDS[request.param])
    return base, adapter, states(whole, base)


def test_beside_the_weights(adapted: tuple[Path, Path, np.ndarray], alone: np.ndarray, tmp_path: Path) -> None:
    """It is part of the model: as Transformers with PEFT has it, and far from the base alone."""
    base, adapter, expected = adapted
    folder = tmp_path / "beside"
    shutil.copytree(base, folder)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    if not read_json(adapter / "adapter_config.json")["use_dora"]:  # Transformers 5 does not read DoRA's magnitudes
        by_transformers = states(transformers.AutoModel.from_pretrained(folder).eval(), folder)
        assert np.abs(by_transformers - expected).max() < 1e-5
    found = vectors(folder)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - alone).max() > 0.02


@pytest.mark.parametrize("adapted", KINDS, indirect=True)
def test_chosen_by_requests(
    adapted: tuple[Path, Path, np.ndarray], alone: np.ndarray, other: tuple[Path, np.ndarray]
) -> None:
    """Beside another adapter and none in one batch."""
    base, adapter, expected = adapted
    path, with_other = other
    with LLM(str(base), lora_modules=[f"one={adapter}", f"two={path}"]) as llm:
        one, two = LoRARequest("one", 1, str(adapter)), LoRARequest("two", 2, str(path))
        assert np.abs(embedded(llm, lora_request=one) - expected).max() < 1e-5
        assert np.abs(embedded(llm) - alone).max() < checkpoints.ROUNDING
        mixed = embedded(llm, lora_request=[one, None, two, one])
    for row, (vector, of_choice) in enumerate(zip(mixed, (expected, alone, with_other, expected), strict=True)):
        assert np.abs(vector - of_choice[row]).max() < 1e-5, row


@pytest.mark.parametrize("adapted", KINDS, indirect=True)
def test_added_later(adapted: tuple[Path, Path, np.ndarray]) -> None:
    """A `LoRARequest` brings an adapter that the model was not loaded with."""
    base, adapter, expected = adapted
    with LLM(str(base), enable_lora=True) as llm:
        alone = embedded(llm)
        if read_json(adapter / "adapter_config.json")["use_dora"]:
            with pytest.raises(CheckpointError, match=r"needs the weight of .*name it at load \(lora_modules\)"):
                embedded(llm, lora_request=LoRARequest("one", 1, str(adapter)))
            return
        assert np.abs(embedded(llm, lora_request=LoRARequest("one", 1, str(adapter))) - expected).max() < 1e-5
        assert np.array_equal(embedded(llm), alone)
        with pytest.raises(BadRequest, match="the adapter 'one' is that of .*adapter; elsewhere needs another name"):
            llm.embed(TEXTS, lora_request=LoRARequest("one", 1, "elsewhere"), use_tqdm=False)


@pytest.mark.parametrize("targets", [ATTENTION, "all-linear"], ids=str)
def test_added_beside_one_named_at_load(
    base: Path, alone: np.ndarray, other: tuple[Path, np.ndarray], tmp_path: Path, targets: Any
) -> None:
    """Room for further adapters is as with `enable_lora` alone, and the one that is there stays what it is."""
    path, with_other = other
    whole = trained(transformers.AutoModel.from_pretrained(base), tmp_path / "late", target_modules=targets)
    late = LoRARequest("late", 2, str(tmp_path / "late"))
    with LLM(str(base), enable_lora=True, lora_modules=[f"other={path}"]) as llm:
        assert np.abs(embedded(llm, lora_request=late) - states(whole, base)).max() < 1e-5
        assert np.abs(embedded(llm, lora_request=LoRARequest("other", 1, str(path))) - with_other).max() < 1e-5
        assert np.abs(embedded(llm) - alone).max() < checkpoints.ROUNDING


def test_adapters_named_at_load_leave_no_room_for_others(
    base: Path, other: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    """Fused layers run past a hook that comes later."""
    path, with_other = other
    trained(transformers.AutoModel.from_pretrained(base), tmp_path / "late", target_modules="all-linear")
    with LLM(str(base), lora_modules=[f"other={path}"]) as llm:
        with pytest.raises(BadRequest, match="load it with enable_lora, or name the adapter in lora_modules"):
            embedded(llm, lora_request=LoRARequest("late", 2, str(tmp_path / "late")))
        assert np.abs(embedded(llm, lora_request=LoRARequest("other", 1, str(path))) - with_other).max() < 1e-5


def test_without_room_for_adapters(tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    trained(transformers.AutoModel.from_pretrained(base), tmp_path / "adapter", target_modules=ATTENTION)
    with LLM(str(base)) as llm:
        request = LoRARequest("one", 1, str(tmp_path / "adapter"))
        with pytest.raises(BadRequest, match="loaded without enable_lora"):
            llm.embed(TEXTS, lora_request=request, use_tqdm=False)
        with pytest.raises(BadRequest, match=r"lengths of prompts \(4\) and lora_request \(1\)"):
            llm.embed(TEXTS, lora_request=[request], use_tqdm=False)
        with pytest.raises(BadRequest, match="a LoRARequest needs a name and a path"):
            LoRARequest("one", 1)
        with pytest.raises(BadRequest, match="id must be > 0, got 0"):
            LoRARequest("one", 0, "x")


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether PEFT is installed makes no difference: nothing is applied twice, and nothing is left out."""
    base = bert(tmp_path / "base")
    trained(transformers.AutoModel.from_pretrained(base), tmp_path / "adapter", target_modules=ATTENTION)
    shutil.copytree(tmp_path / "adapter", base, dirs_exist_ok=True)
    with_peft = vectors(base)
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: False)
    pure = transformers.AutoModel.from_pretrained(base).eval()
    assert np.abs(states(pure, base) - with_peft).max() > 0.02
    assert np.array_equal(vectors(base), with_peft)


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2's layers keep their matrices the other way around."""
    base = checkpoints.classifier(
        tmp_path / "gpt2", "GPT2", "Model", tokenizer=checkpoints.byte_level(), n_embd=32, n_layer=2, n_head=4
    )
    for kind in ({}, {"use_dora": True}, {"bias": "all"}):
        adapter = tmp_path / "-".join(["adapter", *kind])
        settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, **kind}
        whole = trained(transformers.AutoModel.from_pretrained(base), adapter, **settings)
        expected = states(whole, base, lambda x: x[-1])
        folder = tmp_path / f"beside {adapter.name}"
        shutil.copytree(base, folder)
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        assert np.abs(vectors(folder) - expected).max() < 1e-5, kind
        with LLM(str(base), lora_modules=[f"one={adapter}"]) as llm:
            assert np.abs(embedded(llm, lora_request=LoRARequest("one", 1, str(adapter))) - expected).max() < 1e-5, kind


# --- folders without weights -----------------------------------------------------------------------------------------


def sentence_transformer(folder: Path, backbone: str = "") -> Path:
    bert(folder / backbone)
    return checkpoints.write_modules(
        folder,
        checkpoints.pooling("mean"),
        checkpoints.NORMALIZE,
        backbone=backbone,
        transformer={"max_seq_length": 48, "do_lower_case": False},
        settings={"prompts": {"query": "query: "}, "default_prompt_name": None},
    )


def add_adapter(base: Path, folder: Path) -> np.ndarray:
    """Write what sentence-transformers saves of a model with an adapter; returns its vectors."""
    model = SentenceTransformer(str(base), device="cpu")
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    expected: np.ndarray = model.encode(TEXTS, batch_size=1)
    model.save_pretrained(str(folder), create_model_card=False)
    return expected


@pytest.mark.parametrize("backbone", ["", "0_Transformer"])
def test_sentence_transformers_folder(tmp_path: Path, backbone: str) -> None:
    base, folder = sentence_transformer(tmp_path / "base", backbone), tmp_path / "adapted"
    expected = add_adapter(base, folder)
    (file,) = folder.rglob("adapter_config.json")
    assert not [*folder.rglob("config.json")][1:] or not (file.parent / "config.json").exists()
    edit_json(file, base_model_name_or_path=str(base / backbone))
    found = vectors(folder)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - SentenceTransformer(str(folder), device="cpu").encode(TEXTS, batch_size=1)).max() < 1e-5
    assert np.abs(found - vectors(base)).max() > 0.02


def test_in_the_folder_of_the_backbone(tmp_path: Path) -> None:
    base = sentence_transformer(tmp_path / "base", "0_Transformer")
    backbone = base / "0_Transformer"
    whole = trained(transformers.AutoModel.from_pretrained(backbone), backbone, target_modules=ATTENTION)
    expected = states(whole, backbone, lambda x: x.mean(0))
    assert np.abs(vectors(base) - expected).max() < 1e-5


@pytest.mark.parametrize("name", [".", "../base"])
def test_in_the_working_directory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bert(tmp_path / "base")
    whole = trained(transformers.AutoModel.from_pretrained(base), tmp_path / "adapter", target_modules=ATTENTION)
    shutil.copytree(tmp_path / "adapter", base, dirs_exist_ok=True)
    monkeypatch.chdir(base)
    assert np.abs(vectors(Path(name)) - states(whole, base)).max() < 1e-5


def test_not_beside_the_backbone(tmp_path: Path) -> None:
    """Sentence-transformers does not look there."""
    base = sentence_transformer(tmp_path / "base", "0_Transformer")
    alone = vectors(base)
    trained(transformers.AutoModel.from_pretrained(base / "0_Transformer"), base, target_modules=ATTENTION)
    with pytest.raises(CheckpointError, match=r"adapter_config.json has the file .*the backbone is in 0_Transformer"):
        LLM(str(base))
    assert np.array_equal(vectors(base, allow_unread="adapter_config.json"), alone)


def test_base_of_sentence_transformers(tmp_path: Path) -> None:
    """An adapter without files of its own pools as its base does, with its prompts."""
    base, folder = sentence_transformer(tmp_path / "base"), tmp_path / "adapter"
    model = transformers.AutoModel.from_pretrained(base)
    expected = states(trained(model, folder, base=base, target_modules=ATTENTION), base, lambda x: x.mean(0))
    with LLM(str(folder)) as llm:
        assert np.abs(embedded(llm) - expected).max() < 1e-5
        assert llm._service.renderer.prompts.named == {"query": "query: "}


def test_base_whose_modules_are_numbered_otherwise(tmp_path: Path) -> None:
    """The order of modules.json counts, and not its numbers."""
    base, folder = sentence_transformer(tmp_path / "base", "0_Transformer"), tmp_path / "adapter"
    listed = read_json(base / "modules.json")
    checkpoints.write_json(base / "modules.json", [{**entry, "idx": 9 - entry["idx"]} for entry in listed])
    model = transformers.AutoModel.from_pretrained(base / "0_Transformer")
    whole = trained(model, folder, base=base, target_modules=ATTENTION)
    expected = states(whole, base / "0_Transformer", lambda x: x.mean(0))
    assert np.abs(vectors(folder) - expected).max() < 1e-5


def test_tokenizer_of_the_adapter(tmp_path: Path) -> None:
    base, folder = bert(tmp_path / "base"), tmp_path / "adapter"
    whole = trained(transformers.AutoModel.from_pretrained(base), folder, base=base, target_modules=ATTENTION)
    assert np.abs(vectors(folder) - states(whole, base)).max() < 1e-5
    checkpoints.wordpiece(lowercase=True).save_pretrained(folder)
    expected = states(whole, folder)
    assert np.abs(expected - states(whole, base)).max() > 0.02
    assert np.abs(vectors(folder) - expected).max() < 1e-5


def test_adapter_of_an_adapter(tmp_path: Path) -> None:
    """As LLM2Vec's: an adapter with a config, and a second one on top of the two."""
    base, first, second = (tmp_path / name for name in ("base", "mntp", "supervised"))
    checkpoints.decoder(base, "Qwen3Model")
    model = trained(transformers.AutoModel.from_pretrained(base), first, base=base, target_modules=["q_proj"])
    transformers.AutoConfig.from_pretrained(base).save_pretrained(first)
    expected = states(model, base, lambda x: x[-1])
    assert np.abs(vectors(first) - expected).max() < 1e-5
    merged = model.merge_and_unload()
    whole = trained(merged, second, seed=8, base=first, target_modules=["v_proj", "up_proj"])
    both = states(whole, base, lambda x: x[-1])
    assert np.abs(both - expected).max() > 0.02
    assert np.abs(vectors(second) - both).max() < 1e-5


def test_code_of_an_adapter(tmp_path: Path) -> None:
    """LLM2Vec's folders hold the class of the model, too, and the base's have none."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    checkpoints.decoder(base, "Qwen3Model")
    whole = trained(transformers.AutoModel.from_pretrained(base), folder, base=base, target_modules=["q_proj"])
    transformers.AutoConfig.from_pretrained(base).save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE)
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_own.OwnModel"}, architectures=["OwnModel"])
    expected = states(whole, base, lambda x: -x[-1])
    assert np.abs(vectors(folder, trust_remote_code=True) - expected).max() < 1e-5


CODE = """
from transformers import Qwen3Model


class OwnModel(Qwen3Model):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = -output.last_hidden_state
        return output
"""


def test_revision_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tmp_path / "models--someone--base" / "snapshots"
    entry.mkdir(parents=True)
    base, folder = bert(entry / "base"), tmp_path / "adapter"
    whole = trained(
        transformers.AutoModel.from_pretrained(base), folder, base=Path("someone/base"), target_modules=ATTENTION
    )
    edit_json(folder / "adapter_config.json", revision="v2")
    asked = []

    def snapshot(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert np.abs(vectors(folder, revision="main") - states(whole, base)).max() < 1e-5
    assert asked == [("someone/base", "v2")]


def test_refused_bases(tmp_path: Path) -> None:
    base, folder = bert(tmp_path / "base"), tmp_path / "adapter"
    trained(transformers.AutoModel.from_pretrained(base), folder, target_modules=ATTENTION)
    with pytest.raises(
        CheckpointError, match="adapter 'adapter' lies in a folder without weights, and its .* names no"
    ):
        LLM(str(folder))
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/nowhere/base")
    with pytest.raises(CheckpointError, match=r"is not there: there is no folder '/nowhere/base'.*--lora-modules"):
        LLM(str(folder))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    with pytest.raises(CheckpointError, match="which is an adapter of it"):
        LLM(str(folder))


def test_adapters_in_subfolders_of_an_adapted_model(tmp_path: Path) -> None:
    """They were trained on the base alone."""
    base = bert(tmp_path / "base")
    pure = transformers.AutoModel.from_pretrained(base)
    trained(transformers.AutoModel.from_pretrained(base), base, target_modules=ATTENTION)
    expected = vectors(base)
    trained(pure, base / "topic", target_modules=["key"])
    with pytest.raises(CheckpointError, match=r"topic/ has the file adapter_config.json, .*with another adapter"):
        LLM(str(base))
    assert np.array_equal(vectors(base, allow_unread="topic"), expected)


def test_pickled(tmp_path: Path) -> None:
    """Adapters of older releases of PEFT are pickles, which are read without running code in them."""
    base, folder = bert(tmp_path / "base"), tmp_path / "adapter"
    whole = trained(transformers.AutoModel.from_pretrained(base), folder, base=base, target_modules=ATTENTION)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert np.abs(vectors(folder) - states(whole, base)).max() < 1e-5


# --- heads -----------------------------------------------------------------------------------------------------------


def logits_of(model: Any, folder: Path) -> list[np.ndarray]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in TEXTS]


def classified(llm: LLM, **options: Any) -> list[np.ndarray]:
    outputs = llm.encode(TEXTS, pooling_task="classify", use_tqdm=False, **options)
    return [output.outputs.data.numpy() for output in outputs]


def same(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 2e-5) -> bool:
    return all(np.abs(a - b).max() < tolerance for a, b in zip(found, expected, strict=True))


RAW = {"pooler_config": {"use_activation": False}}


@pytest.mark.parametrize("labels", [1, 3])
def test_head_of_a_language_model(tmp_path: Path, labels: int) -> None:
    """The adapter brings the head, and its labels, that the base has not."""
    base, folder = checkpoints.decoder(tmp_path / "base"), tmp_path / "adapter"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    whole = trained(model, folder, base=base, task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"])
    with LLM(str(folder), **RAW) as llm:
        assert llm.info.architecture == "Qwen3ForSequenceClassification"
        assert llm.info.num_labels == labels
        assert same(classified(llm), logits_of(whole, base))
    shutil.copytree(folder, base, dirs_exist_ok=True)
    with LLM(str(base), **RAW) as llm:
        assert same(classified(llm), logits_of(whole, base))
    with LLM(str(base), convert="embed") as llm:
        assert "classify" not in llm.info.tasks
        reasons = {name: entry.reason for entry in llm.info.report.left for name in entry.names}
        assert "has no such module" in reasons["score.weight"]


def test_head_with_other_labels_than_the_base(tmp_path: Path) -> None:
    base, folder = checkpoints.classifier(tmp_path / "base", num_labels=2), tmp_path / "adapter"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=4, ignore_mismatched_sizes=True
    )
    whole = trained(model, folder, base=base, task_type="SEQ_CLS", target_modules=[*ATTENTION, "dense"])
    with LLM(str(folder), **RAW) as llm:
        assert llm.info.num_labels == 4
        assert same(classified(llm), logits_of(whole, base))
    with pytest.raises(CheckpointError, match="adapter 'one' changes bert.pooler.dense, of which the head runs a copy"):
        LLM(str(base), lora_modules=[f"one={folder}"])


def test_tokens(tmp_path: Path) -> None:
    base, folder = bert(tmp_path / "base"), tmp_path / "adapter"
    model = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    whole = trained(model, folder, base=base, task_type="TOKEN_CLS", target_modules=ATTENTION)
    with LLM(str(folder), **RAW) as llm:
        outputs = llm.encode(TEXTS, pooling_task="token_classify", use_tqdm=False)
        assert same([output.outputs.data.numpy() for output in outputs], logits_of(whole, base))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Qwen3"])
def test_heads_chosen_by_requests(tmp_path: Path, family: str) -> None:
    """Each adapter runs with its own head."""
    tokenizer = {"Bert": checkpoints.wordpiece, "Roberta": checkpoints.sentinels, "Qwen3": checkpoints.byte_level}
    base = checkpoints.classifier(tmp_path / "base", family, num_labels=3, tokenizer=tokenizer[family]())
    targets = ["q_proj", "v_proj"] if family == "Qwen3" else ATTENTION
    expected: dict[str | None, list[np.ndarray]] = {}
    for seed, name in enumerate(("one", "two")):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        whole = trained(model, tmp_path / name, seed=seed, task_type="SEQ_CLS", target_modules=targets)
        expected[name] = logits_of(whole, base)
    expected[None] = logits_of(transformers.AutoModelForSequenceClassification.from_pretrained(base).eval(), base)
    requests = {name: LoRARequest(name, 1, str(tmp_path / name)) for name in ("one", "two")}
    for options in ({"lora_modules": [f"{name}={tmp_path / name}" for name in requests]}, {"enable_lora": True}):
        with LLM(str(base), **RAW, **options) as llm:
            for name, request in requests.items():
                assert same(classified(llm, lora_request=request), expected[name])
            assert same(classified(llm), expected[None])
            choices = ["one", None, "two", "one"]
            mixed = classified(llm, lora_request=[requests.get(name or "") for name in choices])
            assert same(mixed, [expected[name][row] for row, name in enumerate(choices)])


def test_head_that_the_base_lacks(tmp_path: Path) -> None:
    """An adapter that requests choose cannot add one."""
    base, folder = bert(tmp_path / "base"), tmp_path / "adapter"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    trained(model, folder, task_type="SEQ_CLS", target_modules=ATTENTION)
    with pytest.raises(
        CheckpointError, match="changes classifier, which BertModel has not; a head of an adapter needs"
    ):
        LLM(str(base), lora_modules=[f"one={folder}"])


def test_tied_weights(tmp_path: Path) -> None:
    """A change of the input embeddings leaves the output embeddings alone, as in PEFT, unless it says otherwise."""
    base = checkpoints.decoder(tmp_path / "base", tie_word_embeddings=True)
    whole = trained(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        tmp_path / "a",
        target_modules=["embed_tokens", "q_proj"],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter = lora.read("a", tmp_path / "a", Audit())
    lora_changes.merge(model, adapter, Audit())
    assert same(logits_of(model, base), logits_of(whole, base), 1e-4)
    edit_json(tmp_path / "a" / "adapter_config.json", ensure_weight_tying=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(CheckpointError, match="has the key ensure_weight_tying, .*shares its weight"):
        lora_changes.merge(model, lora.read("a", tmp_path / "a", Audit()), Audit())


def test_every_key_that_peft_writes(tmp_path: Path) -> None:
    """None of them is unknown: each is honoured, or left with its reason."""
    base = bert(tmp_path / "base")
    trained(transformers.AutoModel.from_pretrained(base), base, target_modules=ATTENTION)
    written = read_json(base / "adapter_config.json")
    with LLM(str(base)) as llm:
        report = llm.info.report
    entries = [entry for entry in (*report.used, *report.left) if entry.file == "adapter_config.json"]
    assert {name for entry in entries for name in entry.names} == set(written)
    assert importlib.util.find_spec("peft") is not None


def test_unknown_tensors(tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    trained(transformers.AutoModel.from_pretrained(base), base, target_modules=ATTENTION)
    file = base / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.encoder.gate": torch.ones(1)}, file)
    with pytest.raises(
        CheckpointError, match=r"adapter_model.safetensors has the tensor base_model.model.encoder.gate"
    ):
        LLM(str(base))
