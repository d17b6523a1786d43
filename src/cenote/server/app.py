"""The web application: dialects, operations routes, error handlers and the gate around them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import cenote
from cenote import metrics
from cenote.server import faults
from cenote.server.dialects import cohere, entities, fastdeploy, openai, pooling, scoring
from cenote.server.direct import Direct, handlers
from cenote.server.encoding import json_response
from cenote.server.gate import Gate, UnderWay
from cenote.server.serving import Serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cenote.config import ServerConfig
    from cenote.service import Service

DIALECTS = (openai, cohere, pooling, scoring, entities, fastdeploy)


def build(services: list[Service], config: ServerConfig) -> FastAPI:
    """Return the application that serves `services`; shutting it down finishes what they accepted.

    `app.state.under_way` has its requests.
    """
    serving = Serving(services, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(serving.close)

    docs = {} if not config.disable_fastapi_docs else {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(
        title="Cenote",
        version=cenote.__version__,
        description="An inference engine for pooling models.",
        lifespan=lifespan,
        root_path=config.root_path,
        **docs,  # type: ignore[arg-type]
    )
    routers = [*(dialect.router(serving) for dialect in DIALECTS), _operations(serving)]
    for router in routers:
        app.include_router(router)
    faults.install(app)
    app.add_middleware(Direct, handlers=handlers(routers), serving=serving)
    app.state.under_way = UnderWay()
    app.add_middleware(Gate, config=config, under_way=app.state.under_way)
    return app


def _operations(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["Operations"])

    @routes.get("/health")
    @routes.get("/ping")
    @routes.post("/ping", include_in_schema=False)
    async def health() -> Response:
        """200 if every model's last forward succeeded, or a new one does; else 503."""
        well = await asyncio.gather(*(asyncio.to_thread(service.engine.healthy) for service in serving.services))
        return Response(status_code=200 if all(well) else 503)

    @routes.get("/version")
    async def version() -> Response:
        """Version of Cenote."""
        return json_response({"version": cenote.__version__})

    @routes.get("/load")
    async def load() -> Response:
        """Requests being computed."""
        return json_response({"server_load": serving.running})

    @routes.get("/metrics")
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.REGISTRY), media_type=CONTENT_TYPE_LATEST)

    return routes
