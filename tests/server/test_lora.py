"""Adapters that requests choose by the name of their model, on every route."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from starlette.testclient import TestClient

from cenote import LLM, LoRARequest
from cenote.adapters import LoraModule
from cenote.cli.flags import parse
from cenote.cli.serve import models_of, report
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.engine.host import Host
from cenote.errors import BadRequest, ConfigError
from cenote.models.passes.patches import Patches
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from cenote.server.serving import Serving
from cenote.settings import resolve
from tests import checkpoints
from tests.checkpoints import write_json

TEXTS = checkpoints.SHORT[:3]


def write_adapter(folder: Path, base: Path, seed: int, **config: Any) -> Path:
    """An adapter of the attention of a BERT model, in PEFT's file format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name in ("query", "value"):
            place = f"base_model.model.encoder.layer.{layer}.attention.self.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(4, checkpoints.HIDDEN, generator=generator) / 4
            tensors[f"{place}.lora_B.weight"] = torch.randn(checkpoints.HIDDEN, 4, generator=generator) / 2
    if "modules_to_save" in config:
        tensors["base_model.model.classifier.weight"] = torch.randn(3, checkpoints.HIDDEN, generator=generator)
        tensors["base_model.model.classifier.bias"] = torch.randn(3, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    write_json(folder / "adapter_config.json", {**settings, "base_model_name_or_path": str(base), **config})
    return folder


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The base with the adapter's change in its weights, added here in float64."""
    model = transformers.AutoModel.from_pretrained(base)
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, b in tensors.items():
        if key.endswith("lora_B.weight"):
            a = tensors[key.replace("lora_B", "lora_A")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            with torch.no_grad():
                model.get_submodule(path).weight.add_((2.0 * b.double() @ a.double()).float())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def together(folder: Path, *sources: Path) -> Path:
    """A folder with the files of several, as one that a model and its adapter share."""
    for source in sources:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    base = checkpoints.bert(root / "base")
    for seed, name in enumerate(("law", "water")):
        write_adapter(root / name, base, seed)
        merged(base, root / name, root / f"merged-{name}")
    return root


def opened(root: Path) -> Service:
    modules = [
        f"law={root / 'law'}",
        json.dumps({"name": "water", "path": str(root / "water"), "base_model_name": "b"}),
    ]
    options = ModelConfig.model_validate(
        {"model": str(root / "base"), "served_model_name": "b", "lora_modules": modules}
    )
    return Service.open(options, EngineConfig(cache_size=4))


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[Service]:
    service = opened(root)
    yield service
    service.engine.close()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build([service], ServerConfig())) as client:
        yield client


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, folder in {"b": "base", "law": "merged-law", "water": "merged-water"}.items():
        with LLM(str(root / folder)) as llm:
            found[name] = np.array([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])
    assert np.abs(found["b"] - found["law"]).max() > 0.02
    assert np.abs(found["water"] - found["law"]).max() > 0.02
    return found


def post(client: TestClient, route: str, **body: Any) -> Any:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


VECTORS = {
    "/v1/embeddings": ({"input": TEXTS}, lambda answer: [entry["embedding"] for entry in answer["data"]]),
    "/pooling": ({"input": TEXTS, "task": "embed"}, lambda answer: [entry["data"] for entry in answer["data"]]),
    "/v2/embed": (
        {"texts": TEXTS, "input_type": "search_document", "embedding_types": ["float"]},
        lambda answer: answer["embeddings"]["float"],
    ),
    "/v1/embed": ({"texts": TEXTS}, lambda answer: answer["embeddings"]),
}


@pytest.mark.parametrize("name", ["b", "law", "water"])
@pytest.mark.parametrize("route", VECTORS)
def test_vectors(client: TestClient, expected: dict[str, np.ndarray], route: str, name: str) -> None:
    body, read = VECTORS[route]
    answer = client.post(route, json={"model": name, **body})
    if route in ("/v2/embed", "/v1/embed") and answer.status_code == 400:  # sides, which this model has not
        answer = client.post(route, json={"model": name, **{k: v for k, v in body.items() if k != "input_type"}})
    assert answer.status_code == 200, answer.text
    assert np.abs(np.array(read(answer.json())) - expected[name]).max() < 1e-5
    assert answer.json().get("model", name) == name


@pytest.mark.parametrize("name", ["b", "law", "water"])
def test_scores(client: TestClient, expected: dict[str, np.ndarray], name: str) -> None:
    first, *others = expected[name]
    wanted = [float(first @ other) for other in others]
    answer = post(client, "/score", model=name, queries=TEXTS[0], documents=TEXTS[1:])
    assert np.abs(np.array([entry["score"] for entry in answer["data"]]) - wanted).max() < 1e-5
    answer = post(client, "/rerank", model=name, query=TEXTS[0], documents=TEXTS[1:])
    found = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    assert np.abs(np.array([found[0], found[1]]) - wanted).max() < 1e-5
    answer = post(client, "/v1/rerank", model=name, query=TEXTS[0], documents=TEXTS[1:], top_k=1)
    assert answer["data"][0]["index"] == int(np.argmax(wanted))


@pytest.mark.parametrize("fields", [{}, {"model": "b"}, {"model": "law"}], ids=str)
@pytest.mark.parametrize("path", ["law", ["law"] * 3], ids=str)
def test_beside_the_name_of_the_model(
    client: TestClient, expected: dict[str, np.ndarray], fields: dict[str, str], path: Any
) -> None:
    """As SGLang has it."""
    answer = post(client, "/v1/embeddings", input=TEXTS, lora_path=path, **fields)
    got = np.array([entry["embedding"] for entry in answer["data"]])
    assert np.abs(got - expected["law"]).max() < 1e-5
    assert answer["model"] == "law"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("war", "got the adapter 'war' in `lora_path`; expected one that the server was started with "
         "(--lora-modules): 'law', 'water'"),
        ("b", "got the adapter 'b' in `lora_path`"),
        (["law", None, "water"], "`lora_path` names several adapters"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_beside_the_name_of_the_model(client: TestClient, path: Any, message: str) -> None:
    refused = client.post("/v1/embeddings", json={"model": "b", "input": TEXTS, "lora_path": path})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(message)
    assert refused.json()["error"]["param"] == "lora_path"
    assert client.post("/v1/embeddings", json={"model": "b", "input": TEXTS, "lora_path": None}).status_code == 200


def test_models(client: TestClient, root: Path) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["b", "law", "water"]
    assert [card["parent"] for card in cards.values()] == [None, "b", "b"]
    assert cards["law"]["root"] == str(root / "law")
    answer = client.post("/v1/embeddings", json={"model": "war", "input": "a"})
    assert answer.status_code == 404


def test_any_name(service: Service) -> None:
    """Routes that answer to every name still tell adapters apart."""
    serving = Serving([service], ServerConfig())
    names = [serving.find(name, any_name=True).names for name in ("water", "b", "whatever", None)]
    assert names == [("water",), ("b",), ("b",), ("b",)]
    serving._pool.shutdown()


def test_entities(tmp_path: Path) -> None:
    base = checkpoints.classifier(tmp_path / "base", head="ForTokenClassification", num_labels=3)
    heads = {"task_type": "TOKEN_CLS", "modules_to_save": ["classifier"]}
    write_adapter(tmp_path / "law", base, 3, **heads)
    whole = together(tmp_path / "whole", base, tmp_path / "law")
    with LLM(str(whole)) as llm:
        (wanted,) = llm.token_classify(TEXTS[0], ignore_labels=(), use_tqdm=False)
    options = {"model": str(base), "served_model_name": "b", "lora_modules": f"law={tmp_path / 'law'}"}
    service = Service.open(ModelConfig.model_validate(options), EngineConfig())
    with TestClient(build([service], ServerConfig())) as client:
        found, alone = (
            post(client, "/v1/token_classify", model=name, input=TEXTS[0], ignore_labels=[])["data"][0]["entities"]
            for name in ("law", "b")
        )
    scores = np.array([entity["score"] for entity in found])
    assert np.abs(scores - [entity.score for entity in wanted.outputs]).max() < 1e-5
    assert np.abs(scores - [entity["score"] for entity in alone]).max() > 1e-3


def test_report(service: Service, root: Path) -> None:
    lines = report(service)
    assert f"adapter law: {root / 'law'}, by the name of the model" in lines
    assert not any(line.startswith("adapters: ") for line in lines)
    used = {entry.file for entry in service.info.report.used}
    assert {"law/adapter_config.json", "law/adapter_model.safetensors"} <= used


def test_tokenizes_under_the_name_of_an_adapter(client: TestClient) -> None:
    by_name = [post(client, "/tokenize", model=name, prompt=TEXTS[0])["tokens"] for name in ("b", "law")]
    assert by_name[0] == by_name[1]


def test_engine_in_another_process(root: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Its front knows the adapters by the engine's description."""
    service = opened(root)  # which its host closes
    assert service.facts is not None
    host = Host(service.engine, tmp_path / "engine.sock", service.facts.plain())
    try:
        front = Service.connect(str(tmp_path / "engine.sock"))
        with TestClient(build([front], ServerConfig())) as client:
            for name in ("law", "b"):
                answer = post(client, "/v1/embeddings", model=name, input=TEXTS)
                found = np.array([entry["embedding"] for entry in answer["data"]])
                assert np.abs(found - expected[name]).max() < 1e-5
    finally:
        host.close()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    base = checkpoints.classifier(root / "base", num_labels=3)
    heads = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    for seed, name in enumerate(("law", "water")):
        write_adapter(root / name, base, seed, **heads)
    return root


def test_heads(heads: Path) -> None:
    """Classes, scores of pairs and rewards come from the head of the adapter."""
    modules = [f"{name}={heads / name}" for name in ("law", "water")]
    options = ModelConfig.model_validate(
        {"model": str(heads / "base"), "served_model_name": "b", "lora_modules": modules}
    )
    service = Service.open(options, EngineConfig())
    with TestClient(build([service], ServerConfig())) as client:
        for name in ("law", "water"):
            folder = heads / f"merged-{name}"
            for source in (heads / "base", heads / name):
                folder.mkdir(exist_ok=True)
                for file in source.iterdir():
                    (folder / file.name).write_bytes(file.read_bytes())
            with LLM(str(folder)) as llm:  # the adapter is part of this one
                wanted = [output.outputs.probs for output in llm.classify(TEXTS, use_tqdm=False)]
            found = [entry["probs"] for entry in post(client, "/classify", model=name, input=TEXTS)["data"]]
            assert np.abs(np.array(found) - np.array(wanted)).max() < 1e-5
            alone = [entry["probs"] for entry in post(client, "/classify", model="b", input=TEXTS)["data"]]
            assert np.abs(np.array(found) - np.array(alone)).max() > 0.01


def test_pairs_of_a_cross_encoder(tmp_path: Path) -> None:
    base = checkpoints.classifier(tmp_path / "base", num_labels=1)
    write_adapter(tmp_path / "law", base, 3)
    whole = together(tmp_path / "whole", base, tmp_path / "law")
    with LLM(str(whole)) as llm:
        wanted = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)]
    with LLM(str(base), lora_modules={"name": "law", "path": str(tmp_path / "law")}) as llm:
        request = LoRARequest("law", 1, str(tmp_path / "law"))
        found = [o.outputs.score for o in llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False, lora_request=request)]
        alone = [o.outputs.score for o in llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)]
        ranked = llm.rerank(TEXTS[0], TEXTS[1:], use_tqdm=False, lora_request=request)
        with pytest.raises(BadRequest, match="one `LoRARequest` is for the whole call here, got a list"):
            llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False, lora_request=[request, None])  # type: ignore[arg-type]
    assert np.abs(np.array(found) - wanted).max() < 1e-5
    assert np.abs(np.array(found) - alone).max() > 1e-3
    assert sorted(rank.relevance_score for rank in ranked) == sorted(found)


