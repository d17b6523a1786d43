"""Checkpoints whose config names code of their own: Transformers' own class runs where it has the model, or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import dynamic_module_utils

from cenote import LLM
from cenote.config import ModelConfig
from cenote.errors import CheckpointError
from cenote.models import configs
from cenote.models.audit import Audit
from tests import checkpoints
from tests.checkpoints import HIDDEN, SHORT, edit_json

HEADS = 4
FLASH = "jinaai/xlm-roberta-flash-implementation--"
TASKS = ("retrieval.query", "retrieval.passage", "separation")
INSTRUCTIONS = {"retrieval.query": "represent query: ", "retrieval.passage": "represent: ", "separation": ""}
THETA = 500.0
"""Base of rotary positions, another than Transformers' classes have by default."""


def rows(folder: Path, texts: list[str] = SHORT, *, ask: dict[str, Any] | None = None, **options: Any) -> np.ndarray:
    with LLM(model=str(folder), **options) as llm:
        return np.array([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False, **(ask or {}))])


def reference(
    model: Any, tokenizer: Any, pool: str, texts: list[str] = SHORT, prepare: Callable[[Any], None] | None = None
) -> np.ndarray:
    """Vectors of Transformers' model, one text at a time, of length 1."""
    model = model.eval()
    if prepare is not None:
        prepare(model)
    vectors = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            states = model(input_ids=ids).last_hidden_state[0].double()
        row = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pool]
        vectors.append((row / row.norm()).numpy())
    return np.stack(vectors)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def far(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() > 1e-2)


