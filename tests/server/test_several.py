"""Several models on one server: requests choose by `model`, the first is the default, and each has its own limits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from tests.conftest import CLASSIFIER, CROSS_ENCODER, ENCODER, classes, error, expected, floats

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

NAMES = ("embedder", "classifier", "reranker")


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    """An embedder of short inputs, a classifier and a reranker."""
    infos = (replace(ENCODER, max_model_len=8), CLASSIFIER, replace(CROSS_ENCODER, vocab_size=10_000))
    named = {f"lab/{name}": info for name, info in zip(NAMES, infos, strict=True)}
    engines = [FakeEngine(replace(info, name=source).reported(source=source)) for source, info in named.items()]
    return dict(zip(NAMES, engines, strict=True))


@pytest.fixture
def client(serve: Serve, engines: dict[str, FakeEngine]) -> TestClient:
    return serve.several(**engines)


def post(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": [5]}),
    ("/pooling", {"input": [5]}),
    ("/score", {"queries": "one", "documents": "two", "score_type": "bi"}),
    ("/v2/rerank", {"query": "one", "documents": ["two"], "score_type": "bi"}),
]
"""Requests that every model answers, but that a classifier of three labels scores nothing."""

ANSWERED = [(name, path, body) for name in NAMES for path, body in BODIES if name != "classifier" or "input" in body]


@pytest.mark.parametrize(("name", "path", "body"), ANSWERED, ids=[f"{name} {path}" for name, path, _ in ANSWERED])
def test_a_request_reaches_the_model_that_it_names(
    client: TestClient, engines: dict[str, FakeEngine], name: str, path: str, body: dict[str, Any]
) -> None:
    assert post(client, path, model=name, **body)["model"] == name
    assert [own for own, engine in engines.items() if engine.submitted] == [name]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[path for path, _ in BODIES])
@pytest.mark.parametrize("name", [None, ""])
def test_a_model_that_is_made_for_the_route_is_the_default(
    client: TestClient, engines: dict[str, FakeEngine], name: str | None, path: str, body: dict[str, Any]
) -> None:
    default = "reranker" if "score_type" in body else "embedder"
    assert post(client, path, model=name, **body)["model"] == default
    assert [own for own, engine in engines.items() if engine.submitted] == [default]


@pytest.mark.parametrize(("path", "body"), [("/classify", {"input": "one"}), ("/predict", {"inputs": "one"})])
def test_a_cross_encoder_is_not_the_default_of_classes(
    serve: Serve, engines: dict[str, FakeEngine], path: str, body: dict[str, Any]
) -> None:
    client = serve.several(reranker=engines["reranker"], classifier=engines["classifier"])
    post(client, path, **body)
    assert [name for name, engine in engines.items() if engine.submitted] == ["classifier"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *BODIES,
        ("/classify", {"input": [5]}),
        ("/v1/token_classify", {"input": "one"}),
        ("/v1/reward", {"prompt_token_ids": [5]}),
        ("/v1/chat/reward", {"messages": [5]}),
        ("/tokenize", {"prompt": "one"}),
        ("/detokenize", {"tokens": [5]}),
        ("/pooling", {"data": {"any": 1}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["other", "lab/embedder", "Embedder"])
def test_a_model_that_is_not_there(
    client: TestClient, engines: dict[str, FakeEngine], path: str, body: dict[str, Any], name: str
) -> None:
    assert error(client, {"model": name, **body}, path) == {
        "message": f"The model `{name}` does not exist.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }
    assert not any(engine.submitted for engine in engines.values())


def test_every_model_does_what_it_can(client: TestClient) -> None:
    for name in NAMES:
        (entry,) = post(client, "/v1/embeddings", model=name, input=[5, 6])["data"]
        assert floats(entry["embedding"]) == expected([5, 6])
    (entry,) = post(client, "/classify", model="classifier", input=[5, 6])["data"]
    assert floats(entry["probs"]) == classes([5, 6])
    (entry,) = post(client, "/classify", model="reranker", input=[5, 6])["data"]
    assert floats(entry["probs"]) == classes([5, 6], CROSS_ENCODER)
    (entry,) = post(client, "/v1/reward", model="reranker", prompt_token_ids=[5])["data"]
    assert floats(entry["score"]) == classes([5], CROSS_ENCODER, use_activation=False)
    (entry,) = post(client, "/pooling", model="classifier", input=[5])["data"]
    assert floats(entry["data"]) == classes([5]), "the default task is the model's own"


def test_refusals_are_the_named_models_own(client: TestClient) -> None:
    found = error(client, {"model": NAMES[0], "input": [5]}, "/classify")
    assert found["message"].startswith("Unsupported task: 'classify' Supported tasks: ('embed', 'token_embed')")
    answer = client.post("/score", json={"model": "classifier", "queries": "a", "documents": "b"})
    assert (answer.status_code, answer.json()["detail"]) == (404, answer.json()["error"]["message"])
    assert "lab/classifier has 3 labels" in answer.json()["detail"]
    found = error(client, {"model": "reranker", "input": [10_000]}, "/classify")
    assert found["message"].startswith("Token id 10000 is out of vocabulary; lab/reranker takes ids from 0 to 9999. ")
    for name, limit in (("embedder", 8), ("classifier", 64)):
        found = error(client, {"model": name, "input": [5] * 65})
        assert found["message"].startswith(f"This model's maximum context length is {limit} tokens.")
        assert post(client, "/tokenize", model=name, prompt="one")["max_model_len"] == limit
    assert len(post(client, "/v1/embeddings", model="classifier", input=[5] * 64)["data"]) == 1


def test_all_models_are_listed(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(card["id"], card["root"], card["max_model_len"]) for card in listed["data"]] == [
        ("embedder", "lab/embedder", 8),
        ("classifier", "lab/classifier", 64),
        ("reranker", "lab/reranker", 64),
    ]


def test_a_model_may_have_several_names(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    engines = [FakeEngine(replace(CLASSIFIER, name=name)) for name in ("a", "b")]
    names = [("a", "first"), ("b", "second")]
    client = serve.of(*(Service(e, Renderer(tokenizer, e.info), own) for e, own in zip(engines, names, strict=True)))
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["a", "first", "b", "second"]
    assert post(client, "/classify", model="second", input=[5])["model"] == "second"
    assert [len(engine.submitted) for engine in engines] == [0, 1]


def test_health_is_that_of_all(client: TestClient, engines: dict[str, FakeEngine]) -> None:
    assert client.get("/health").status_code == 200
    for engine in engines.values():
        engine.is_healthy = False
        assert client.get("/health").status_code == client.get("/ping").status_code == 503
        engine.is_healthy = True
    assert client.get("/health").status_code == 200


def test_all_are_closed_at_the_end(serve: Serve, engines: dict[str, FakeEngine]) -> None:
    serve.several(**engines)
    assert not any(engine.closed for engine in engines.values())
    serve.stack.close()
    assert all(engine.closed for engine in engines.values())
