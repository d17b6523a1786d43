"""Weaviate, Mixedbread, llama.cpp, KServe and SageMaker: requests as their documents have them, and the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.rendering import Renderer
from tests.conftest import CLASSIFIER, CROSS_ENCODER, INFO, classes, expected, floats

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

CLS, SEP, ONE, HELLO = 101, 102, 2028, 7592
HELLO_VECTOR, ONE_VECTOR = expected([CLS, HELLO, SEP]), expected([CLS, ONE, SEP])
DOCUMENTS = ["three", "one", "deep water"]
LONG = "one " * 90


@pytest.fixture(scope="module")
def client(serve_all: Serve) -> TestClient:
    """An embedder, a reranker and a classifier."""
    infos = {"embedder": INFO, "reranker": CROSS_ENCODER, "lab/classifier": CLASSIFIER}
    return serve_all.several(**{name: FakeEngine(replace(info, name=name)) for name, info in infos.items()})


@pytest.fixture
def scores(tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """Scores of the documents."""
    return [classes(tokenizer("one", document)["input_ids"], CROSS_ENCODER)[0] for document in DOCUMENTS]


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_weaviate_vectors(client: TestClient) -> None:
    answer = post(client, "/vectors", {"text": "hello", "config": {"pooling_strategy": "masked_mean"}, "vector": None})
    assert (answer["text"], floats(answer["vector"]), answer["dim"]) == ("hello", HELLO_VECTOR, 8)
    cut = post(client, "/vectors", {"text": LONG})
    assert floats(cut["vector"]) == expected([CLS, *[ONE] * 62, SEP])


def test_weaviate_names_the_side(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizer, INFO, prompts=Prompts({"query": "one "}))
    client = serve.of(Service(FakeEngine(INFO), renderer, ("fake",)))
    answer = post(client, "/vectors", {"text": "hello", "config": {"task_type": "query"}})
    assert floats(answer["vector"]) == expected([CLS, ONE, HELLO, SEP])


def test_weaviate_rerank(client: TestClient, scores: list[float]) -> None:
    answer = post(client, "/rerank", {"query": "one", "documents": DOCUMENTS, "property": ""})
    pairs = zip(DOCUMENTS, scores, strict=True)
    assert answer == {"query": "one", "scores": [{"document": d, "score": pytest.approx(s)} for d, s in pairs]}


def test_weaviate_probes(client: TestClient, serve: Serve) -> None:
    assert [client.get(f"/.well-known/{name}").status_code for name in ("live", "ready")] == [204, 204]
    assert (client.get("/meta").json()["name"], client.get("/models/reranker/meta").json()["name"]) == (
        "embedder",
        "reranker",
    )
    ill = serve(FakeEngine(INFO, is_healthy=False))
    assert [ill.get(f"/.well-known/{name}").status_code for name in ("live", "ready")] == [204, 503]


@pytest.mark.parametrize(("fields", "kept"), [({}, 3), ({"top_k": 2, "return_input": True}, 2)])
def test_mixedbread(client: TestClient, scores: list[float], fields: dict[str, Any], kept: int) -> None:
    answer = post(client, "/v1/reranking", {"model": "reranker", "query": "one", "input": DOCUMENTS, **fields})
    best = sorted(range(3), key=lambda i: -scores[i])[:kept]
    shown = DOCUMENTS if "return_input" in fields else [None] * 3
    assert answer["data"] == [
        {"index": i, "score": pytest.approx(scores[i]), "input": shown[i], "object": "rank_result"} for i in best
    ]
    assert (answer["object"], answer["model"], answer["top_k"]) == ("list", "reranker", fields.get("top_k", 10))


def test_mixedbread_ranks_objects(client: TestClient, scores: list[float]) -> None:
    body = {"query": "one", "input": [{"title": d, "text": "x"} for d in DOCUMENTS], "rank_fields": ["title"]}
    data = post(client, "/v1/reranking", body)["data"]
    assert {entry["index"]: entry["score"] for entry in data} == {i: pytest.approx(s) for i, s in enumerate(scores)}


def test_llama_cpp_embedding(client: TestClient) -> None:
    assert floats(post(client, "/embedding", {"content": "hello"})["embedding"]) == HELLO_VECTOR
    raw = post(client, "/embedding", {"content": [CLS, HELLO, SEP], "embd_normalize": -1})
    assert floats(raw["embedding"]) == expected([CLS, HELLO, SEP], use_activation=False)
    several = post(client, "/embeddings", {"content": ["hello", "one"], "embd_normalize": 2})
    assert [(entry["index"], floats(entry["embedding"])) for entry in several] == [
        (0, [HELLO_VECTOR]),
        (1, [ONE_VECTOR]),
    ]
    assert client.post("/embedding", json={"content": "a", "embd_normalize": 0}).status_code == 400


def test_llama_cpp_tokenize(client: TestClient) -> None:
    assert post(client, "/tokenize", {"content": "hello one"}) == {"tokens": [HELLO, ONE]}
    body = {"content": "hello", "add_special": True, "with_pieces": True}
    assert post(client, "/tokenize", body)["tokens"] == [
        {"id": CLS, "piece": "[CLS]"},
        {"id": HELLO, "piece": "hello"},
        {"id": SEP, "piece": "[SEP]"},
    ]
    assert post(client, "/detokenize", {"tokens": [HELLO]})["content"] == "hello"
    assert post(client, "/tokenize", {"content": "[SEP]", "parse_special": True}) == {"tokens": [SEP]}
    assert client.post("/tokenize", json={"content": "[SEP]", "parse_special": False}).status_code == 400


@pytest.mark.parametrize("path", ["/reranking", "/v1/reranking"])
def test_llama_cpp_rerank(client: TestClient, scores: list[float], path: str) -> None:
    results = post(client, path, {"query": "one", "documents": DOCUMENTS, "top_n": 1})["results"]
    assert [(r["index"], r["relevance_score"]) for r in results] == [
        (int(np.argmax(scores)), pytest.approx(max(scores)))
    ]
    bare = post(client, path, {"query": "one", "texts": DOCUMENTS, "top_n": 1})
    assert bare == [{"index": int(np.argmax(scores)), "score": pytest.approx(max(scores))}]


INFER: dict[str, Any] = {
    "id": "7",
    "inputs": [{"name": "input_text", "shape": [2], "datatype": "BYTES", "data": ["hello", "one"]}],
}


@pytest.mark.parametrize("nested", [False, True])
def test_kserve_infer(client: TestClient, nested: bool) -> None:
    body = INFER
    if nested:
        tensor = INFER["inputs"][0] | {"shape": [2, 1], "data": [["hello"], ["one"]]}
        body = {"inputs": [tensor], "outputs": [{"name": "vectors"}]}
    answer = post(client, "/v2/models/embedder/infer", body)
    (output,) = answer.pop("outputs")
    assert answer == {"model_name": "embedder", "model_version": "1"} | ({} if nested else {"id": "7"})
    assert floats(output.pop("data")) == [*HELLO_VECTOR, *ONE_VECTOR]
    assert output == {"name": "vectors" if nested else "output", "datatype": "FP32", "shape": [2, 8]}


def test_kserve_classifies(client: TestClient) -> None:
    (output,) = post(client, "/v2/models/lab/classifier/infer", INFER)["outputs"]
    assert floats(output["data"]) == [*classes([CLS, HELLO, SEP]), *classes([CLS, ONE, SEP])]
    assert output["shape"] == [2, 3]


def test_kserve_describes(client: TestClient) -> None:
    assert client.get("/v2").json()["name"] == "cenote"
    model = client.get("/v2/models/lab/classifier").json()
    assert (model["name"], model["outputs"][0]["shape"]) == ("lab/classifier", [-1, 3])
    paths = ("health/live", "health/ready", "models/embedder/ready", "models/none/ready")
    assert [client.get(f"/v2/{path}").status_code for path in paths] == [200, 200, 200, 404]


REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "numbers": (
        "embedder",
        {"inputs": [INFER["inputs"][0] | {"datatype": "INT64"}]},
        400,
        "got 1 inputs, the first of datatype INT64; expected one of datatype BYTES",
    ),
    "two inputs": ("embedder", {"inputs": INFER["inputs"] * 2}, 400, "got 2 inputs"),
    "shape": (
        "embedder",
        {"inputs": [INFER["inputs"][0] | {"shape": [3]}]},
        400,
        "got 2 texts in an input of shape [3]",
    ),
    "huge shape": (
        "embedder",
        {"inputs": [INFER["inputs"][0] | {"shape": [2**62, 2**62]}]},
        400,
        f"got 2 texts in an input of shape [{2**62}, {2**62}]",
    ),
    "shape of larger numbers": ("embedder", {"inputs": [INFER["inputs"][0] | {"shape": [2**63]}]}, 400, "less_than"),
    "shape of many numbers": ("embedder", {"inputs": [INFER["inputs"][0] | {"shape": [1] * 9}]}, 400, "too_long"),
    "no inputs": ("embedder", {}, 400, "validation error"),
    "two outputs": (
        "embedder",
        INFER | {"outputs": [{"name": "a"}, {"name": "b"}]},
        400,
        "List should have at most 1 item after validation, not 2",
    ),
    "unknown model": ("none", INFER, 404, "The model `none` does not exist."),
}


@pytest.mark.parametrize(("name", "body", "status", "words"), REFUSED.values(), ids=REFUSED)
def test_kserve_refuses(client: TestClient, name: str, body: Any, status: int, words: str) -> None:
    answer = client.post(f"/v2/models/{name}/infer", json=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]


@pytest.mark.parametrize("data", [["a", "b", "c", {}], [["a"], ["b", "c", "d", {}]]], ids=["flat", "nested"])
def test_kserve_counts_texts_before_they_are_validated(serve: Serve, data: list[Any]) -> None:
    body = {"inputs": [INFER["inputs"][0] | {"data": data}]}
    answer = serve(max_client_batch_size=3).post("/v2/models/fake/infer", json=body)
    assert answer.json()["error"] == "the request has 4 inputs; at most 3 are allowed"


def test_kserve_refuses_a_model_of_tokens(serve: Serve) -> None:
    tokens = replace(INFO, tasks=("token_embed",), default_task="token_embed")
    answer = serve(info=tokens).post("/v2/models/fake/infer", json=INFER)
    assert (answer.status_code, answer.json()["error"].partition(";")[0]) == (
        400,
        "fake gives one matrix [T, D] per input",
    )


@pytest.mark.parametrize("names", [("queries", "documents"), ("data_1", "data_2"), ("text_1", "text_2")])
def test_sagemaker_scores(client: TestClient, names: tuple[str, str]) -> None:
    body = dict(zip(names, ("a", ["a", "b"]), strict=True))
    answer = client.post("/invocations", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == client.post("/score", json=body).json()["data"]


def test_sagemaker(client: TestClient, scores: list[float]) -> None:
    best = int(np.argmax(scores))
    assert floats(post(client, "/invocations", {"inputs": "hello"})) == [HELLO_VECTOR]
    assert floats(post(client, "/invocations", {"input": "hello"})["data"][0]["embedding"]) == HELLO_VECTOR
    assert post(client, "/invocations", {"query": "one", "texts": DOCUMENTS})[0]["index"] == best
    assert post(client, "/invocations", {"query": "one", "documents": DOCUMENTS})["results"][0]["index"] == best
    assert (
        "has no chat template"
        in client.post("/invocations", json={"messages": [{"role": "user", "content": "one"}]}).json()["error"][
            "message"
        ]
    )