def change(folder: Path, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "model.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in function(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})


# --- jina-embeddings-v3 and jina-colbert-v2 ----------------------------------------------------------------------


def flash(folder: Path, code: str, **settings: Any) -> tuple[Any, Any]:
    """A folder as jinaai/xlm-roberta-flash-implementation writes it; returns Transformers' model and tokenizer."""
    tokenizer = checkpoints.sentinels()
    checkpoints.classifier(folder, "JinaEmbeddingsV3", "Model", tokenizer=tokenizer, type_vocab_size=1)
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": THETA}, default_theta=None)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    change(folder, lambda weights: {f"roberta.{name}": tensor for name, tensor in weights.items()})
    edit_json(
        folder / "config.json",
        model_type="xlm-roberta",
        rope_parameters=None,
        rotary_emb_base=THETA,
        position_embedding_type="rotary",
        use_flash_attn=True,
        auto_map={"AutoConfig": f"{FLASH}configuration_xlm_roberta.XLMRobertaFlashConfig", "AutoModel": FLASH + code},
        **settings,
    )
    return model, tokenizer


def stacked(weights: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The tensors with those of adapters in them, as torch's parametrizations are saved."""
    named: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        module, _, last = name.rpartition(".")
        is_changed = last == "weight" and tensor.dim() == 2
        if not is_changed:
            named[name] = tensor
            continue
        out, into = tensor.shape
        shapes = ((into, 4), (out, 4)) if "embeddings" in module else ((4, into), (out, 4))
        if "embeddings" in module:
            shapes = ((out, 4), (4, into))
        a, b = (torch.randn(len(TASKS), *shape, generator=generator) * 0.4 for shape in shapes)
        place = f"{module}.parametrizations.weight"
        named |= {f"{place}.original": tensor, f"{place}.0.lora_A": a, f"{place}.0.lora_B": b}
        changes[module.removeprefix("roberta.")] = {"A": a, "B": b}
    return named


def merged(model: Any, changes: dict[str, dict[str, Any]], task: int) -> Any:
    """The model with the adapter of a task in its weights."""
    for published, pair in changes.items():
        a, b = pair["A"][task], pair["B"][task]
        delta = (a @ b if "embeddings" in published else b @ a) * 2.0 / 4
        path = published.replace("encoder.layers.", "layers.").replace("mixer.out_proj", "self_attn.o_proj")
        parts = {path: delta}
        if path.endswith("mixer.Wqkv"):
            thirds = zip("qkv", delta.chunk(3), strict=True)
            parts = {path.replace("mixer.Wqkv", f"self_attn.{part}_proj"): third for part, third in thirds}
        for module, part in parts.items():
            with torch.no_grad():
                model.get_submodule(module).weight.add_(part)
    return model


class Jina:
    """A folder as jina-embeddings-v3 is published, and the vectors of each task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model, tokenizer = flash(
            folder,
            "modeling_lora.XLMRobertaLoRA",
            architectures=["XLMRobertaModel"],
            emb_pooler="mean",
            lora_adaptations=list(TASKS),
            lora_alpha=2,
            lora_rank=4,
            lora_dropout_p=0.0,
            lora_main_params_trainable=False,
            load_trained_adapters=True,
            matryoshka_dimensions=[8, 16, HIDDEN],
            task_instructions=INSTRUCTIONS,
            truncate_dim=None,
        )
        changes: dict[str, dict[str, Any]] = {}
        change(folder, lambda weights: stacked(weights, changes))
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.pure = reference(model, tokenizer, "mean")
        self.of_task = {}
        for number, task in enumerate(TASKS):
            model.load_state_dict(state)
            texts = [INSTRUCTIONS[task] + text for text in SHORT]
            self.of_task[task] = reference(merged(model, changes, number), tokenizer, "mean", texts)


@pytest.fixture(scope="module")
def jina(tmp_path_factory: pytest.TempPathFactory) -> Jina:
    return Jina(tmp_path_factory.mktemp("jina") / "jina-embeddings-v3")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "trusted"])
def served(jina: Jina, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Code that Transformers' class stands for is neither run nor asked for, also where it may be."""
    asked = Mock(side_effect=AssertionError("the code was asked for"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "cached_file", asked)
        llm = LLM(model=str(jina.folder), trust_remote_code=request.param)
    with llm:
        yield llm
    assert not asked.called


def embedded(llm: LLM, **ask: Any) -> np.ndarray:
    return np.array([output.outputs.embedding for output in llm.embed(SHORT, use_tqdm=False, **ask)])


def test_jina_v3_without_a_task(served: LLM, jina: Jina) -> None:
    """Without a task the adapters are off, as in the author's code; the report says what runs."""
    close(embedded(served), jina.pure)
    assert any("Transformers' own class for 'jina_embeddings_v3'" in note for note in served.info.report.warnings)
    assert served.info.matryoshka == (8, 16, HIDDEN)


@pytest.mark.parametrize("task", TASKS)
def test_jina_v3_with_a_task(served: LLM, jina: Jina, task: str) -> None:
    """A task chooses its adapter and its instruction."""
    assert far(jina.of_task[task], jina.pure)
    close(embedded(served, prompt_name=task), jina.of_task[task])


def test_jina_v3_sides(served: LLM, jina: Jina) -> None:
    """Queries and documents take the adapters of retrieval."""
    close(embedded(served, input_type="query"), jina.of_task["retrieval.query"])
    close(embedded(served, input_type="document"), jina.of_task["retrieval.passage"])


def test_jina_v3_with_other_tasks_than_tensors(jina: Jina, tmp_path: Path) -> None:
    """A list of tasks that the tensors do not fit is refused."""
    folder = shutil.copytree(jina.folder, tmp_path / "jina")
    edit_json(folder / "config.json", lora_adaptations=["one"], task_instructions={"one": ""})
    with pytest.raises(CheckpointError, match=r"has 3 adapters in .*, but lora_adaptations in .* names 1: one"):
        LLM(model=str(folder))


def test_jina_colbert_v2(tmp_path: Path) -> None:
    """ColBERT's own layout over the same backbone: token vectors through the projection, of length 1."""
    folder = tmp_path / "jina-colbert-v2"
    model, tokenizer = flash(folder, "modeling_xlm_roberta.XLMRobertaModel", architectures=["HF_ColBERT"])
    projection = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(4))
    change(folder, lambda weights: {**weights, "linear.weight": projection})
    with LLM(model=str(folder), plain_late_interaction=True) as llm:
        outputs = llm.encode(SHORT, pooling_task="token_embed", use_tqdm=False)
    for text, output in zip(SHORT, outputs, strict=True):
        with torch.inference_mode():
            states = model.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        expected = nn.functional.normalize(states @ projection.T, dim=-1)
        np.testing.assert_allclose(output.outputs.data, expected, rtol=0, atol=2e-5)


def test_other_positions_of_the_same_code_are_refused(tmp_path: Path) -> None:
    """It has rotary and absolute positions, which Transformers has in two classes."""
    folder = tmp_path / "model"
    flash(folder, "modeling_xlm_roberta.XLMRobertaModel")
    edit_json(folder / "config.json", position_embedding_type="relative_key")
    with pytest.raises(CheckpointError, match=r"modeling_xlm_roberta\.XLMRobertaModel as its AutoModel.*--trust"):
        LLM(model=str(folder))


# --- gte, nomic, gte-Qwen2 ---------------------------------------------------------------------------------------


NEW_CODE = "Alibaba-NLP/new-impl--"
NEW = {"AutoConfig": f"{NEW_CODE}configuration.NewConfig", "AutoModel": f"{NEW_CODE}modeling.NewModel"}


def new_impl(folder: Path, *, prefix: str = "new.", **settings: Any) -> Any:
    """A folder as Alibaba-NLP/new-impl writes it; returns Transformers' model with the base `THETA`."""
    tokenizer = checkpoints.sentinels()
    checkpoints.classifier(folder, "Gte", "Model", tokenizer=tokenizer, type_vocab_size=1)
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": THETA})
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    change(folder, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    edit_json(
        folder / "config.json",
        **{
            "model_type": "new",
            "architectures": ["NewModel"],
            "auto_map": NEW,
            "rope_parameters": None,
            "rope_theta": THETA,
            "rope_scaling": None,
            "position_embedding_type": "rope",
            "layer_norm_type": "layer_norm",
            "logn_attention_clip1": False,
            "logn_attention_scale": False,
            "pack_qkv": True,
            "unpad_inputs": False,
            "use_memory_efficient_attention": False,
            "classifier_dropout": 0.0,
            **settings,
        },
    )
    return model


def with_ntk(model: Any, factor: float) -> None:
    """Give the model the frequencies of new-impl's `NTKScalingRotaryEmbedding`."""
    width = HIDDEN // HEADS
    inverse = 1.0 / ((THETA * factor) ** (torch.arange(0, width, 2).float() / width))
    model.rotary_emb.inv_freq = inverse / factor ** (2 / width)


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_gte(tmp_path: Path, factor: float) -> None:
    """gte-multilingual: positions are scaled as its own code does."""
    folder = tmp_path / "gte"
    model = new_impl(folder, rope_scaling=None if factor == 1 else {"type": "ntk", "factor": factor})
    plain = reference(model, checkpoints.sentinels(), "cls")
    expected = reference(model, checkpoints.sentinels(), "cls", prepare=lambda model: with_ntk(model, factor))
    assert far(plain, expected) == (factor > 1)
    close(rows(folder), expected)


def test_gte_without_token_types(tmp_path: Path) -> None:
    """gte-large-en-v1.5 has no table of token types."""
    folder = tmp_path / "gte"
    model = new_impl(folder, prefix="", type_vocab_size=0)
    name = "embeddings.token_type_embeddings.weight"
    change(folder, lambda weights: {key: tensor for key, tensor in weights.items() if key != name})
    with_types = reference(model, checkpoints.sentinels(), "cls")
    expected = reference(
        model, checkpoints.sentinels(), "cls", prepare=lambda model: nn.init.zeros_(model.get_parameter(name))
    )
    assert far(with_types, expected)
    close(rows(folder), expected)


@pytest.mark.parametrize(
    "settings",
    [{"logn_attention_scale": True}, {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}],
    ids=str,
)
def test_gte_settings_that_transformers_lacks(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A setting that Transformers' class cannot have refuses the checkpoint, with its code and the flag."""
    folder = tmp_path / "gte"
    new_impl(folder, **settings)
    with pytest.raises(CheckpointError, match=r"new-impl--modeling\.NewModel as its AutoModel.*--trust-remote-code"):
        LLM(model=str(folder))


def test_gte_reranker(tmp_path: Path) -> None:
    """gte-multilingual-reranker: the pair's logit of the class that Transformers has."""
    folder = tmp_path / "reranker"
    tokenizer = checkpoints.sentinels()
    checkpoints.classifier(folder, "Gte", tokenizer=tokenizer, num_labels=1, type_vocab_size=1)
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": THETA})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    edit_json(
        folder / "config.json",
        model_type="new",
        architectures=["NewForSequenceClassification"],
        auto_map={**NEW, "AutoModelForSequenceClassification": f"{NEW_CODE}modeling.NewForSequenceClassification"},
        rope_parameters=None,
        rope_theta=THETA,
        position_embedding_type="rope",
        layer_norm_type="layer_norm",
        pack_qkv=True,
    )
    expected = []
    for text in SHORT[:3]:
        ids = torch.tensor([tokenizer("a lazy dog", text)["input_ids"]])
        with torch.inference_mode():
            expected.append(float(model(input_ids=ids).logits[0, 0].sigmoid()))
    with LLM(model=str(folder)) as llm:
        outputs = llm.score("a lazy dog", SHORT[:3], use_tqdm=False)
    np.testing.assert_allclose([output.outputs.score for output in outputs], expected, rtol=0, atol=2e-5)


def test_code_of_a_head_that_cenote_builds(tmp_path: Path) -> None:
    """Qwen2.5-Math-PRM names code for a head that the family of rewards has."""
    folder = checkpoints.decoder(tmp_path / "prm", "Qwen3ForCausalLM")
    checkpoints.add_head(folder, "Qwen2ForProcessRewardModel", checkpoints.two_layers(2))
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"})
    with LLM(model=str(folder), hf_overrides={"architectures": ["Qwen2ForRewardModel"]}) as llm:
        assert llm.info.report.head.startswith("Qwen2ForRewardModel")
    edit_json(folder / "config.json", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(CheckpointError, match=r"Qwen2ForProcessRewardModel as its AutoModel.*--trust-remote-code"):
        LLM(model=str(folder))


def nomic(folder: Path, **settings: Any) -> Any:
    """A folder with the config of nomic-ai/nomic-bert-2048; returns Transformers' model."""
    checkpoints.classifier(
        folder, "NomicBert", "Model", tokenizer=checkpoints.wordpiece(), type_vocab_size=2, layer_norm_eps=1e-3
    )
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": THETA})
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    config = model.config
    words = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
    }
    code = "nomic-ai/nomic-bert-2048--"
    edit_json(
        folder / "config.json",
        **dict.fromkeys([*words, "head_dim", "rope_parameters", "hidden_act"]),
        **{
            **{word: getattr(config, name) for name, word in words.items()},
            "activation_function": "swiglu",
            "causal": False,
            "qkv_proj_bias": False,
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
            "prenorm": False,
            "parallel_block": False,
            "use_rms_norm": False,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None,
            "rotary_emb_base": THETA,
            "rotary_scaling_factor": None,
            "max_trained_positions": 2048,
            "pad_vocab_size_multiple": 1,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "summary_proj_to_labels": True,
            "summary_activation": None,
            "auto_map": {
                "AutoConfig": f"{code}configuration_hf_nomic_bert.NomicBertConfig",
                "AutoModel": f"{code}modeling_hf_nomic_bert.NomicBertModel",
            },
            **settings,
        },
    )
    return model


def test_nomic(tmp_path: Path) -> None:
    """nomic-embed v1.5 in the words of its own code."""
    folder = tmp_path / "nomic"
    model = nomic(folder)
    close(rows(folder, pooler_config={"pooling_type": "MEAN"}), reference(model, checkpoints.wordpiece(), "mean"))


@pytest.mark.parametrize("is_null", [False, True], ids=["missing", "null"])
@pytest.mark.parametrize("settings", [{}, {"rotary_scaling_factor": 2.0}], ids=["plain", "scaled"])
def test_nomic_without_a_base_has_that_of_its_code(tmp_path: Path, settings: dict[str, Any], *, is_null: bool) -> None:
    """Scaling begins at the trained positions, which no text here reaches."""
    folder = tmp_path / "nomic"
    nomic(folder, **settings)
    content = checkpoints.read_json(folder / "config.json")
    del content["rotary_emb_base"]
    if is_null:
        content |= {"rotary_emb_base": None, "pad_vocab_size_multiple": None, "max_trained_positions": None}
    checkpoints.write_json(folder / "config.json", content)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    model = transformers.NomicBertModel.from_pretrained(
        folder,
        config=transformers.NomicBertConfig(
            vocab_size=content["vocab_size"],
            hidden_size=HIDDEN,
            num_hidden_layers=content["n_layer"],
            num_attention_heads=HEADS,
            intermediate_size=content["n_inner"],
            layer_norm_eps=content["layer_norm_epsilon"],
            rope_parameters=rope,
        ),
        attn_implementation="eager",
    )
    expected = reference(model, checkpoints.wordpiece(), "mean")
    close(rows(folder, pooler_config={"pooling_type": "MEAN"}, max_model_len=64), expected)


@pytest.mark.parametrize(
    "overrides", [{"rotary_emb_base": 10}, {"rope_parameters": {"rope_theta": 10.0}}], ids=["its word", "Transformers'"]
)
def test_nomic_with_overrides(tmp_path: Path, overrides: dict[str, Any]) -> None:
    """They are as in its `config.json`, in the words of its code or of Transformers."""
    folder = tmp_path / "nomic"
    nomic(folder)
    plain, changed = rows(folder), rows(folder, hf_overrides=overrides)
    edit_json(folder / "config.json", rotary_emb_base=10)
    expected = rows(folder)
    assert np.abs(expected - plain).max() > 1e-3
    close(changed, expected)


def test_nomic_beyond_its_trained_positions(tmp_path: Path) -> None:
    """Its dynamic scaling counts from the trained positions on."""
    folder = tmp_path / "nomic"
    model = nomic(folder, rotary_scaling_factor=2.0, max_trained_positions=8)
    tokenizer = checkpoints.wordpiece()
    text = "one two three four five six seven eight nine ten"
    length = len(tokenizer(text)["input_ids"])
    assert length > 8
    width = HIDDEN // HEADS
    base = THETA * (2.0 * length / 8 - 1.0) ** (width / (width - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, width, 2).float() / width))
    plain = reference(model, tokenizer, "mean", [text])
    model.rotary_emb.inv_freq = frequencies
    expected = reference(model, tokenizer, "mean", [text])
    assert far(plain, expected)
    found = rows(folder, [text], pooler_config={"pooling_type": "MEAN"}, max_model_len=64)
    close(found, expected)


@pytest.mark.parametrize(("positions", "expected"), [(256, 256), (None, 64)])
def test_nomic_is_scaled_up_to_its_positions(tmp_path: Path, positions: int | None, expected: int) -> None:
    """Without any, those that it was trained with are its limit."""
    folder = tmp_path / "nomic"
    nomic(folder, rotary_scaling_factor=2.0, max_trained_positions=64, n_positions=positions)
    with LLM(model=str(folder)) as llm:
        assert llm.info.max_model_len == expected
        (output,) = llm.embed([[5] * expected], use_tqdm=False)
    assert np.isfinite(output.outputs.embedding).all()


@pytest.mark.parametrize("settings", [{"activation_function": "gelu"}, {"num_experts": 8}, {"causal": True}], ids=str)
def test_nomic_settings_that_transformers_lacks(tmp_path: Path, settings: dict[str, Any]) -> None:
    """nomic-embed v2-moe and its like are refused with their code and the flag."""
    folder = tmp_path / "nomic"
    nomic(folder, **settings)
    with pytest.raises(CheckpointError, match=r"modeling_hf_nomic_bert\.NomicBertModel.*--trust-remote-code"):
        LLM(model=str(folder))


QWEN = {
    "AutoModel": "modeling_qwen.Qwen2Model",
    "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_qwen.Qwen2ForSequenceClassification",
}
TOKENIZERS = {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]}


def gte_qwen(folder: Path, **settings: Any) -> None:
    tokenizer = checkpoints.byte_level("$A")
    checkpoints.classifier(
        folder, "Qwen2", "ForCausalLM", tokenizer=tokenizer, num_key_value_heads=2, tie_word_embeddings=False
    )
    edit_json(folder / "config.json", is_causal=False, auto_map=QWEN, **settings)
    edit_json(
        folder / "tokenizer_config.json", auto_map=TOKENIZERS, add_eos_token=True, tokenizer_class="Qwen2Tokenizer"
    )


@pytest.mark.parametrize("trusted", [False, True])
def test_gte_qwen2_attends_both_ways_and_ends_texts(tmp_path: Path, trusted: bool) -> None:
    """Its attention is bidirectional, and its tokenizer closes a text with the end token, by which it pools."""
    folder = tmp_path / "gte-Qwen2"
    gte_qwen(folder)
    config = transformers.Qwen2Config.from_pretrained(folder)
    assert config.is_causal is False
    model = transformers.Qwen2Model.from_pretrained(folder, config=config, attn_implementation="eager")
    tokenizer = checkpoints.byte_level("$A <|endoftext|>")
    expected = reference(model, tokenizer, "last")
    model.config.is_causal = True
    assert far(reference(model, tokenizer, "last"), expected)
    close(rows(folder, trust_remote_code=trusted), expected)


def test_the_same_code_without_the_setting_is_refused(tmp_path: Path) -> None:
    """Whether that code attends both ways is not known without `is_causal`."""
    folder = tmp_path / "qwen"
    gte_qwen(folder)
    edit_json(folder / "config.json", is_causal=None)
    with pytest.raises(CheckpointError, match=r"modeling_qwen\.Qwen2Model as its AutoModel.*--trust-remote-code"):
        LLM(model=str(folder))


# --- code that has to run, or not --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    ["modeling_gritlm7b.MistralModel", "modeling_mistral_encoder.MistralEncoderModel", "GritLM/x--modeling.Own"],
)
def test_other_code_is_refused_by_its_name_and_the_flag(tmp_path: Path, reference: str) -> None:
    """A known `model_type` does not mean that Transformers' class is the model."""
    folder = checkpoints.bert(tmp_path / "model")
    edit_json(folder / "config.json", auto_map={"AutoModel": reference})
    with pytest.raises(CheckpointError) as error:
        LLM(model=str(folder))
    for words in ("config.json has the key auto_map", f"{reference} as its AutoModel", "--trust-remote-code"):
        assert words in error.value.message
    with LLM(model=str(folder), allow_unread="auto_map") as llm:
        assert [entry for entry in llm.info.report.left if "auto_map" in entry.names]


