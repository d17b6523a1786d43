"""Routes for operators: health, load, version and metrics."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

import cenote
from cenote import metrics
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response

if TYPE_CHECKING:
    from starlette.requests import Request

    from cenote.server.serving import Serving


async def health(serving: Serving, request: Request, body: None) -> Response:
    """200 if every model's last forward succeeded, or a new one does; else 503 with the reason."""
    well = await asyncio.gather(*(probe.healthy() for probe in serving.probes))
    if all(well):
        return Response()
    return Response(serving.fault or "the last forward failed, and a new one does", 503, media_type="text/plain")


async def live(serving: Serving, request: Request, body: None) -> Response:
    """200 as long as the process answers at all."""
    return Response(status_code=200)


async def ready(serving: Serving, request: Request, body: None) -> Response:
    """As `/health`, and 503 from the moment on at which the server begins to shut down."""
    if serving.is_ending:
        return Response(status_code=503)
    return await health(serving, request, body)


async def version(serving: Serving, request: Request, body: None) -> Response:
    """Version of Cenote."""
    return json_response({"version": cenote.__version__})


async def load(serving: Serving, request: Request, body: None) -> Response:
    """Requests being computed."""
    return json_response({"server_load": serving.running})


async def prometheus(serving: Serving, request: Request, body: None) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(generate_latest(metrics.REGISTRY), media_type=CONTENT_TYPE_LATEST)


DIALECT = Dialect(
    "Operations",
    (
        Route("/health", health, method="GET", aliases=("/ping",), is_open=True),
        Route("/ping", health, is_described=False, is_open=True),
        Route("/livez", live, method="GET", is_open=True),
        Route("/readyz", ready, method="GET", is_open=True),
        Route("/version", version, method="GET"),
        Route("/load", load, method="GET"),
        Route("/metrics", prometheus, method="GET"),
    ),
)
