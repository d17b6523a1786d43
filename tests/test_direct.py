"""The short way to a route answers as the framework's own way does, word for word."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import APIRouter, Request, Response

from cenote.errors import EngineFailed
from cenote.server import app as application
from cenote.server import direct
from tests.conftest import JSON

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from tests.conftest import Serve

VARYING = re.compile(r'"(id|created)":\s*("[^"]*"|\d+)')
ROUTES = ("/v1/embeddings", "/embeddings", "/pooling", "/classify", "/tokenize", "/detokenize", "/rerank", "/v2/embed")
BODIES = {
    "text": b'{"input": "one two"}',
    "several": b'{"input": ["one", "two"], "encoding_format": "base64"}',
    "prompt": b'{"prompt": "one two"}',
    "tokens": b'{"tokens": [5, 6]}',
    "query": b'{"query": "one", "documents": ["two", "three"]}',
    "texts": b'{"model": "fake", "texts": ["one"], "embedding_types": ["float", "int8"]}',
    "empty": b"",
    "null": b"null",
    "list": b"[1, 2]",
    "number": b"3",
    "no JSON": b'{"input": ',
    "not a number": b'{"input": [NaN]}',
    "twice": b'{"input": "one"} {"input": "two"}',
    "no UTF-8": b'{"input": "\xff\xfe"}',
    "UTF-16": '{"input": "one"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"input": "one"}',
    "lone surrogate": b'{"input": "\\ud800"}',
    "too deep": b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "fields twice": b'{"input": "one", "input": ["two", "three"]}',
    "numbers in other forms": b'{"input": [[5.0, 6]], "dimensions": "4", "truncate_prompt_tokens": true, "top_n": 1.0}',
    "large numbers": b'{"input": [18446744073709551616], "priority": 18446744073709551616, "texts": ["one"]}',
    "no finite number": b'{"input": "one", "priority": 1e400, "query": "one", "documents": ["two"], "top_n": Infinity}',
    "unknown fields": b'{"input": "one", "metadata": {"of": [1e400, NaN, 18446744073709551616]}}',
    "wrong types": b'{"input": {"a": 1}, "dimensions": "many", "encoding_format": 3}',
    "unknown model": b'{"input": "one", "model": "other"}',
    "refused": b'{"input": []}',
}


@pytest.fixture
def ways(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> tuple[TestClient, TestClient]:
    """The same application with the short way and without."""
    short = serve()
    monkeypatch.setattr(application, "handlers", lambda routers: {})
    return short, serve()


@pytest.mark.parametrize("name", BODIES)
def test_both_ways_give_the_same_answer(ways: tuple[TestClient, TestClient], name: str) -> None:
    statuses = set()
    for route in ROUTES:
        first, second = (way.post(route, content=BODIES[name], headers=JSON) for way in ways)
        assert first.status_code == second.status_code
        assert VARYING.sub("", first.text) == VARYING.sub("", second.text)
        assert {k: v for k, v in first.headers.items() if k != "content-length"} == {
            k: v for k, v in second.headers.items() if k != "content-length"
        }
        statuses.add(first.status_code)
    assert statuses <= {200, 400, 404}


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/embeddings"), ("PUT", "/pooling"), ("POST", "/v1/embeddings/"), ("POST", "/none")]
)
def test_what_is_no_such_route_goes_the_framework_s_way(
    ways: tuple[TestClient, TestClient], method: str, path: str
) -> None:
    first, second = (way.request(method, path, headers=JSON) for way in ways)
    assert (first.status_code, first.text) == (second.status_code, second.text)
    assert first.status_code in (400, 404, 405)


def test_every_route_with_a_body_has_a_short_way(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, direct.Handler]] = []
    find = direct.handlers
    monkeypatch.setattr(application, "handlers", lambda routers: (seen.append(find(routers)), seen[-1])[1])
    described = serve().get("/openapi.json").json()["paths"]
    posted = {path for path, methods in described.items() if "requestBody" in methods.get("post", {})}
    assert len(posted) > 8
    assert posted <= seen[0].keys()


def test_routes_that_take_something_else_have_none() -> None:
    routes = APIRouter()

    @routes.post("/{name}")
    async def named(body: dict[str, Any]) -> Response:
        return Response()

    @routes.post("/query")
    async def asked(body: dict[str, Any], limit: int) -> Response:
        return Response()

    @routes.api_route("/both", methods=["GET", "POST"])
    async def both(body: dict[str, Any], request: Request) -> Response:
        return Response()

    @routes.post("/thread")
    def waits(body: dict[str, Any]) -> Response:
        return Response()

    @routes.post("/short")
    async def short(body: dict[str, int]) -> Response:
        return Response(str(body["a"]))

    assert direct.handlers([routes]).keys() == {"/short"}


def test_requests_by_the_short_way_are_counted_by_route_and_failures_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cenote.engine.fake import FakeEngine

    engine = FakeEngine(failures=[EngineFailed("the device is gone")])
    client = serve(engine)
    counted = 'cenote_requests_total{route="/v1/embeddings",status="500"}'

    def count() -> float:
        lines = client.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(counted)), 0.0)

    before = count()
    answer = client.post("/v1/embeddings", json={"input": "one"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the device is gone")
    assert count() == before + 1
    assert "the device is gone" in caplog.text

    def broken(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine, "submit", broken)
    answer = client.post("/v1/embeddings", json={"input": "one"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Internal server error")


def test_a_root_path_leaves_the_routes_where_they_are(serve: Serve) -> None:
    client = serve(root_path="/models")
    for path in ("/v1/embeddings", "/models/v1/embeddings"):
        assert client.post(path, json={"input": "one"}).status_code == 200
