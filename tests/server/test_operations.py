"""Running a server: health that tells the truth, load, metrics, models, docs, the API key, and a full queue."""

from __future__ import annotations

import html
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import cenote
from cenote.config import ServerConfig
from cenote.engine.engine import LocalEngine
from cenote.engine.fake import FakeEngine, fake_vector
from cenote.models.model import Part, Pending
from cenote.server import pages
from cenote.server.app import build
from tests import PATIENCE
from tests.conftest import INFO, expected, floats

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Sequence as Seq

    from httpx import Response
    from starlette.testclient import TestClient

    from cenote.core import ModelInfo, Output, Sequence
    from tests.conftest import Serve

ROUTE = "/v1/embeddings"
POISON = 666
PROBES = (
    *("/health", "/livez", "/readyz", "/ping", "/", "/v1/health/live", "/v1/health/ready"),
    *("/.well-known/live", "/.well-known/ready", "/v2/health/live", "/v2/health/ready"),
)
OPEN = {("POST", "/ping")} | {(method, path) for method in ("GET", "HEAD") for path in PROBES}


@dataclass
class Model:
    """A model for the local engine. Raises what `failures` holds, waits while `gate` is shut, and gives NaN for
    sequences that contain `POISON`."""

    info: ModelInfo = INFO
    failures: list[Exception] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.gate.set()

    def launch(self, sequences: Seq[Sequence]) -> Pending:
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        if self.failures:
            raise self.failures.pop(0)
        rows = [torch.from_numpy(fake_vector(s, INFO.dimension)) for s in sequences]
        rows = [row * float("nan") if POISON in s.ids else row for row, s in zip(rows, sequences, strict=True)]
        part = Part("embed", [*range(len(rows))], torch.stack(rows), lengths=None, indices=None)
        return Pending(sequences, [part], torch.device("cpu"))