def test_task_adapters_beside_them(root: Path, tmp_path: Path) -> None:
    """Under the name of an adapter, names of prompts choose no other adapter."""
    base = checkpoints.bert(tmp_path / "base")
    write_adapter(base / "topic", base, 7)
    options = {"model": str(base), "lora_modules": f"law={root / 'law'}", "prompts": {"topic": "a "}}
    service = Service.open(ModelConfig.model_validate(options), EngineConfig())
    with TestClient(build([service], ServerConfig())) as client:
        vectors = {
            name: post(client, "/v1/embeddings", model=name, input="b", prompt_name="topic") for name in (None, "law")
        }
        law = post(client, "/v1/embeddings", model="law", input="a b")
    adapters = [vectors[name]["usage"]["prompt_tokens_details"].get("adapters") for name in (None, "law")]
    assert adapters == [["topic"], None]
    found, wanted = (np.array(answer["data"][0]["embedding"]) for answer in (vectors["law"], law))
    assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a=x", (LoraModule("a", "x"),)),
        ("a=x,b=y=z", (LoraModule("a", "x"), LoraModule("b", "y=z"))),
        (
            ["a=x", '{"name": "b", "path": "y", "base_model_name": "m"}'],
            (LoraModule("a", "x"), LoraModule("b", "y", "m")),
        ),
        ('[{"name": "a", "path": "x"}]', (LoraModule("a", "x"),)),
        ([{"name": "a", "path": "x", "base_model_name": None}], (LoraModule("a", "x"),)),
    ],
    ids=str,
)
def test_spellings(value: Any, expected: tuple[LoraModule, ...]) -> None:
    assert ModelConfig.model_validate({"lora_modules": value}).lora_modules == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a", "got the name 'a' and the path '', expected name=path or JSON of both"),
        ("a=", "expected name=path or JSON of both"),
        ('{"name": "a"}', r"lora_modules\.0\.path: Field required"),
        ('{"name": "a", "path": "x", "rank": 4}', r"lora_modules\.0\.rank: Unexpected keyword argument"),
        (["a=x", "a=y"], "two adapters have the name 'a'"),
    ],
)
def test_refused_spellings(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"lora_modules": value}, (ModelConfig,))


