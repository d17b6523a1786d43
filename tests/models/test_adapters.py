"""Task adapters: each equals the Transformers model with the adapter merged into its weights, one text at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from torch import nn

from cenote import LLM, LoRARequest
from cenote.cli.serve import report
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.core import PoolingParams, Sequence
from cenote.errors import BadRequest, CheckpointError, ConfigError
from cenote.models.audit import Audit
from cenote.models.load import load
from cenote.models.lora import CONFIG, WEIGHTS
from cenote.models.passes.adapters import find
from cenote.pipeline.pipeline import Service
from cenote.pipeline.prompts import Applied, Prompts
from cenote.server.app import build
from tests import checkpoints
from tests.checkpoints import edit_json, read_json, write_json

TEXTS = checkpoints.SHORT
MLP = {"mlp.fc1": nn.Linear, "mlp.fc2": nn.Linear}
ATTENTION = {f"self_attn.{name}_proj": nn.Linear for name in "qkvo"}
LAYERS = {f"layers.{i}.{path}": kind for i in (0, 1) for path, kind in {**MLP, **ATTENTION}.items()}
EMBEDDINGS = {f"embeddings.{name}": nn.Embedding for name in ("word_embeddings", "token_type_embeddings")}

ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "retrieval_query": ({**LAYERS, **EMBEDDINGS}, {"r": 4, "lora_alpha": 6}),
    "retrieval_passage": ({**LAYERS, **EMBEDDINGS}, {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    "separation": (
        {path: kind for path, kind in LAYERS.items() if "attn" in path},
        {"r": 3, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 9}},
    ),
    "text-matching": ({"embeddings.word_embeddings": nn.Embedding}, {"r": 2, "lora_alpha": 4}),
}
"""Names of adapters to the modules that they change and their settings."""


def write_adapter(folder: Path, name: str, *, seed: int, prefix: str = "base_model.model.", **more: Any) -> Path:
    """Write one of `ADAPTERS` for the model in `folder`, in PEFT's file format."""
    modules, settings = ADAPTERS[name]
    model = transformers.AutoModel.from_pretrained(folder).base_model
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, kind in modules.items():
        out, into = model.get_submodule(path).weight.shape
        rank = next((r for end, r in settings.get("rank_pattern", {}).items() if path.endswith(end)), settings["r"])
        a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        if kind is nn.Linear:
            tensors[f"{prefix}{path}.lora_A.weight"] = a / into**0.5
            tensors[f"{prefix}{path}.lora_B.weight"] = b
        else:
            tensors[f"{prefix}{path}.lora_embedding_A"] = torch.randn(rank, out, generator=generator)
            tensors[f"{prefix}{path}.lora_embedding_B"] = torch.randn(into, rank, generator=generator)
    own = folder / name
    own.mkdir(parents=True)
    save_file(tensors, own / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in modules}),
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.1,
        "use_dora": False,
        "modules_to_save": None,
        **settings,
    }
    write_json(own / CONFIG, {**config, **more})
    return own


