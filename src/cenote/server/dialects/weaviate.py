"""The dialect of Weaviate's containers for transformers: `/vectors`, its `/rerank`, and its probes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, Field
from starlette.responses import Response

import cenote
from cenote.core import PoolingParams
from cenote.pipeline.options import TextOptions
from cenote.server.dialects import operations
from cenote.server.errors import text_error
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Many, Queued
from cenote.server.wire.pairs import RankingFields, rank
from cenote.server.wire.plain import encoded

if TYPE_CHECKING:
    from starlette.requests import Request

    from cenote.core import Output
    from cenote.pipeline.operations import Ranked
    from cenote.server.serving import Serving


class VectorConfig(BaseModel):
    """How a text is embedded. `pooling_strategy` has no effect: a model's pooling is its own."""

    task_type: str | None = Field(None, description="query or passage")


class VectorRequest(Queued):
    """Body of `POST /vectors`."""

    model: str | None = None
    text: str
    config: VectorConfig = VectorConfig(task_type=None)


class WeaviateRerankRequest(RankingFields):
    """Body of `POST /rerank` with `property`."""

    query: str
    documents: Many[str]


async def vectors(serving: Serving, request: Request, body: VectorRequest) -> Response:
    """The vector of a text, which is cut if it is too long."""
    service = serving.find(body.model)
    applied = service.renderer.prompts.choose(input_type=body.config.task_type)

    def encode(outputs: list[Output]) -> Response:
        vector = np.ascontiguousarray(outputs[0].data)
        return json_response({"text": body.text, "vector": vector, "dim": len(vector)})

    options = TextOptions(-1, prompt=applied)
    return await encoded(serving, request, service, body, [body.text], "embed", PoolingParams(), options, encode)


async def rerank(serving: Serving, request: Request, body: WeaviateRerankRequest) -> Response:
    """The score of each document, in the order of the request."""

    def form(head: dict[str, Any], ranked: list[Ranked], documents: list[str]) -> dict[str, Any]:
        in_order = sorted(ranked, key=lambda rank: rank.index)
        scores = [{"document": documents[rank.index], "score": rank.score} for rank in in_order]
        return {"query": body.query, "scores": scores}

    return await rank(serving, request, body, (body.query, body.documents), form)


async def live(serving: Serving, request: Request, body: None) -> Response:
    """204 as long as the process answers at all."""
    return Response(status_code=204)


async def ready(serving: Serving, request: Request, body: None) -> Response:
    """204 if the server is ready, else as `/readyz`."""
    answer = await operations.ready(serving, request, body)
    return Response(status_code=204) if answer.status_code == 200 else answer


async def meta(serving: Serving, request: Request, body: None) -> Response:
    """The first model."""
    info = serving.find(request.state.model).info
    return json_response(
        {"name": serving.name(request.state.model), "model_type": info.architecture, "version": cenote.__version__}
    )


DIALECT = Dialect(
    "Weaviate",
    (
        Route("/vectors", vectors, VectorRequest, purpose="embed"),
        Route(
            "/rerank", rerank, WeaviateRerankRequest, is_described=False, marks=frozenset({"property"}), purpose="score"
        ),
        Route("/.well-known/live", live, method="GET", is_open=True),
        Route("/.well-known/ready", ready, method="GET", is_open=True),
        Route("/meta", meta, method="GET"),
    ),
    text_error,
    prefix="weaviate",
)
