"""Errors name the parameter in the spelling that the request has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cenote.engine.fake import FakeEngine
from cenote.server.errors import as_sent
from tests.conftest import CROSS_ENCODER, INFO

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from tests.conftest import Serve


@pytest.fixture(scope="module")
def client(serve_all: Serve) -> TestClient:
    return serve_all.several(embedder=FakeEngine(INFO), reranker=FakeEngine(CROSS_ENCODER))


NO_TEXT = {"title": "x"}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/embeddings", {"input": "a", "dimensions": 4}, "dimensions"),
    ("/v1/embeddings", {"input": "a", "output_dimension": 4}, "output_dimension"),
    ("/v2/embed", {"texts": ["a"], "output_dimension": 4}, "output_dimension"),
    ("/v2/embed", {"texts": ["a"] * 3000}, "texts"),
    ("/v1/embeddings", {"input": ["a"] * 3000}, "input"),
    ("/v1/embeddings", {"input": [{"image": "https://host/page.png"}]}, "input"),
    ("/score", {"text_1": "a", "text_2": NO_TEXT}, "text_2"),
    ("/score", {"data_1": NO_TEXT, "data_2": "a"}, "data_1"),
    ("/score", {"queries": "a", "items": [NO_TEXT]}, "items"),
    ("/score", {"queries": NO_TEXT, "documents": "a"}, "queries"),
    ("/v1/embeddings", {"input": [{"image": "data:image/png;base64,AA"}]}, "input"),
    ("/v1/embeddings", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ("/rerank", {"query": NO_TEXT, "documents": ["a"]}, "query"),
    ("/rerank", {"query": "a", "documents": [NO_TEXT]}, "documents"),
]


@pytest.mark.parametrize(("path", "body", "param"), CASES, ids=str)
def test_params_of_errors(client: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


LISTS: list[tuple[str, dict[str, Any], str, Any]] = [
    ("/rerank", {"query": "a"}, "documents", "a"),
    ("/rerank", {"query": "a"}, "documents", {"text": "a"}),
    ("/score", {"text_1": "a"}, "text_2", "a"),
    ("/score", {"data_2": "a"}, "data_1", {"text": "a"}),
    ("/v1/embeddings", {}, "input", {"text": "a"}),
]
"""Routes, bodies, and a list that they lack with an element of it."""


@pytest.mark.parametrize("count", [2049, 5000])
@pytest.mark.parametrize(("path", "body", "param", "element"), LISTS, ids=str)
def test_a_list_that_is_too_long_is_told_by_its_name(
    client: TestClient, path: str, body: dict[str, Any], param: str, element: Any, count: int
) -> None:
    found = client.post(path, json={**body, param: [element] * count}).json()["error"]
    assert (found["code"], found["param"]) == (400, param)
    assert found["message"] == f"the request has {count} inputs; at most 2048 are allowed"


def test_a_conversation_has_messages(client: TestClient) -> None:
    for param in ("messages", "input"):
        body = {param: [{"role": "user", "content": "a"}] * 5000}
        found = client.post("/v1/embeddings", json=body).json()["error"]
        assert (found["code"], found["param"]) == (400, param)
        assert found["message"] == "the request has 5000 messages; at most 4096 are allowed"


def test_other_params_stay() -> None:
    assert as_sent(None, {"output_dimension": 4}) is None
    assert as_sent("dimensions", {}) == "dimensions"
    assert as_sent("dimensions", None) == "dimensions"
    assert as_sent("dimensions", {"output_dimension": 4, "dimensions": 4}) == "dimensions"
    assert as_sent("priority", {"output_dimension": 4}) == "priority"
