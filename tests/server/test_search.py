"""Prompts, sparse embeddings and several kinds from one forward, over HTTP and from Python."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.errors import BadRequest
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import checkpoints

TEXTS = ["The quick brown fox", "hello, my name is the lazy dog", "a"]
PROMPTS = {"query": "represent the sentence: ", "passage": "the "}
EXAMPLE = Path(__file__).parents[2] / "examples" / "search.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("search")
    made = {name: checkpoints.bert(root / name) for name in ("prompted", "bare")}
    checkpoints.write_modules(made["prompted"], checkpoints.pooling("mean"), settings={"prompts": PROMPTS})
    made["splade"] = checkpoints.classifier(root / "splade", head="ForMaskedLM")
    made["m3"] = checkpoints.bert(root / "m3")
    generator = torch.Generator().manual_seed(3)
    for file, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", 16)):
        weight = torch.randn(width, checkpoints.HIDDEN, generator=generator)
        torch.save({"weight": weight, "bias": torch.randn(width, generator=generator)}, made["m3"] / file)
    return made


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[TestClient]:
    services = [
        Service.open(
            ModelConfig(model=str(folder), served_model_name=(name,), convert="sparse" if name == "splade" else "auto"),
            EngineConfig(),
        )
        for name, folder in folders.items()
    ]
    with TestClient(build(services, ServerConfig())) as client:
        yield client


@pytest.fixture(scope="module")
def m3(folders: dict[str, Path]) -> Iterator[LLM]:
    with LLM(str(folders["m3"])) as llm:
        yield llm


def post(client: TestClient, route: str = "/v1/embeddings", **body: Any) -> Any:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def embedding(client: TestClient, **body: Any) -> list[float]:
    found: list[float] = post(client, model="prompted", **body)["data"][0]["embedding"]
    return found


@pytest.mark.parametrize(
    ("asked", "text", "name"),
    [
        ({"prompt_name": "query"}, PROMPTS["query"], "query"),
        ({"input_type": "query"}, PROMPTS["query"], "query"),
        ({"input_type": "search_query"}, PROMPTS["query"], "query"),
        ({"task": "retrieval.passage"}, PROMPTS["passage"], "passage"),
        ({"input_type": "document"}, PROMPTS["passage"], "passage"),
        ({"prompt": "name: "}, "name: ", None),
    ],
    ids=str,
)
def test_prompts(client: TestClient, asked: dict[str, str], text: str, name: str | None) -> None:
    answer = post(client, model="prompted", input=TEXTS[0], **asked)
    wanted = embedding(client, input=text + TEXTS[0])
    assert np.allclose(answer["data"][0]["embedding"], wanted, atol=1e-6)
    assert not np.allclose(wanted, embedding(client, input=TEXTS[0]), atol=1e-2)
    assert answer["usage"]["prompt_tokens_details"] == {"prompt_name": name, "prompt": text}


def test_no_prompt_no_details(client: TestClient) -> None:
    assert post(client, model="prompted", input=TEXTS[0])["usage"]["prompt_tokens_details"] is None


@pytest.mark.parametrize(
    ("model", "asked", "message", "param"),
    [
        ("prompted", {"prompt_name": "topic"}, "unknown prompt_name 'topic'. Supported values: passage, query", None),
        ("prompted", {"input_type": "poem"}, "Unsupported input_type 'poem'. Supported values: passage, query", None),
        (
            "bare",
            {"input_type": "poem"},
            "Unsupported input_type 'poem'. This model does not define any input_type task instructions.",
            None,
        ),
        (
            "prompted",
            {"input_type": "query", "prompt": "x"},
            "only one of prompt and input_type can be given",
            "prompt",
        ),
        (
            "prompted",
            {"prompt_name": "query", "prompt": ""},
            "only one of prompt and prompt_name can be given",
            "prompt",
        ),
        ("prompted", {"prompt_name": "", "input_type": "query"}, "only one of prompt_name and input_type", None),
        ("splade", {"top_k": 3, "task": "embed"}, "Task 'embed' only supports", "top_k"),
        (
            "splade",
            {"encoding_format": "base64"},
            "sparse embeddings and several kinds at once have only the encoding_format 'float', got 'base64'",
            "encoding_format",
        ),
        ("bare", {"embedding_types": ["sparse"]}, "Unsupported task: 'sparse' Supported tasks:", "task"),
        ("bare", {"embedding_types": ["dense", "sparse"]}, "Unsupported task: 'sparse' Supported tasks:", "task"),
    ],
    ids=str,
)
def test_refused(client: TestClient, model: str, asked: dict[str, Any], message: str, param: str | None) -> None:
    answer = client.post("/v1/embeddings", json={"model": model, "input": "a", **asked})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert answer.json()["error"]["param"] == (param or next(iter(asked)))


def test_score_puts_each_sides_prompt_before_it(client: TestClient) -> None:
    score = post(client, "/score", model="prompted", queries=TEXTS[0], documents=TEXTS[1])["data"][0]["score"]
    query, document = (
        np.array(embedding(client, input=t, prompt_name=n)) for t, n in zip(TEXTS, PROMPTS, strict=False)
    )
    assert score == pytest.approx(query @ document / np.linalg.norm(query) / np.linalg.norm(document), abs=1e-5)


def test_sparse(client: TestClient, folders: dict[str, Path]) -> None:
    found = post(client, model="splade", input=TEXTS, return_tokens=True)["data"]
    with LLM(str(folders["splade"]), convert="sparse") as llm:
        wanted = llm.embed_sparse(TEXTS, use_tqdm=False)
        dense = llm.embed(TEXTS, use_tqdm=False)
        for entry, own, whole in zip(found, wanted, dense, strict=True):
            assert entry["embedding"]["indices"] == own.outputs.indices
            assert entry["embedding"]["tokens"] == own.outputs.tokens
            assert np.allclose(entry["embedding"]["values"], own.outputs.values, atol=1e-6)
            vector = np.array(whole.outputs.embedding)
            assert np.flatnonzero(vector).tolist() == own.outputs.indices
            assert np.allclose(vector[own.outputs.indices], own.outputs.values, atol=1e-6)
        first, second = (dict(zip(o.outputs.indices, o.outputs.values, strict=True)) for o in wanted[:2])
        product = sum(weight * second.get(token, 0.0) for token, weight in first.items())
        assert float(llm.similarity(wanted[:1], wanted[1:])[0, 0]) == pytest.approx(product, rel=1e-5)
        assert llm.score(TEXTS[0], TEXTS[1], use_tqdm=False)[0].outputs.score == pytest.approx(product, rel=1e-5)


@pytest.mark.parametrize("route", ["/v1/embeddings", "/pooling"])
def test_top_k_keeps_the_largest(client: TestClient, route: str) -> None:
    field = "embedding" if route == "/v1/embeddings" else "data"
    whole, few = (
        post(client, route, model="splade", input=TEXTS[1], task="sparse", **more)["data"][0][field]
        for more in ({}, {"top_k": 5})
    )
    order = np.argsort(whole["values"])[::-1][:5]
    assert few["indices"] == sorted(whole["indices"][i] for i in order)
    assert "tokens" not in few


def test_all_kinds_of_one_forward(client: TestClient) -> None:
    kinds = ["dense", "sparse", "colbert"]
    together = post(client, model="m3", input=TEXTS, embedding_types=kinds)["data"]
    for kind in kinds:
        alone = post(client, model="m3", input=TEXTS, embedding_types=[kind])["data"]
        for one, all_of_it in zip(alone, together, strict=True):
            own, other = one["embedding"], all_of_it["embedding"][kind]
            if kind == "sparse":
                assert own["indices"] == other["indices"]
                own, other = own["values"], other["values"]
            assert np.allclose(own, other, atol=1e-6)
    assert list(together[0]["embedding"]) == kinds
    assert post(client, model="m3", input="a")["data"][0]["embedding"][0] == pytest.approx(
        post(client, model="m3", input="a", task="embed")["data"][0]["embedding"][0]
    ), "without a word the embedding is the dense one"


def test_several_tasks_from_python(m3: LLM) -> None:
    tasks = ["embed", "sparse", "token_embed"]
    (found,) = m3.encode(TEXTS[0], pooling_task=tasks, use_tqdm=False)
    parts = {"embed": found.outputs, **found.outputs.others}
    for task in tasks:
        (alone,) = m3.encode(TEXTS[0], pooling_task=task, use_tqdm=False)
        assert torch.allclose(parts[task].data, alone.outputs.data, atol=1e-6)
        assert not alone.outputs.others
    with pytest.raises(BadRequest, match="Unsupported task: 'classify'"):
        m3.encode(TEXTS[0], pooling_task=["embed", "classify"], use_tqdm=False)


def test_similarity(m3: LLM) -> None:
    dense = m3.embed(TEXTS, use_tqdm=False)
    vectors = torch.tensor([o.outputs.embedding for o in dense])
    assert torch.allclose(m3.similarity(dense, dense[:2]), vectors @ vectors[:2].T, atol=1e-5)
    tokens = m3.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
    wanted = [[(a.outputs.data @ b.outputs.data.T).amax(1).sum() for b in tokens] for a in tokens]
    assert torch.allclose(m3.similarity(tokens, tokens), torch.tensor(wanted), atol=1e-4)
    assert m3.similarity([], dense).shape == (0, 3)
    with pytest.raises(BadRequest, match="embeddings are compared, got str"):
        m3.similarity(["a"], ["b"])  # type: ignore[list-item]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("search_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["search_example"] = module
    spec.loader.exec_module(module)
    return module


def test_the_example_finds(example: ModuleType, folders: dict[str, Path]) -> None:
    found = example.documents(60)
    assert len({document.text for document in found}) > 50
    index = example.Index(
        [document.text for document in found],
        LLM(auto_truncate=True),
        LLM(str(folders["splade"]), convert="sparse", auto_truncate=True),
    )
    place = 17
    scores = index.scores(found[place].text.splitlines()[0])
    assert list(scores) == ["dense", "late interaction", "sparse"]
    for name in ("dense", "late interaction"):
        assert found[int(scores[name].argmax())].text.splitlines()[0] == found[place].text.splitlines()[0]
    fused = example.fused({"a": np.array([3.0, 1.0, 2.0]), "b": np.array([1.0, 2.0, 3.0])})
    assert fused.tolist() == pytest.approx([1 / 61 + 1 / 63, 1 / 63 + 1 / 62, 1 / 62 + 1 / 61])