def test_flags() -> None:
    """vLLM's, of which some have no effect here, and are said to have none."""
    argv = "serve m --enable-lora --lora-modules a=x b=y --max-loras 4 --max-lora-rank 64 --max-cpu-loras 8"
    configs, notes = models_of({name: value for name, value in parse(argv.split()).items() if name != "command"})
    assert configs[0][0].lora_modules == (LoraModule("a", "x"), LoraModule("b", "y"))
    assert configs[0][0].enable_lora
    assert {note.partition(" ")[0] for note in notes} == {"max_loras", "max_lora_rank", "max_cpu_loras"}


def test_several_models() -> None:
    """An adapter says which of them it changes."""
    modules = ['{"name": "a", "path": "x", "base_model_name": "two"}']
    configs, _ = models_of({"models": ["m", "n"], "served_model_name": ["one", "two"], "lora_modules": modules})
    assert [len(model.lora_modules) for model, *_ in configs] == [0, 1]
    with pytest.raises(ConfigError, match="an adapter changes one of one, two, got the base_model_name None"):
        models_of({"models": ["m", "n"], "served_model_name": ["one", "two"], "lora_modules": ["a=x"]})


def test_names(root: Path) -> None:
    def opened(**options: Any) -> None:
        Service.open(ModelConfig.model_validate({"model": str(root / "base"), **options}), EngineConfig())

    with pytest.raises(ConfigError, match="lora_modules has the name 'b', under which the model itself is served"):
        opened(served_model_name="b", lora_modules=f"b={root / 'law'}")
    with pytest.raises(ValueError, match="holds no adapter: there is no adapter_config.json"):
        opened(lora_modules=f"a={root / 'base'}")
    with pytest.raises(ValueError, match="there is no folder '/nowhere/x'"):
        opened(lora_modules="a=/nowhere/x")