class Announces:
    """Of an engine: tells when it has accepted a request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accepted = threading.Semaphore(0)

    def submit(self, *args: Any, **kwargs: Any) -> Future[list[Output]]:
        future: Future[list[Output]] = super().submit(*args, **kwargs)  # type: ignore[misc]
        self.accepted.release()
        return future


class Watched(Announces, LocalEngine):
    """The local engine, watched."""


class WatchedFake(Announces, FakeEngine):
    """The fake engine, watched."""


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def post(client: TestClient, given: Any) -> Response:
    return client.post(ROUTE, json={"input": given})


def check(answer: Response, *ids: list[int]) -> None:
    """The answer is 200 and has the vectors of `ids`."""
    assert answer.status_code == 200, answer.text
    assert [floats(entry["embedding"]) for entry in answer.json()["data"]] == [expected(i) for i in ids]


def metrics(client: TestClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def growth(before: Mapping[Any, float], after: Mapping[Any, float], name: str, **labels: str) -> float:
    key = (name, frozenset(labels.items()))
    return after.get(key, 0) - before.get(key, 0)


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")])
@pytest.mark.parametrize("well", [True, False])
def test_health_is_the_engines(serve: Serve, method: str, path: str, well: bool) -> None:
    answer = serve(FakeEngine(INFO, is_healthy=well)).request(method, path)
    assert answer.status_code == (200 if well else 503)
    assert answer.text == ("" if well else "the last forward failed, and a new one does")


def test_a_failed_forward_fails_its_requests_only_and_health_says_so(serve: Serve) -> None:
    model = Model(failures=[RuntimeError("boom"), RuntimeError("boom again")])
    client = serve(Watched(model))
    assert client.get("/health").status_code == 200
    failed = post(client, [5])
    assert failed.status_code == 500
    assert failed.json()["error"] == {
        "message": "the forward pass failed: RuntimeError; the engine's log has the details",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert client.get("/health").status_code == 503, "the health check's own forward failed too"
    assert client.get("/health").status_code == 200, "the health check's own forward succeeded"
    check(post(client, [5]), [5])


def test_a_request_that_succeeds_makes_the_server_healthy(serve: Serve) -> None:
    model = Model(failures=[RuntimeError("boom")])
    client = serve(Watched(model))
    assert post(client, [5]).status_code == 500
    check(post(client, [6]), [6])
    model.failures.append(RuntimeError("a health check that runs a forward would meet this"))
    assert client.get("/health").status_code == 200


def test_requests_beside_a_failing_batch_are_answered(serve: Serve, threads: ThreadPoolExecutor) -> None:
    model = Model(failures=[RuntimeError("boom")])
    engine = Watched(model)
    client = serve(engine)
    model.gate.clear()
    failing = threads.submit(post, client, [5])
    assert model.begun.acquire(timeout=PATIENCE)
    waiting = threads.submit(post, client, [[6], [7, 8]])
    for _ in range(2):
        assert engine.accepted.acquire(timeout=PATIENCE)
    model.gate.set()
    assert failing.result(PATIENCE).status_code == 500
    check(waiting.result(PATIENCE), [6], [7, 8])


def test_nan_fails_one_request_of_its_batch(serve: Serve, threads: ThreadPoolExecutor) -> None:
    model = Model()
    engine = Watched(model)
    client = serve(engine)
    model.gate.clear()
    first = threads.submit(post, client, [5])
    assert model.begun.acquire(timeout=PATIENCE)
    poisoned = threads.submit(post, client, [[6], [POISON, 7]])
    beside = threads.submit(post, client, [8, 9])
    for _ in range(3):
        assert engine.accepted.acquire(timeout=PATIENCE)
    before = metrics(client)
    model.gate.set()
    check(first.result(PATIENCE), [5])
    check(beside.result(PATIENCE), [8, 9])
    error = poisoned.result(PATIENCE).json()["error"]
    assert error["code"] == poisoned.result().status_code == 500
    assert error["message"].startswith("the model gave values that are not finite (NaN or infinity)")
    after = metrics(client)
    assert growth(before, after, "cenote_batch_sequences_count") == 2, "the three shared two batches"
    assert client.get("/health").status_code == 200


def test_a_full_queue_is_429_and_says_when_to_come_back(serve: Serve, threads: ThreadPoolExecutor) -> None:
    model = Model()
    engine = Watched(model, max_queued=3)
    client = serve(engine)
    model.gate.clear()
    running = threads.submit(post, client, [5])
    assert model.begun.acquire(timeout=PATIENCE)
    queued = threads.submit(post, client, [[6], [7]])
    for _ in range(2):
        assert engine.accepted.acquire(timeout=PATIENCE)
    before = metrics(client)
    assert before["cenote_queued_sequences", frozenset()] == 2
    assert before["cenote_queued_tokens", frozenset()] == 2
    refused = post(client, [[8], [9]])
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"] == {
        "message": "the queue is full: 2 inputs wait, at most 3 may, and this request brings 2; try again later",
        "type": "RateLimitError",
        "param": None,
        "code": 429,
    }
    fits = threads.submit(post, client, [10])
    assert engine.accepted.acquire(timeout=PATIENCE)
    model.gate.set()
    check(running.result(PATIENCE), [5])
    check(queued.result(PATIENCE), [6], [7])
    check(fits.result(PATIENCE), [10])
    after = metrics(client)
    assert growth(before, after, "cenote_requests_total", route=ROUTE, status="429") == 1
    assert after["cenote_queued_sequences", frozenset()] == 0


def test_a_refusal_before_the_route_is_counted_under_it(serve: Serve) -> None:
    client = serve(api_key=("secret",), max_body_bytes=100)
    client.headers["Authorization"] = "Bearer secret"
    before = metrics(client)
    for key, content, status in (("wrong", b"{}", 401), ("secret", b" " * 200, 413)):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        assert client.post(ROUTE, content=content, headers=headers).status_code == status
    after = metrics(client)
    for status in ("401", "413"):
        assert growth(before, after, "cenote_requests_total", route=ROUTE, status=status) == 1
        assert growth(before, after, "cenote_requests_total", route="other", status=status) == 0


def test_an_empty_queue_takes_a_request_of_any_size(serve: Serve) -> None:
    ids = [[i] for i in range(5, 15)]
    check(post(serve(Watched(Model(), max_queued=3)), ids), *ids)


def test_load_counts_requests_in_flight(serve: Serve, threads: ThreadPoolExecutor) -> None:
    engine = WatchedFake(INFO, held=True)
    client = serve(engine)
    assert client.get("/load").json() == {"server_load": 0}
    held = [threads.submit(post, client, [i]) for i in (5, 6)]
    for _ in held:
        assert engine.accepted.acquire(timeout=PATIENCE)
    assert client.get("/load").json() == {"server_load": 2}
    assert metrics(client)["cenote_running_requests", frozenset()] == 2
    engine.release()
    for answer, token in zip(held, (5, 6), strict=True):
        check(answer.result(PATIENCE), [token])
    assert client.get("/load").json() == {"server_load": 0}
    assert metrics(client)["cenote_running_requests", frozenset()] == 0


def test_metrics_count_what_happened(serve: Serve) -> None:
    client = serve(Watched(Model()))
    before = metrics(client)
    check(post(client, [[5, 6, 7], [8]]), [5, 6, 7], [8])
    assert post(client, []).status_code == 400
    assert client.get("/v1/models").status_code == 200
    after = metrics(client)
    for name, labels, amount in (
        ("cenote_requests_total", {"route": ROUTE, "status": "200"}, 1),
        ("cenote_requests_total", {"route": ROUTE, "status": "400"}, 1),
        ("cenote_requests_total", {"route": "/v1/models", "status": "200"}, 1),
        ("cenote_request_seconds_count", {"route": ROUTE}, 2),
        ("cenote_sequences_total", {"outcome": "done"}, 2),
        ("cenote_tokens_total", {}, 4),
        ("cenote_batch_tokens_sum", {}, 4),
        ("cenote_batch_tokens_count", {}, 1),
        ("cenote_batch_sequences_sum", {}, 2),
        ("cenote_stage_seconds_count", {"stage": "render"}, 1),
        ("cenote_stage_seconds_count", {"stage": "queue"}, 1),
        ("cenote_stage_seconds_count", {"stage": "forward"}, 1),
    ):
        assert growth(before, after, name, **labels) == amount, (name, labels)
    assert after["cenote_tokens_per_second", frozenset()] > 0


def test_watching_is_not_counted(client: TestClient) -> None:
    before = metrics(client)
    paths = ("/health", "/ping", "/load", "/version", "/metrics")
    for path in (*paths, "/metrics/", "/vllm/load", "/models/fake/metrics"):
        assert client.get(path).status_code == 200
    after = metrics(client)
    assert {k: v for k, v in after.items() if k[0] == "cenote_requests_total"} == {
        k: v for k, v in before.items() if k[0] == "cenote_requests_total"
    }


def test_metrics_are_in_the_text_format(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")


def test_version(client: TestClient) -> None:
    assert client.get("/version").json() == {"version": cenote.__version__}


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
def test_models_lists_a_card_per_name(serve: Serve, path: str) -> None:
    client = serve(info=INFO.reported(source="owner/model"), names=("first", "second"))
    answer = client.get(path).json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["first", "second"]
    for card in answer["data"]:
        assert (card["object"], card["root"], card["max_model_len"]) == ("model", "owner/model", 64)
        assert card["permission"][0]["object"] == "model_permission"


DOCS = ("/docs", "/redoc", "/openapi.json")


def test_docs(client: TestClient) -> None:
    for path in DOCS:
        assert client.get(path).status_code == 200
    schema = client.get("/openapi.json").json()
    assert {ROUTE, "/pooling", "/tokenize", "/detokenize", "/v1/models", "/health"} <= set(schema["paths"])
    fields = schema["components"]["schemas"]["EmbeddingRequest"]["properties"]
    assert fields["embed_dtype"]["enum"] == ["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]


def test_the_page_of_the_api_needs_no_internet(client: TestClient) -> None:
    """It has every described route and each field of its body, and names nothing that a browser would load or run."""
    answer = client.get("/docs")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert client.get("/redoc").text == answer.text
    assert re.findall(r"<(?:script|link|img|iframe|object)|@import|url\(|\son\w+=", answer.text) == []
    description = client.get("/openapi.json").json()
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            assert f"<b>{method.upper()}</b> <code>{html.escape(path)}</code> " in answer.text
            assert html.escape(operation["description"]) in answer.text
    for name, schema in description["components"]["schemas"].items():
        table = answer.text.partition(f'<details id="{name}">')[2].partition("</details>")[0]
        assert re.findall(r"<tr><td><code>(.*?)</code>", table) == [*schema.get("properties", {})]
    anchors = set(re.findall(r'href="#(\w+)"', answer.text))
    assert anchors
    assert anchors <= set(description["components"]["schemas"])


def test_the_page_of_the_api_tells_types_and_defaults() -> None:
    fields = {
        "a": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "description": "x < y"},
        "b": {"type": "array", "items": {"$ref": "#/components/schemas/Part"}},
        "c": {"enum": ["left", "right"], "type": "string", "default": "left"},
        "d": {},
    }
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/Body"}}}
    operation = {"tags": ["t"], "summary": "s", "description": "", "requestBody": {"content": body}}
    shown = pages.page(
        {
            "info": {"title": "T", "version": "1", "description": "<d>"},
            "paths": {"/p": {"post": operation}},
            "components": {"schemas": {"Body": {"properties": fields, "required": ["b"]}, "Part": {"type": "string"}}},
        },
        "/openapi.json",
    )
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", shown)]
    assert rows[:4] == [
        ["<code>a</code>", "integer | null", "None", "x &lt; y"],
        ["<code>b</code>", 'list[<a href="#Part">Part</a>]', "required", ""],
        ["<code>c</code>", "&#x27;left&#x27; | &#x27;right&#x27;", "left", ""],
        ["<code>d</code>", "any", "", ""],
    ]
    assert "<d>" not in shown
    assert "<p>string</p>" in shown


def test_docs_can_be_switched_off(serve: Serve) -> None:
    client = serve(disable_fastapi_docs=True)
    assert [client.get(path).status_code for path in DOCS] == [404] * 3
    check(post(client, [5]), [5])


ROUTES = sorted(build([], ServerConfig()).table.routes)


def test_the_list_of_routes_is_whole() -> None:
    assert {
        ("POST", ROUTE), ("POST", "/pooling"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/models"),
        ("GET", "/metrics"), ("GET", "/version"), ("GET", "/load"), ("GET", "/docs"), ("GET", "/health"),
    } <= set(ROUTES)  # fmt: skip


@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "},
                                  {"Authorization": "Basic secret"}, {"X-Api-Key": "wrong"}], ids=str)  # fmt: skip
def test_every_route_but_health_needs_the_key(serve: Serve, sent: dict[str, str]) -> None:
    engine = FakeEngine(INFO)
    client = serve(engine, api_key=("secret",))
    for method, path in [*ROUTES, ("GET", "/no/such/path"), ("POST", "/HEALTH"), ("GET", "/health/../metrics")]:
        answer = client.request(method, path, headers=sent)
        if (method, path) in OPEN:
            assert answer.status_code in (200, 204), (method, path)
        else:
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or "missing or wrong API key" in answer.text
    assert not engine.submitted


@pytest.mark.parametrize("sent", ["Bearer secret", "bearer secret", "secret", "Bearer other"])
def test_a_right_key_opens_every_route(serve: Serve, sent: str) -> None:
    client = serve(api_key=("secret", "other"))
    for method, path in ROUTES:
        assert client.request(method, path, headers={"Authorization": sent}).status_code != 401, (method, path)
    answer = client.post(ROUTE, json={"input": [5]}, headers={"Authorization": sent})
    check(answer, [5])


def test_without_a_key_nothing_is_asked(client: TestClient) -> None:
    check(client.post(ROUTE, json={"input": [5]}, headers={"Authorization": "Bearer whatever"}), [5])


def test_request_ids_are_sent_back(serve: Serve) -> None:
    client = serve(api_key=("secret",))
    key = {"Authorization": "secret"}
    for method, path, headers in (("GET", "/health", {}), ("GET", "/nowhere", key), ("GET", "/version", {})):
        answer = client.request(method, path, headers={**headers, "X-Request-Id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
    assert client.get("/health", headers={"X-Request-Id": b"m\xffne"}).headers["x-request-id"] == "m??ne"  # UTF-8
    made = [client.get("/health").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    refused = client.post(ROUTE, json={"input": [5]})
    assert (refused.status_code, len(refused.headers["x-request-id"])) == (401, 32)
    answer = client.post(ROUTE, json={"input": [5]}, headers=key)
    assert answer.json()["id"] == f"embd-{answer.headers['x-request-id']}"


def test_closing_the_application_closes_its_engine(serve: Serve) -> None:
    engine = FakeEngine(INFO)
    serve(engine)
    serve.stack.close()
    assert engine.closed
