"""Traces by OpenTelemetry: a span for each request, and spans inside for its stages.

Stages are measured in any case, for the metrics (`cenote.metrics.timed`), and the engine notes the times of a request
on its future; both go into the request's `Trip`. Its spans are made from these times when it is answered, so that no
context crosses threads or processes. Nothing of OpenTelemetry is imported without an endpoint.

The SDK's variables have their effect: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_*,
OTEL_EXPORTER_OTLP_HEADERS and so on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

import cenote
from cenote import metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cenote.server.gate import Gate

log = logging.getLogger(__name__)

PATH = "/v1/traces"
"""Path of a collector whose address has none."""
PATIENCE = 5.0
"""Seconds that the end of the server waits for the last spans to be sent."""
LONGEST = 1024
"""Characters of an attribute."""
NANOSECONDS = 1_000_000_000


def traced(app: Gate, endpoint: str | None) -> ASGIApp:
    """Return an application whose requests are traced; without an endpoint `app` itself."""
    return app if endpoint is None else Tracing(app, provider(endpoint))


def provider(endpoint: str) -> TracerProvider:
    """Return a provider whose spans go to a collector, from a thread of its own. Spans beyond its queue are dropped."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH
    name = os.environ.get("OTEL_SERVICE_NAME", "cenote")
    resource = Resource.create({"service.name": name, "service.version": cenote.__version__})
    provider = TracerProvider(
        resource=resource,
        shutdown_on_exit=False,
        span_limits=SpanLimits(max_span_attribute_length=LONGEST),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
    log.info("traces go to %s", url)
    return provider


class _Status:
    """The status of an answer that passes; 500 until it is known."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.code = 500

    async def __call__(self, message: Message) -> None:
        """Send a message of the answer."""
        if message["type"] == "http.response.start":
            self.code = message["status"]
        await self._send(message)


class Tracing:
    """ASGI middleware that makes the spans of each request, except those about health and load.

    Args:
        app: the application, which says which requests count.
        provider: of spans; shut down when the application ends.
    """

    def __init__(self, app: Gate, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._provider = provider
        self._tracer = provider.get_tracer("cenote", cenote.__version__)
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] != "http" or not self._app.counts(scope):
            await self._app(scope, receive, send)
        else:
            await self._follow(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application until it ends, then send the last spans."""
        try:
            await self._app(scope, receive, send)
        finally:
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        """Send the spans that wait; a collector that does not answer is not waited for."""
        ending = threading.Thread(target=self._provider.shutdown, name="cenote-traces", daemon=True)
        ending.start()
        ending.join(PATIENCE)
        if ending.is_alive():
            log.warning("the last traces could not be sent within %g s", PATIENCE)

    async def _follow(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and make its spans."""
        trip, status = metrics.Trip(), _Status(send)
        token = metrics.trip.set(trip)
        began = time.monotonic()
        try:
            await self._app(scope, receive, status)
        finally:
            metrics.trip.reset(token)
            try:
                self._record(scope, trip, status.code, began, time.monotonic())
            except Exception:  # a defect here must not fail a request that is answered
                log.exception("a request could not be traced")

    def _record(self, scope: Scope, trip: metrics.Trip, status: int, began: float, ended: float) -> None:
        """Make the spans of a request that is answered."""
        from opentelemetry import trace

        offset = time.time_ns() - round(time.monotonic() * NANOSECONDS)

        def at(seconds: float) -> int:
            return offset + round(min(max(seconds, began), ended) * NANOSECONDS)

        route = scope.get("route_path", "other")
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            self._propagator.extract(Headers(scope=scope)),
            trace.SpanKind.SERVER,
            _attributes(scope, trip, status, route),
            start_time=at(began),
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        if span.is_recording():
            context = trace.set_span_in_context(span)
            for stage in [*trip.stages]:
                part = self._tracer.start_span(stage.name, context, start_time=at(stage.began))
                part.end(at(stage.ended))
        span.end(at(ended))


def _attributes(scope: Scope, trip: metrics.Trip, status: int, route: str) -> dict[str, Any]:
    """Return the attributes of a request's span, by OpenTelemetry's names where it has some."""
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": status,
    }
    if status >= 500:
        attributes["error.type"] = str(status)
    request_id = scope["state"].get("request_id")
    if request_id:
        attributes["http.request.header.x-request-id"] = [request_id]
    if trip.model:
        attributes |= {
            "gen_ai.request.model": trip.model,
            "gen_ai.usage.input_tokens": trip.tokens,
            "cenote.sequences": trip.sequences,
        }
    return attributes
