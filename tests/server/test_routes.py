"""The route table: every path leads to one handler, whatever a body is, and a dialect of somebody else's is a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel
from starlette.responses import Response
from starlette.testclient import TestClient

from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.errors import EngineFailed
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.app import DIALECTS, build
from cenote.server.errors import Fault
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Shared
from tests.conftest import INFO, JSON

if TYPE_CHECKING:
    from starlette.requests import Request
    from transformers import PreTrainedTokenizerBase

    from cenote.server.serving import Serving
    from tests.conftest import Serve

ROUTES = ("/v1/embeddings", "/embeddings", "/pooling", "/classify", "/tokenize", "/detokenize", "/rerank", "/v2/embed")
BODIES: dict[str, tuple[bytes, set[int], str]] = {
    "empty": (b"", {400}, "1 validation error:\n  {'type': 'missing', 'loc': ('body',)"),
    "null": (b"null", {400}, "Input should be a valid dictionary or object to extract fields from"),
    "list": (b"[1, 2]", {400}, "Input should be a valid dictionary or object to extract fields from"),
    "number": (b"3", {400}, "Input should be a valid dictionary or object to extract fields from"),
    "no JSON": (b'{"input": ', {400}, "JSON decode error: Expecting value"),
    "twice": (b'{"input": "one"} {"input": "two"}', {400}, "JSON decode error: Extra data"),
    "no UTF-8": (b'{"input": "\xff\xfe"}', {400}, "There was an error parsing the body"),
    "too deep": (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {400}, "There was an error parsing the body"),
    "wrong types": (b'{"input": {"a": 1}, "dimensions": "many", "encoding_format": 3}', {400}, ""),
    "unknown model": (b'{"input": "one", "prompt": "one", "model": "other"}', {400, 404}, ""),
}


@pytest.mark.parametrize(("body", "statuses", "words"), BODIES.values(), ids=BODIES)
def test_a_body_that_cannot_be_served(serve: Serve, body: bytes, statuses: set[int], words: str) -> None:
    client = serve()
    for route in ROUTES:
        answer = client.post(route, content=body, headers=JSON)
        assert answer.status_code in statuses
        assert words in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == answer.status_code


READ: dict[str, tuple[bytes, list[int]]] = {
    "UTF-16": ('{"input": "one"}'.encode("utf-16"), [101, 2028, 102]),
    "byte order mark": (b'\xef\xbb\xbf{"input": "one"}', [101, 2028, 102]),
    "fields twice": (b'{"input": "two", "input": "one"}', [101, 2028, 102]),
    "unknown fields": (b'{"input": "one", "metadata": {"of": [1e400, NaN, 18446744073709551616]}}', [101, 2028, 102]),
    "numbers in other forms": (b'{"input": [[5.0, 6]], "truncate_prompt_tokens": true}', [5]),
}


@pytest.mark.parametrize(("body", "ids"), READ.values(), ids=READ)
def test_a_body_that_python_s_json_would_take(serve: Serve, body: bytes, ids: list[int]) -> None:
    engine = FakeEngine(INFO)
    assert serve(engine).post("/v1/embeddings", content=body, headers=JSON).status_code == 200
    (sequence,) = engine.submitted
    assert list(sequence.ids) == ids


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/embeddings", 405, "POST"),
        ("PUT", "/health", 405, "GET, HEAD"),
        ("DELETE", "/ping", 405, "GET, HEAD, POST"),
        ("GET", "/none", 404, None),
        ("PUT", "/", 405, "GET, HEAD, POST"),
        ("GET", "/v1", 404, None),
    ],
)
def test_what_is_no_route(serve: Serve, method: str, path: str, status: int, allowed: str | None) -> None:
    answer = serve().request(method, path, headers=JSON)
    assert (answer.status_code, answer.headers.get("allow")) == (status, allowed)
    assert ("Not Found" if status == 404 else "Method Not Allowed") in answer.text


def test_a_closing_slash_is_the_same_route_and_sends_nobody_elsewhere(serve: Serve) -> None:
    answer = serve().post(
        "/v1/embeddings/", json={"input": "one"}, headers={"Host": "evil.example"}, follow_redirects=False
    )
    assert answer.status_code == 200


def test_head_is_answered_where_get_is(serve: Serve) -> None:
    client = serve()
    for path in ("/health", "/version", "/v1/models"):
        assert (client.head(path).status_code, client.head(path).content) == (200, b"")


def test_a_root_path_has_the_root_with_and_without_a_slash(serve: Serve) -> None:
    client = serve(root_path="/pre")
    for path in ("/", "/pre", "/pre/"):
        assert (client.get(path).status_code, client.get(path).content) == (200, b"")
    assert client.get("/prefix").status_code == 404


@pytest.mark.filterwarnings("error")
def test_a_root_path_leaves_the_routes_where_they_are(serve: Serve) -> None:
    client = serve(root_path="/models")
    for path in ("/v1/embeddings", "/models/v1/embeddings"):
        assert client.post(path, json={"input": "one"}).status_code == 200
    assert client.get("/models/openapi.json").json()["servers"] == [{"url": "/models"}]
    assert "/models/openapi.json" in client.get("/docs").text


def test_requests_are_counted_by_route_and_defects_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(INFO, failures=[EngineFailed("the device is gone")])
    client = serve(engine)
    counted = 'cenote_requests_total{route="/v1/embeddings",status="500"}'

    def count() -> float:
        lines = client.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(counted)), 0.0)

    before = count()
    answer = client.post("/v1/embeddings", json={"input": "one"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the device is gone")
    assert count() == before + 1
    assert "the device is gone" not in caplog.text, "the engine has told of it, and counts the next ones"

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine, "submit", broken)
    answer = client.post("/v1/embeddings", json={"input": "one"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Internal server error")
    assert "ZeroDivisionError: a bug" in caplog.text


class Shout(Shared):
    """Body of `POST /shout`."""

    text: str


async def shout(serving: Serving, request: Request, body: Shout) -> Response:
    """The text in capitals."""
    return json_response({"model": serving.name(body.model), "text": body.text.upper()})


def shouted(fault: Fault) -> dict[str, Any]:
    return {"oh_no": fault.message.upper(), "status": fault.status}


SHOUTED = Dialect("Shouted", (Route("/shout", shout, Shout, aliases=("/v1/shout",)),), shouted)


@pytest.fixture
def shouting(tokenizer: PreTrainedTokenizerBase) -> TestClient:
    service = Service(FakeEngine(INFO), Renderer(tokenizer, INFO), ("fake",))
    return TestClient(build([service], ServerConfig(), (*DIALECTS, SHOUTED)))


def test_a_dialect_brings_its_routes_its_bodies_and_its_errors(shouting: TestClient) -> None:
    for path in ("/shout", "/v1/shout"):
        assert shouting.post(path, json={"text": "one"}).json() == {"model": "fake", "text": "ONE"}
    answer = shouting.post("/shout", json={"text": "one", "normalize": True})
    assert answer.json() == {
        "oh_no": "PARAMETER `NORMALIZE` WAS REMOVED; USE `USE_ACTIVATION` INSTEAD.",
        "status": 400,
    }
    described = shouting.get("/openapi.json").json()
    operation = described["paths"]["/shout"]["post"]
    assert (operation["tags"], operation["description"]) == (["Shouted"], "The text in capitals.")
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"] == "#/components/schemas/Shout"
    assert described["components"]["schemas"]["Shout"]["properties"]["text"]["type"] == "string"


def test_two_dialects_cannot_have_one_route() -> None:
    with pytest.raises(ValueError, match="two dialects have the route POST /shout; the second is Again"):
        build([], ServerConfig(), (SHOUTED, Dialect("Again", (Route("/shout", shout, Shout),))))


def test_every_reference_of_the_description_leads_somewhere(serve: Serve) -> None:
    described = serve().get("/openapi.json").json()
    schemas = described["components"]["schemas"]
    text = json.dumps(described)
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert len(names) > 8
    assert names <= schemas.keys()
    bodies = [r.body for dialect in DIALECTS for r in dialect.routes if r.body is not None and r.is_described]
    assert {body.__name__ for body in bodies if issubclass(body, BaseModel)} <= names