def jina(folder: Path, names: tuple[str, ...] = tuple(ADAPTERS), **settings: Any) -> Path:
    checkpoints.classifier(folder, "JinaEmbeddingsV3", "Model", tokenizer=checkpoints.sentinels(), type_vocab_size=1)
    for seed, name in enumerate(names):
        write_adapter(folder, name, seed=seed)
    return checkpoints.write_modules(folder, checkpoints.pooling("mean"), checkpoints.NORMALIZE, settings=settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jina(tmp_path_factory.mktemp("adapters") / "jina")


def merged(base: Any, folder: Path, modules: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A copy of the backbone `base` with an adapter in its weights."""
    model = copy.deepcopy(base)
    halves = load_file(folder / WEIGHTS)
    for path, kind in modules.items():
        key = f"base_model.model.{path}.lora_{'' if kind is nn.Linear else 'embedding_'}"
        end = ".weight" if kind is nn.Linear else ""
        a, b = halves[f"{key}A{end}"].double(), halves[f"{key}B{end}"].double()
        alpha = settings["lora_alpha"]
        if "alpha_pattern" in settings and path == "layers.1.self_attn.v_proj":
            alpha = 9
        delta = (b @ a) * (alpha / (len(a) ** 0.5 if settings.get("use_rslora") else len(a)))
        with torch.no_grad():
            model.get_submodule(path).weight.add_((delta if kind is nn.Linear else delta.t()).float())
    return model


class Reference:
    """The backbone with each adapter merged into a copy of its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.base = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        self.merged = {name: merged(self.base, folder / name, *own) for name, own in ADAPTERS.items()}

    @torch.inference_mode()
    def __call__(self, text: str, adapter: str | None = None) -> np.ndarray:
        model = self.merged[adapter] if adapter else self.base
        states = model(**self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        vector: np.ndarray = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
        return vector


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def of_relu(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The same with another activation, which is not fused in the same way."""
    folder = jina(tmp_path_factory.mktemp("relu") / "jina")
    edit_json(folder / "config.json", hidden_act="relu")
    return Reference(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    service = Service.open(ModelConfig(model=str(folder), served_model_name=("jina",)), EngineConfig(cache_size=8))
    with TestClient(build([service], ServerConfig(token_ids="native"))) as client:
        yield client


def embed(llm: LLM, **asked: Any) -> np.ndarray:
    return np.array([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False, **asked)])


def expected(reference: Reference, adapter: str | None) -> np.ndarray:
    return np.stack([reference(text, adapter) for text in TEXTS])


def test_adapters_differ(reference: Reference) -> None:
    found = [expected(reference, adapter) for adapter in (None, *ADAPTERS)]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize(
    ("asked", "adapter"),
    [
        ({}, None),
        ({"prompt": ""}, None),
        ({"input_type": "retrieval.query"}, "retrieval_query"),
        ({"input_type": "retrieval_query"}, "retrieval_query"),
        ({"input_type": "query"}, "retrieval_query"),
        ({"input_type": "search_query"}, "retrieval_query"),
        ({"prompt_name": "retrieval.query"}, "retrieval_query"),
        ({"input_type": "retrieval.passage"}, "retrieval_passage"),
        ({"input_type": "document"}, "retrieval_passage"),
        ({"prompt_name": "retrieval_passage"}, "retrieval_passage"),
        ({"input_type": "separation"}, "separation"),
        ({"input_type": "clustering"}, "separation"),
        ({"input_type": "text_matching"}, "text-matching"),
        ({"prompt_name": "text-matching"}, "text-matching"),
    ],
    ids=str,
)
def test_python(llm: LLM, reference: Reference, asked: dict[str, str], adapter: str | None) -> None:
    assert np.allclose(embed(llm, **asked), expected(reference, adapter), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"native_kernels": False}, {"packing": False}, {"prefix_sharing": False}],
    ids=str,
)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_mixed_batches(
    folder: Path, reference: Reference, of_relu: Reference, options: dict[str, bool], activation: str
) -> None:
    if activation != "gelu":
        folder, reference = of_relu.folder, of_relu
    model, checkpoint = load(ModelConfig(model=str(folder), **options))
    assert model.info.adapters == tuple(sorted(ADAPTERS))
    asked = [(text, adapter) for text in TEXTS for adapter in (None, *ADAPTERS)]
    sequences = [Sequence(checkpoint.tokenizer(text)["input_ids"], adapter=adapter) for text, adapter in asked]
    for (text, adapter), output in zip(asked, model.launch(sequences).finish(), strict=True):
        assert np.allclose(output.data, reference(text, adapter), atol=1e-5), (text, adapter)


def test_layers_of_no_adapter_stay_fused(tmp_path: Path) -> None:
    def fused(names: tuple[str, ...], place: str) -> int:
        model, _ = load(ModelConfig(model=str(jina(tmp_path / place, names))))
        return sum("forward" in vars(module) for module in model.layout.backbone.model.modules())

    pure = fused((), "none")
    assert fused(("separation",), "attention") == pure
    assert fused(("retrieval_query",), "all") < pure


def test_token_ids_get_the_adapter(llm: LLM, reference: Reference) -> None:
    ids = reference.tokenizer(TEXTS[0])["input_ids"]
    (output,) = llm.embed([{"prompt_token_ids": ids}], input_type="query", use_tqdm=False)
    assert np.allclose(output.outputs.embedding, reference(TEXTS[0], "retrieval_query"), atol=1e-5)


def test_scores_use_both_sides(llm: LLM, client: TestClient, reference: Reference) -> None:
    wanted = float(reference(TEXTS[0], "retrieval_query") @ reference(TEXTS[1], "retrieval_passage"))
    (output,) = llm.score(TEXTS[0], TEXTS[1], use_tqdm=False)
    assert abs(output.outputs.score - wanted) < 1e-5
    answer = client.post("/rerank", json={"model": "jina", "query": TEXTS[0], "documents": [TEXTS[1]]}).json()
    assert abs(answer["results"][0]["relevance_score"] - wanted) < 1e-5


@pytest.mark.parametrize(
    ("route", "asked", "adapter"),
    [
        ("/v1/embeddings", {}, None),
        ("/v1/embeddings", {"task": "retrieval.query"}, "retrieval_query"),
        ("/v1/embeddings", {"task": "retrieval.passage"}, "retrieval_passage"),
        ("/v1/embeddings", {"task": "text-matching"}, "text-matching"),
        ("/v1/embeddings", {"task": "separation"}, "separation"),
        ("/v1/embeddings", {"input_type": "clustering"}, "separation"),
        ("/v1/embeddings", {"prompt_name": "text_matching"}, "text-matching"),
        ("/pooling", {"task": "embed", "input_type": "document"}, "retrieval_passage"),
    ],
    ids=str,
)
def test_http(client: TestClient, reference: Reference, route: str, asked: dict[str, str], adapter: str | None) -> None:
    answer = client.post(route, json={"model": "jina", "input": TEXTS[1], **asked})
    assert answer.status_code == 200, answer.text
    (entry,) = answer.json()["data"]
    found = entry["embedding"] if route == "/v1/embeddings" else entry["data"]
    assert np.allclose(found, reference(TEXTS[1], adapter), atol=1e-5)  # from one cache for all


def test_usage_names_them(client: TestClient, tmp_path: Path) -> None:
    def details(client: TestClient, route: str = "/v1/embeddings", **body: Any) -> Any:
        answer = client.post(route, json={"model": "jina", **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens_details"]

    assert details(client, input=TEXTS) is None
    assert details(client, input=TEXTS, task="retrieval.query") == {"adapters": ["retrieval_query"]}
    assert details(client, "/pooling", input=[[5, 6]], input_type="clustering") == {"adapters": ["separation"]}
    both = {"adapters": ["retrieval_query", "retrieval_passage"]}
    assert details(client, "/score", queries=TEXTS[0], documents=TEXTS) == both
    folder = jina(tmp_path / "jina", prompts={"retrieval.query": "represent: ", "topic": "one "})
    service = Service.open(ModelConfig(model=str(folder), served_model_name="jina"), EngineConfig())
    with TestClient(build([service], ServerConfig())) as prompted:
        applied = {"prompt_name": "retrieval.query", "prompt": "represent: ", "adapters": ["retrieval_query"]}
        assert details(prompted, input=TEXTS, input_type="query") == applied
        assert details(prompted, input=TEXTS, prompt_name="topic") == {"prompt_name": "topic", "prompt": "one "}


def test_cohere(client: TestClient, reference: Reference) -> None:
    body = {"model": "jina", "texts": [TEXTS[1]], "input_type": "search_document", "embedding_types": ["float"]}
    answer = client.post("/v2/embed", json=body)
    assert answer.status_code == 200, answer.text
    assert np.allclose(answer.json()["embeddings"]["float"][0], reference(TEXTS[1], "retrieval_passage"), atol=1e-5)


def test_late_chunks(client: TestClient, reference: Reference) -> None:
    body = {"model": "jina", "input": TEXTS[1], "task": "retrieval.passage"}
    answer = client.post("/v1/embeddings", json={**body, "late_chunking_params": {"chunk_size": 512}})
    assert answer.status_code == 200, answer.text
    (chunk,) = answer.json()["data"][0]["embedding"]
    assert np.allclose(chunk, reference(TEXTS[1], "retrieval_passage"), atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"task": "code"}, "Unsupported input_type 'code'"),
        ({"prompt_name": "code"}, "unknown prompt_name 'code'"),
    ],
    ids=str,
)
def test_unknown(client: TestClient, asked: dict[str, str], message: str) -> None:
    answer = client.post("/v1/embeddings", json={"model": "jina", "input": TEXTS[0], **asked})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"{message}. Supported values: {', '.join(sorted(ADAPTERS))}"


def test_default(folder: Path, reference: Reference) -> None:
    with LLM(str(folder), default_prompt_name="separation") as llm:
        assert np.allclose(embed(llm), expected(reference, "separation"), atol=1e-5)
        assert np.allclose(embed(llm, input_type="query"), expected(reference, "retrieval_query"), atol=1e-5)
    with pytest.raises(ConfigError, match="default_prompt_name is 'code', but the prompts are"):
        LLM(str(folder), default_prompt_name="code")


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_default_of_a_classifier(tmp_path: Path, kind: str) -> None:
    """Texts, pairs and entities run with it, through the model's own head."""
    shape: dict[str, Any] = {"tokenizer": checkpoints.sentinels(), "type_vocab_size": 1, "num_labels": 1}
    folder = checkpoints.classifier(tmp_path / "head", "JinaEmbeddingsV3", f"For{kind}Classification", **shape)
    write_adapter(folder, "separation", seed=4)
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    whole = auto.from_pretrained(folder, attn_implementation="eager").eval()
    backbone = merged(whole.base_model, folder / "separation", *ADAPTERS["separation"])
    pure, whole.roberta = whole.roberta, backbone
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def wanted(*texts: str) -> np.ndarray:
        logits: np.ndarray = whole(**tokenizer(*texts, return_tensors="pt")).logits[0].numpy()
        return logits

    with LLM(str(folder), default_prompt_name="separation", pooler_config={"use_activation": False}) as llm:
        if kind == "Sequence":
            (output,) = llm.classify(TEXTS[0], use_tqdm=False)
            assert np.allclose(output.outputs.probs, wanted(TEXTS[0]), atol=1e-5)
            (output,) = llm.score(TEXTS[0], TEXTS[2], use_tqdm=False)
            assert np.allclose(output.outputs.score, wanted(TEXTS[0], TEXTS[2]), atol=1e-5)
        else:
            (output,) = llm.encode(TEXTS[0], pooling_task="token_classify", use_tqdm=False)
            assert np.allclose(output.outputs.data, wanted(TEXTS[0]), atol=1e-5)
            params = llm._service.renderer.check("token_classify", PoolingParams())
            (annotated,) = llm._service.renderer.annotated([TEXTS[0]], "token_classify", params)
            assert annotated.sequence.adapter == "separation"
    adapted = wanted(TEXTS[0])
    whole.roberta = pure
    assert np.abs(adapted - wanted(TEXTS[0])).max() > 1e-2


def test_with_prompts(tmp_path: Path) -> None:
    folder = jina(tmp_path / "jina", prompts={"retrieval.query": "represent: ", "separation": "", "topic": "one "})
    reference = Reference(folder)
    with LLM(str(folder)) as llm:
        for asked, text, adapter in (
            ({"input_type": "query"}, "represent: ", "retrieval_query"),
            ({"prompt_name": "retrieval_query"}, "represent: ", "retrieval_query"),
            ({"prompt_name": "separation"}, "", "separation"),
            ({"prompt_name": "topic"}, "one ", None),
            ({"input_type": "document"}, "", "retrieval_passage"),
        ):
            (output,) = llm.embed("the water", use_tqdm=False, **asked)
            assert np.allclose(output.outputs.embedding, reference(f"{text}the water", adapter), atol=1e-5), asked


def test_one_adapter_for_both_sides() -> None:
    prompts = Prompts({"query": "Query: ", "document": "Document: "}, adapters=("retrieval", "text-matching"))
    assert prompts.of("query") == Applied("Query: ", "query", "query", "retrieval")
    assert prompts.of("document") == Applied("Document: ", "document", "document", "retrieval")
    assert prompts.choose(name="document") == prompts.of("document")
    assert prompts.choose(input_type="retrieval.query") == prompts.of("query")
    assert prompts.choose(input_type="retrieval") == Applied("", "retrieval", None, "retrieval")
    assert prompts.choose() == Applied()


def test_no_side_among_the_adapters() -> None:
    prompts = Prompts(adapters=("separation",))
    assert prompts.of("query") == Applied(role="query")
    with pytest.raises(BadRequest, match="Unsupported input_type 'query'. Supported values: separation"):
        prompts.choose(input_type="query")


def test_report(folder: Path) -> None:
    service = Service.open(ModelConfig(model=str(folder)), EngineConfig())
    service.engine.close()
    assert f"adapters: {', '.join(sorted(ADAPTERS))}; default none" in report(service)


def test_found_where_they_are(folder: Path, reference: Reference, tmp_path: Path) -> None:
    moved = jina(tmp_path / "jina", ())
    write_adapter(moved, "separation", seed=2, prefix="base_model.model.roberta.")
    (moved / "adapters").mkdir()
    (moved / "separation").rename(moved / "adapters" / "separation")
    assert find([moved, moved], Audit()) == {"separation": moved / "adapters" / "separation"}
    with LLM(str(moved)) as llm:
        assert np.allclose(embed(llm, input_type="separation"), expected(reference, "separation"), atol=1e-5)
    write_adapter(moved, "text-matching", seed=3)
    (moved / "text-matching").rename(moved / "Separation")
    with pytest.raises(CheckpointError, match="the adapters 'Separation' and 'separation' have the same name"):
        find([moved], Audit())


def test_a_model_without_adapters(tmp_path: Path) -> None:
    model, _ = load(ModelConfig(model=str(jina(tmp_path / "jina", ()))))
    assert model.info.adapters == ()
    with pytest.raises(BadRequest, match="unknown adapter 'separation'. Supported values: none"):
        model.launch([Sequence([5, 6], adapter="separation")])


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("use_dora", True, r"does not fit .*expected .*'magnitude'"),
        ("bias", "some", "adapter_config.json of separation: Invalid enum value 'some' - at `\\$.bias`"),
        ("lora_bias", True, r"does not fit .*expected .*'B.bias'"),
        (
            "init_lora_weights",
            "pissa",
            "separation/adapter_config.json has the key init_lora_weights, .*'pissa' changes",
        ),
        ("layer_replication", [[0, 1]], "separation/adapter_config.json has the key layer_replication"),
        ("trainable_token_indices", [3], "separation/adapter_config.json has the key trainable_token_indices"),
        ("a_new_option", 1, "separation/adapter_config.json has the key a_new_option"),
        ("layers_to_transform", [1], "separation/adapter_model.safetensors has the tensors .*layers.0.self_attn"),
        ("exclude_modules", ["v_proj"], "separation/adapter_model.safetensors has the tensors .*self_attn.v_proj"),
        ("layers_to_transform", {"a": 1}, "cannot read adapter_config.json of separation: "),
    ],
    ids=str,
)
def test_refused_settings(tmp_path: Path, setting: str, value: Any, message: str) -> None:
    folder = jina(tmp_path / "jina", ("separation",))
    edit_json(folder / "separation" / CONFIG, **{setting: value})
    with pytest.raises(CheckpointError, match=message):
        load(ModelConfig(model=str(folder)))


def test_allowed_settings(tmp_path: Path, reference: Reference) -> None:
    """A user may let a setting go unread, or leave an adapter out."""
    folder = jina(tmp_path / "jina", ("separation",))
    write_adapter(folder, "text-matching", seed=3)
    edit_json(folder / "text-matching" / CONFIG, peft_type="PROMPT_TUNING")
    with pytest.raises(
        CheckpointError, match="'text-matching' is of the peft_type 'PROMPT_TUNING'; only LORA is supported"
    ):
        load(ModelConfig(model=str(folder)))
    edit_json(folder / "separation" / CONFIG, a_new_option=1)
    model, _ = load(ModelConfig(model=str(folder), allow_unread=("a_new_option", "text-matching")))
    assert model.info.adapters == ("separation",)
    reasons = {(entry.file, name): entry.reason for entry in model.info.report.left for name in entry.names}
    assert reasons["text-matching/", CONFIG] == "allowed to go unread"
    assert reasons[f"separation/{CONFIG}", "a_new_option"] == "allowed to go unread"


@pytest.mark.parametrize("name", ["checkpoint-500", "run"])
def test_leftovers_of_training(tmp_path: Path, name: str) -> None:
    folder = jina(tmp_path / "jina", ("separation",))
    write_adapter(folder, "text-matching", seed=3)
    edit_json(folder / "text-matching" / CONFIG, peft_type="PROMPT_TUNING")
    (folder / "text-matching").rename(folder / name)
    (folder / name / "trainer_state.json").write_text("{}")
    model, _ = load(ModelConfig(model=str(folder)))
    assert model.info.adapters == ("separation",)
    (left,) = (entry for entry in model.info.report.left if entry.file == f"{name}/")
    assert left.names == (CONFIG,)
    assert left.reason == "training left it behind, and it is not one of the model's adapters"


def test_no_room_for_a_request_to_bring_one(folder: Path, llm: LLM) -> None:
    request = LoRARequest("late", 1, str(folder / "separation"))
    with pytest.raises(BadRequest, match="this model was loaded without enable_lora"):
        llm.embed(TEXTS[0], lora_request=request, use_tqdm=False)


def test_refused_files(tmp_path: Path) -> None:
    folder = jina(tmp_path / "jina", ("separation",))
    own = folder / "separation"
    good, tensors = read_json(own / CONFIG), load_file(own / WEIGHTS)
    key = "base_model.model.layers.0.self_attn.q_proj.lora_{}.weight"

    def refuses(message: str, changed: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
        save_file(tensors if changed is None else changed, own / WEIGHTS)
        write_json(own / CONFIG, {**good, **config})
        with pytest.raises(CheckpointError, match=message):
            load(ModelConfig(model=str(folder)))

    refuses("is of the peft_type 'IA3'; only LORA is supported", peft_type="IA3")
    refuses(r"adapter_config.json of separation: Expected `int`, got `str` - at `\$.r`", r="x")
    refuses(
        r"does not fit layers.0.self_attn.q_proj: its shapes in adapter_model.safetensors are \{'A': \(2, 32\)",
        rank_pattern={},
    )
    refuses("does not fit layers.0.self_attn.q_proj", {**tensors, key.format("B"): torch.ones(31, 2)})
    refuses(
        "does not fit layers.0.self_attn.q_proj", {k: tensor for k, tensor in tensors.items() if k != key.format("B")}
    )
    missing = {**tensors, "base_model.model.layers.7.mlp.fc1.lora_A.weight": torch.ones(3, 32)}
    refuses(
        "has the tensor base_model.model.layers.7.mlp.fc1.lora_A.weight, .*adapter_config.json name no such",
        missing,
    )
    targets = [*good["target_modules"], "fc1", "final_norm"]
    refuses("changes layers.7.mlp.fc1, which JinaEmbeddingsV3Model has not", missing, target_modules=targets)
    refuses(
        r"does not fit layers.0.mlp.fc1: its shapes in adapter_model.safetensors are \{'A': \(3, 32\)\}, expected",
        {**tensors, "base_model.model.layers.0.mlp.fc1.lora_embedding_A": torch.ones(3, 32)},
        target_modules=targets,
    )
    refuses("has the tensor base_model.model.x.weight", {**tensors, "base_model.model.x.weight": torch.ones(1)})
    refuses("changes nothing", {})
    refuses(
        "separation/adapter_model.safetensors: .*not finite", {k: tensor * torch.nan for k, tensor in tensors.items()}
    )
    (own / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="cannot read adapter_config.json"):
        load(ModelConfig(model=str(folder)))
    write_json(own / CONFIG, good)
    (own / WEIGHTS).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot read adapter_model.safetensors"):
        load(ModelConfig(model=str(folder)))
    (own / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors"):
        load(ModelConfig(model=str(folder)))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_equals_peft(folder: Path, llm: LLM, reference: Reference, tmp_path: Path) -> None:
    """PEFT reads the same files to the same vectors, and what it writes is read."""
    for name in ADAPTERS:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(reference.base), folder / name).eval()
        by_peft = copy.copy(reference)
        by_peft.merged = {name: model}
        assert np.allclose(embed(llm, prompt_name=name), expected(by_peft, name), atol=1e-5), name
        model.save_pretrained(tmp_path / name)
    again = jina(tmp_path / "again", ())
    for name in ADAPTERS:
        (tmp_path / name).rename(again / name)
    with LLM(str(again)) as other:
        for name in ADAPTERS:
            assert np.allclose(embed(other, prompt_name=name), embed(llm, prompt_name=name), atol=1e-6), name
