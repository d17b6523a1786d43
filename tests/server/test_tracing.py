"""Traces: the spans of real requests to the embedded model, as a collector on loopback gets them."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from pydantic import ValidationError
from starlette.testclient import TestClient

import cenote
from cenote import config
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.errors import EngineFailed
from cenote.models.hub import EMBEDDED_NAME
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests.conftest import INFO

if TYPE_CHECKING:
    from tests.conftest import Serve

ROUTE = "/v1/embeddings"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FOLLOWED, NOT_FOLLOWED = f"00-{TRACE}-{PARENT}-01", f"00-{'ab' * 16}-{PARENT}-00"


class Collector(ThreadingHTTPServer):
    """An OTLP listener.

    Attributes:
        paths: of the requests that came.
        resources: attributes of each sender.
        spans: that came, in order.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.paths: set[str] = set()
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Span] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for part in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(attributes(part.resource))
            for scope in part.scope_spans:
                self.spans += scope.spans


class Receiver(BaseHTTPRequestHandler):
    """Takes one export."""

    server: Collector

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/x-protobuf"
        assert self.headers.get("Content-Encoding", "identity") == "identity"
        self.server.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""


@contextmanager
def listening() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()


def attributes(holder: Any) -> dict[str, Any]:
    """Return the attributes of a span or a resource."""
    values = {entry.key: entry.value for entry in holder.attributes}
    return {key: getattr(value, str(value.WhichOneof("value"))) for key, value in values.items()}


@dataclass
class Traced:
    """A request's span, and those inside."""

    request: Span
    parts: list[Span]

    def part(self, name: str) -> Span:
        (span,) = [span for span in self.parts if span.name == name]
        return span


def by_request(spans: list[Span]) -> dict[str, Traced]:
    """Return the traces by the request ids of their requests."""
    requests = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    traces = {}
    for request in requests:
        (name,) = attributes(request)["http.request.header.x-request-id"].values
        parts = [span for span in spans if span.parent_span_id == request.span_id]
        traces[name.string_value] = Traced(request, parts)
    assert len(spans) == len(requests) + sum(len(trace.parts) for trace in traces.values())
    return traces


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """A collector with the spans of a server that has ended."""
    with listening() as collector:
        service = Service.open(ModelConfig(), EngineConfig(cache_size=1))
        options = ServerConfig(otlp_traces_endpoint=collector.url)
        with TestClient(build([service], options)) as client:
            send(client)
        yield collector


def send(client: TestClient) -> None:
    """Send the requests of this file, each by its id."""

    def post(name: str, body: Any, **headers: str) -> int:
        return client.post(ROUTE, json=body, headers={"X-Request-Id": name, **headers}).status_code

    assert post("alone", {"input": "natural pits"}) == 200
    assert post("followed", {"input": ["a", "of two"]}, traceparent=FOLLOWED) == 200
    assert post("not followed", {"input": "b"}, traceparent=NOT_FOLLOWED) == 200
    assert post("again", {"input": "natural pits"}) == 200
    assert post("large", {"input": ["many words " * 20] * 40}) == 200
    assert post("refused", {"input": [-1]}) == 400
    assert client.post("/v1/nothing", headers={"X-Request-Id": "nowhere"}).status_code == 404
    for path in ("/health", "/livez", "/metrics", "/load"):
        assert client.get(path, headers={"X-Request-Id": path}).status_code == 200


@pytest.fixture(scope="module")
def traces(collector: Collector) -> dict[str, Traced]:
    return by_request(collector.spans)


def test_each_request_has_a_trace_but_those_about_health(collector: Collector, traces: dict[str, Traced]) -> None:
    assert [*traces] == ["alone", "followed", "again", "large", "refused", "nowhere"]
    assert collector.paths == {"/v1/traces"}
    ours = {"service.name": "cenote", "service.version": cenote.__version__}
    assert all(ours.items() <= resource.items() for resource in collector.resources)