def test_code_of_a_tokenizer_is_refused_by_its_name_and_the_flag(tmp_path: Path) -> None:
    """Transformers' tokenizer of the same name is another one."""
    folder = checkpoints.bert(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json.*tokenization_own\.Own.*--trust-remote-code"):
        LLM(model=str(folder))


def test_a_tokenizer_class_that_transformers_lacks(tmp_path: Path) -> None:
    """A class by an unknown name would be read as whatever tokenizer.json holds."""
    folder = checkpoints.bert(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LakeTokenizer")
    with pytest.raises(CheckpointError, match="LakeTokenizer is not a class of the installed Transformers"):
        LLM(model=str(folder))


TUPLE = """
from torch import nn
from transformers import BertModel, BertPreTrainedModel
class Own(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, return_dict=None, **kwargs):
        states = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **kwargs)[0]
        return (self.classifier(states[:, 0]), states)
"""


def test_a_head_that_returns_a_tuple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tuple that a checkpoint's own head returns, the logits come first, as in Transformers."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = checkpoints.classifier(tmp_path / "tuple", num_labels=2)
    (folder / "modeling_tuple.py").write_text(TUPLE)
    edit_json(folder / "config.json", auto_map={"AutoModelForSequenceClassification": "modeling_tuple.Own"})
    model = transformers.BertModel.from_pretrained(folder).eval()
    weights = load_file(folder / "model.safetensors")
    tokenizer = checkpoints.wordpiece()
    with LLM(model=str(folder), trust_remote_code=True) as llm:
        outputs = llm.classify(SHORT, use_tqdm=False)
    for text, output in zip(SHORT, outputs, strict=True):
        with torch.inference_mode():
            state = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, 0]
        logits = nn.functional.linear(state, weights["classifier.weight"], weights["classifier.bias"])
        np.testing.assert_allclose(output.outputs.probs, logits.softmax(-1), rtol=0, atol=2e-5)


COMPUTING = """
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, width=3, **kwargs):
        super().__init__(**kwargs)
        self.width, self.doubled = width, 2 * width
"""


def test_overrides_of_a_config_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count before its class computes something of them."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(COMPUTING)
    content = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}, "architectures": ["Own"]}
    checkpoints.write_json(folder / "config.json", content)
    options = ModelConfig(trust_remote_code=True, hf_overrides={"width": 5, "architectures": ["Other"]})
    config, _ = configs.read(folder, "own", options, Audit(), {})
    assert (config.width, config.doubled, config.architectures) == (5, 10, ["Other"])
    assert (config.auto_map, config._name_or_path) == (content["auto_map"], str(folder))
