"""The table of routes: shared paths, prefixes of dialects and of models, and the model of a request that names none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from cenote.config import ServerConfig
from cenote.core import ModelInfo
from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.app import DIALECTS, build
from cenote.server.errors import Fault
from cenote.server.routes import Dialect, Route
from cenote.server.table import Table, collisions
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Body, Many
from tests.conftest import CLASSIFIER, CROSS_ENCODER, INFO

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from transformers import PreTrainedTokenizerBase

    from cenote.server.serving import Serving

NAMES = ("lab/embedder", "lab/embedder/large", "classifier", "reranker")
INFOS = (INFO, replace(INFO, dimension=8), CLASSIFIER, CROSS_ENCODER)


class Texts(Body):
    """A body that says whose it is."""

    model: str | None = None
    texts: Many[str] | None = None
    documents: Many[str] | None = None


def _dialect(name: str, *routes: Route) -> Dialect:
    def error(fault: Fault) -> dict[str, Any]:
        return {name: fault.message}

    return Dialect(name, routes, error, prefix=name)


def _route(name: str, path: str, **fields: Any) -> Route:
    async def handler(serving: Serving, request: Request, body: Texts | None) -> Response:
        """The dialect, the model of the path and that of the body."""
        return json_response({"from": name, "path": request.state.model, "body": body and body.model})

    return Route(path, handler, **fields)


PLAIN = _dialect(
    "plain",
    _route("plain", "/rank", body=Texts),
    _route("plain", "/", method="GET"),
    _route("plain", "/v1/cards/{model}", method="GET"),
    _route("plain", "/deployments/{model}/rank", body=Texts),
    _route("plain", "/score", body=Texts, purpose="score"),
    _route("plain", "/classes", body=Texts, purpose="classify"),
    _route("plain", "/sparse", body=Texts, purpose="sparse"),
)
MARKED = _dialect("marked", _route("marked", "/rank", body=Texts, marks=frozenset({"texts"})))


@pytest.fixture
def client(tokenizer: PreTrainedTokenizerBase) -> TestClient:
    """A server of four models with two small dialects."""

    def service(name: str, info: ModelInfo) -> Service:
        return Service(FakeEngine(info), Renderer(tokenizer, info), (name,))

    services = [service(name, info) for name, info in zip(NAMES, INFOS, strict=True)]
    return TestClient(build(services, ServerConfig(), [PLAIN, MARKED]))


def _post(client: TestClient, path: str, body: Any) -> Any:
    return client.post(path, json=body).json()


@pytest.mark.parametrize(
    ("path", "body", "dialect"),
    [
        ("/rank", {"documents": ["a"]}, "plain"),
        ("/rank", {"texts": ["a"]}, "marked"),
        ("/rank", {}, "plain"),
        ("/marked/rank", {"documents": ["a"]}, "marked"),
        ("/plain/rank", {"texts": ["a"]}, "plain"),
    ],
)
def test_the_prefix_decides_and_then_the_keys(client: TestClient, path: str, body: Any, dialect: str) -> None:
    assert _post(client, path, body)["from"] == dialect
    assert list(_post(client, path, {**body, next(iter(body), "texts"): 5})) == [dialect if body else "marked"]


def test_a_prefix_is_the_dialect_of_all_errors(client: TestClient) -> None:
    assert client.get("/marked/none").json() == {"marked": "Not Found"}
    assert client.get("/marked/rank").json() == {"marked": "Method Not Allowed"}
    assert client.post("/marked/rank", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post("/marked/score", json={"texts": 5}).json().keys() == {"marked"}, "which it has from another"


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/models/reranker/rank", "reranker"),
        ("/models/lab/embedder/rank", "lab/embedder"),
        ("/models/lab/embedder/large/rank", "lab/embedder/large"),
        ("/models/lab%2Fembedder%2Flarge/rank/", "lab/embedder/large"),
        ("/marked/models/reranker/rank", "reranker"),
        ("/models/reranker/marked/rank", "reranker"),
        ("/deployments/lab/embedder/rank", "lab/embedder"),
    ],
)
def test_a_model_in_the_path(client: TestClient, path: str, model: str) -> None:
    answer = _post(client, path, {"model": "whatever", "texts": ["a"]})
    assert (answer["path"], answer["body"]) == (model, model), "which the path has the last word on"


def test_a_model_alone_in_the_path(client: TestClient) -> None:
    assert client.get("/models/lab/embedder").json() == {"from": "plain", "path": "lab/embedder", "body": None}
    assert client.get("/v1/cards/no/such").json()["path"] == "no/such"
    assert client.get("/v1/cards").status_code == 404
    assert client.post("/models/other/rank", json={}).json()["body"] == "other", "which a route does not find"
    assert client.get("/models/other/rank").status_code == 405


@pytest.mark.parametrize(
    ("path", "model"), [("/score", "reranker"), ("/classes", "classifier"), ("/sparse", NAMES[0]), ("/rank", None)]
)
def test_a_request_without_a_model_gets_one_that_is_made_for_it(
    client: TestClient, path: str, model: str | None
) -> None:
    assert _post(client, path, {})["body"] == model
    assert _post(client, path, {"model": "classifier"})["body"] == "classifier"


@pytest.mark.parametrize("prefix", ["/marked", "/models/reranker"])
def test_prefixes_are_not_repeated_without_end(client: TestClient, prefix: str) -> None:
    assert client.post(f"{prefix * 3000}/rank", json={"texts": ["a"]}).status_code == 404


def test_two_routes_need_marks() -> None:
    again = _dialect("again", _route("again", "/rank", body=Texts))
    with pytest.raises(ValueError, match="two dialects have the route POST /rank; the second is again"):
        Table([PLAIN, MARKED, again], ())
    assert set(collisions(Table([PLAIN, MARKED], ()).routes)) == {("POST", "/rank")}


def test_routes_are_counted_without_names_of_models(client: TestClient) -> None:
    _post(client, "/models/lab/embedder/deployments/reranker/rank", {})
    text = TestClient(build([], ServerConfig(), DIALECTS)).get("/metrics").text
    assert 'route="/deployments/{model}/rank"' in text
    assert "lab/embedder/deployments" not in text


def test_any_name_reaches_the_first_model(tokenizer: PreTrainedTokenizerBase) -> None:
    service = Service(FakeEngine(INFO), Renderer(tokenizer, INFO), ("fake",))
    body = {"model": "text-embedding-3-small", "input": "a"}
    refused = TestClient(build([service], ServerConfig())).post("/v1/embeddings", json=body)
    assert (refused.status_code, refused.json()["message"]) == (
        404,
        "The model `text-embedding-3-small` does not exist.",
    )
    answer = TestClient(build([service], ServerConfig(any_model_name=True))).post("/v1/embeddings", json=body)
    assert (answer.status_code, answer.json()["model"]) == (200, "text-embedding-3-small")


@pytest.mark.parametrize(
    ("method", "path", "place", "name"),
    [
        ("POST", "/models/other/embed", "/embed", "other"),
        ("POST", "/models/owner/other/embed", "/embed", "owner/other"),
        ("POST", "/models/other", "/", "other"),
        ("POST", "/models/other/tei/rerank", "/rerank", "other"),
        ("POST", "/tei/models/other/rerank", "/rerank", "other"),
        ("GET", "/models/other", "/v1/models/{model}", "other"),
        ("GET", "/models/owner/other", "/v1/models/{model}", "owner/other"),
        ("GET", "/models/lab/other/health", None, None),  # which looks no model up
        ("POST", "/models/a/b/c/embed", None, None),
        ("POST", "/models/fake/none", None, None),  # a model that is there
        ("POST", "/models/fake/owner/embed", None, None),
        ("POST", "/models/other/v2/models/fake/infer", None, None),  # two names
        ("POST", "/models/" + "a/" * 30_000, None, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_name_before_a_route_that_no_model_has(method: str, path: str, place: str | None, name: str | None) -> None:
    match = Table(DIALECTS, ["fake"]).match(method, path)
    assert (match and match.path, match and match.model) == (place, name)


def test_a_name_in_the_path_reaches_the_first_model_where_any_does(tokenizer: PreTrainedTokenizerBase) -> None:
    service = Service(FakeEngine(INFO), Renderer(tokenizer, INFO), ("fake",))
    client = TestClient(build([service], ServerConfig(any_model_name=True)))
    answer = client.post("/models/other/embed", json={"inputs": "a"})
    assert (answer.status_code, answer.json()) == (200, client.post("/embed", json={"inputs": "a"}).json())