def test_room_for_adapters_that_no_request_brings(root: Path) -> None:
    """A server fuses layers in spite of `enable_lora`, and says so; a caller that adds adapters finds them unfused."""
    options = ModelConfig(model=str(root / "base"), enable_lora=True)
    served, kept = Service.open(options, EngineConfig()), Service.open(options, EngineConfig(), adds_adapters=True)
    try:
        warning = "enable_lora has no effect without lora_modules: no request brings an adapter here"
        assert warning in served.info.report.warnings
        assert warning not in kept.info.report.warnings
        assert served.add_adapter is not None
        assert kept.add_adapter is not None
        with pytest.raises(BadRequest, match="without enable_lora"):
            served.add_adapter("law", str(root / "law"))
        kept.add_adapter("law", str(root / "law"))
    finally:
        served.engine.close()
        kept.engine.close()


@pytest.mark.parametrize(
    ("enable_lora", "adds_adapters", "count"), [(False, True, 4), (True, False, 4), (True, True, 21)], ids=str
)
def test_a_server_with_adapters_leaves_no_other_layers_unfused(
    root: Path, enable_lora: bool, adds_adapters: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked = Mock(wraps=Patches.hook)
    monkeypatch.setattr(Patches, "hook", lambda *args: hooked(*args))
    model = ModelConfig.model_validate(
        {"model": str(root / "base"), "lora_modules": f"law={root / 'law'}", "enable_lora": enable_lora}
    )
    Service.open(model, EngineConfig(), adds_adapters=adds_adapters).engine.close()
    assert hooked.call_count == count
