"""Ollama's dialect: bodies as its clients and LangChain send them, and what these read of the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import cenote
from cenote.engine.fake import FakeEngine
from cenote.errors import Overloaded
from tests.conftest import CLASSIFIER, INFO, expected, floats

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from tests.conftest import Serve

CLS, SEP, ONE, HELLO = 101, 102, 2028, 7592
LONG = "one " * 90
EMBED: dict[str, Any] = {"model": "fake", "input": ["hello", "one"]}


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("fields", "ids", "params"),
    [
        ({}, [[CLS, HELLO, SEP], [CLS, ONE, SEP]], {}),
        ({"input": [LONG], "options": {"num_ctx": 5, "temperature": 0}}, [[CLS, *[ONE] * 3, SEP]], {}),
        ({"input": [LONG], "options": {"num_ctx": 2048}}, [[CLS, *[ONE] * 62, SEP]], {}),
        ({"input": "hello", "options": {"num_ctx": 9}, "keep_alive": "5m"}, [[CLS, HELLO, SEP]], {}),
        (
            {"input": "hello", "options": {"num_ctx": None, "stop": None}},
            [[CLS, HELLO, SEP]],
            {},
        ),  # LangChain
        ({"input": "hello", "model": "fake:latest", "truncate": None}, [[CLS, HELLO, SEP]], {}),
        ({"input": "hello", "dimensions": 4}, [[CLS, HELLO, SEP]], {"dimensions": 4}),
        ({"input": [LONG]}, [[CLS, *[ONE] * 62, SEP]], {}),
    ],
    ids=str,
)
def test_embed(serve: Serve, fields: dict[str, Any], ids: list[list[int]], params: dict[str, Any]) -> None:
    answer = post(serve(info=replace(INFO, matryoshka=(4, 8))), "/api/embed", EMBED | fields)
    assert list(answer) == ["model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"]
    assert floats(answer["embeddings"]) == [expected(of_text, **params) for of_text in ids]
    assert (answer["model"], answer["prompt_eval_count"]) == ("fake", sum(map(len, ids)))
    assert answer["total_duration"] > 0


def test_the_older_form(client: TestClient) -> None:
    answer = post(client, "/api/embeddings", {"model": "fake", "prompt": "hello"})
    assert {key: floats(value) for key, value in answer.items()} == {"embedding": expected([CLS, HELLO, SEP])}


def test_models(serve: Serve) -> None:
    client = serve.several(one=FakeEngine(INFO), two=FakeEngine(CLASSIFIER))
    cards = client.get("/api/tags").json()["models"]
    assert [(card["name"], card["model"]) for card in cards] == [("one", "one"), ("two", "two")]
    assert list(cards[0]) == ["name", "model", "modified_at", "size", "digest", "details"]
    shown = post(client, "/api/show", {"model": "two:latest"})
    assert shown == post(client, "/api/show", {"name": "two"})
    assert (shown["details"]["family"], shown["capabilities"]) == ("FakeModel", ["embedding"])
    assert shown["model_info"] == {
        "general.architecture": "FakeModel",
        "FakeModel.context_length": 64,
        "FakeModel.embedding_length": 8,
    }
    assert client.get("/api/version").json() == {"version": cenote.__version__}


REFUSED: dict[str, tuple[Any, int, str]] = {
    "no input": ({"model": "fake"}, 400, "'loc': ('body', 'input')"),
    "wrong type": (EMBED | {"input": 5}, 400, "validation error"),
    "unknown model": (EMBED | {"model": "other:latest"}, 404, "The model `other` does not exist."),
    "not to be cut": (EMBED | {"input": LONG, "truncate": False}, 400, "maximum context length is 64 tokens"),
}


@pytest.mark.parametrize(("body", "status", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(client: TestClient, body: Any, status: int, words: str) -> None:
    answer = client.post("/api/embed", json=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]


def test_a_wrong_key_and_overload(serve: Serve) -> None:
    answer = serve(api_key=["secret"]).post("/api/embed", json=EMBED)
    assert (answer.status_code, answer.json()) == (401, {"error": "missing or wrong API key"})
    answer = serve(FakeEngine(INFO, failures=[Overloaded("full")])).post("/api/embed", json=EMBED)
    assert (answer.status_code, answer.json()) == (429, {"error": "full"})