@pytest.mark.parametrize("name", ["alone", "followed", "large"])
def test_stages_are_spans_in_order_inside_the_request(traces: dict[str, Traced], name: str) -> None:
    trace = traces[name]
    assert {span.trace_id for span in trace.parts} == {trace.request.trace_id}
    stages = [trace.part(stage) for stage in ("render", "queue", "forward", "encode")]
    assert len(trace.parts) == len(stages)
    ends = [trace.request.start_time_unix_nano]
    for span in stages:
        ends += [span.start_time_unix_nano, span.end_time_unix_nano]
    ends.append(trace.request.end_time_unix_nano)
    assert ends == sorted(ends)
    assert trace.part("queue").end_time_unix_nano == trace.part("forward").start_time_unix_nano
    whole = trace.request.end_time_unix_nano - trace.request.start_time_unix_nano
    forward = trace.part("forward").end_time_unix_nano - trace.part("forward").start_time_unix_nano
    assert 0 < forward < whole


def test_attributes_of_a_request(traces: dict[str, Traced]) -> None:
    trace = traces["followed"]
    assert trace.request.name == f"POST {ROUTE}"
    found = attributes(trace.request)
    found.pop("http.request.header.x-request-id")
    assert found == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "gen_ai.request.model": EMBEDDED_NAME,
        "gen_ai.usage.input_tokens": 3 + 4,
        "cenote.sequences": 2,
    }


def test_the_traceparent_of_a_request_is_the_parent(traces: dict[str, Traced]) -> None:
    assert traces["followed"].request.trace_id.hex() == TRACE
    assert traces["followed"].request.parent_span_id.hex() == PARENT
    assert traces["alone"].request.parent_span_id == b""
    assert traces["alone"].request.trace_id != traces["again"].request.trace_id


def test_a_result_of_the_cache_has_no_forward(traces: dict[str, Traced]) -> None:
    assert {span.name for span in traces["again"].parts} == {"render", "encode"}


def test_a_refusal_has_its_status_and_is_no_error_of_the_server(traces: dict[str, Traced]) -> None:
    request = traces["refused"].request
    assert attributes(request)["http.response.status_code"] == 400
    assert request.status.code == Status.STATUS_CODE_UNSET
    assert "error.type" not in attributes(request)
    assert traces["nowhere"].request.name == "POST other"


def test_an_error_of_the_server_is_one_of_the_span(serve: Serve) -> None:
    with listening() as collector:
        engine = FakeEngine(INFO, failures=[EngineFailed("boom")])
        client = serve(engine, otlp_traces_endpoint=f"{collector.url}/any/path")
        assert client.post(ROUTE, json={"input": "a"}).status_code == 500
        serve.stack.close()
    (request,) = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert request.status.code == Status.STATUS_CODE_ERROR
    assert attributes(request)["error.type"] == "500"
    assert collector.paths == {"/any/path"}


def test_a_request_of_several_instances_has_the_tokens_of_all(serve: Serve) -> None:
    with listening() as collector:
        client = serve(otlp_traces_endpoint=collector.url)
        body = {"instances": [{"inputs": "deep water"}, {"inputs": ["water", "stones and water"]}]}
        assert client.post("/vertex", json=body).status_code == 200
        serve.stack.close()
    (request,) = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    found = attributes(request)
    assert (found["cenote.sequences"], found["gen_ai.usage.input_tokens"]) == (3, 4 + 3 + 5)


def test_requests_are_answered_without_a_collector(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.3")
    with listening() as collector:
        url = collector.url
    client = serve(otlp_traces_endpoint=url)
    for _ in range(3):
        assert client.post(ROUTE, json={"input": "a"}).status_code == 200
    serve.stack.close()
    loggers = {entry.name.partition(".")[0] for entry in caplog.records if entry.levelno >= logging.WARNING}
    assert loggers == {"opentelemetry"}


@pytest.mark.full
def test_without_an_endpoint_nothing_is_imported() -> None:
    program = """
import sys
from cenote.config import ServerConfig
from cenote.server.app import build
build([], ServerConfig())
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "grpc://collector:4317"])
def test_an_endpoint_is_an_address_of_http(url: str) -> None:
    with pytest.raises(ValidationError, match="an address begins with http:// or https://"):
        ServerConfig(otlp_traces_endpoint=url)


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.part"])
def test_missing_packages_are_told_at_start(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(config, "TRACING", (package,))
    with pytest.raises(ValidationError, match=r"pip install 'cenote\[otel\]'"):
        ServerConfig(otlp_traces_endpoint="http://127.0.0.1:4318")
