"""Infinity's dialect, which shares all of its paths with others: `raw_scores`, `modality` or its prefix tell it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from cenote.core import PoolingParams
from cenote.pipeline import operations
from cenote.server.dialects.openai import EmbeddingRequest, embeddings
from cenote.server.dialects.operations import health
from cenote.server.routes import Dialect, Route
from cenote.server.wire import answers
from cenote.server.wire.encoding import json_response, short_usage
from cenote.server.wire.fields import Many, Shared
from cenote.server.wire.pairs import RankingFields, rank

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Classes, Ranked
    from cenote.server.serving import Serving

UNNAMED = "default/not-specified"
"""Name that clients send if their caller gives none."""


def _named(model: str | None) -> str | None:
    return None if model == UNNAMED else model


class InfinityEmbeddingRequest(EmbeddingRequest):
    """Body of `POST /embeddings` with `modality`."""

    _model = field_validator("model")(_named)


class InfinityRerankRequest(RankingFields):
    """Body of `POST /rerank` with `raw_scores`."""

    query: str
    documents: Many[str]

    _model = field_validator("model")(_named)


class InfinityClassifyRequest(Shared):
    """Body of `POST /classify` with `raw_scores`."""

    input: Many[str]
    raw_scores: bool = False
    use_activation: bool | None = Field(None, description="false: as `raw_scores`")
    add_special_tokens: bool = True

    _model = field_validator("model")(_named)


async def rerank(serving: Serving, request: Request, body: InfinityRerankRequest) -> Response:
    """The documents by falling relevance to the query; `document` is a text on request, else null."""

    def form(head: dict[str, Any], ranked: list[Ranked], documents: list[str]) -> dict[str, Any]:
        shown: Any = documents if body.shows() else [None] * len(documents)
        results = [
            {"relevance_score": rank.score, "index": rank.index, "document": shown[rank.index]} for rank in ranked
        ]
        answer = {key: head[key] for key in ("model", "id")}
        return {
            "object": "rerank",
            "results": results,
            **answer,
            "usage": short_usage(head),
            "created": int(time.time()),
        }

    return await rank(serving, request, body, (body.query, body.documents), form)


async def classify(serving: Serving, request: Request, body: InfinityClassifyRequest) -> Response:
    """The classes of each text by falling score."""
    service = serving.find(body.model)
    serving.check_count(len(body.input))
    params = PoolingParams(use_activation=False if body.raw_scores else body.use_activation)
    options = body.text_options(add_special_tokens=body.add_special_tokens)

    def make() -> Job[Response]:
        job = operations.classify(service, body.input, params, options)

        def encode(classified: list[Classes]) -> Response:
            head = answers.head(serving, request, body, "classify", job.sequences)
            data = [answers.classes(service.info, classes.values) for classes in classified]
            return json_response({**head, "object": "classify", "data": data, "usage": short_usage(head)})

        return job.then(encode)

    return await serving.answer(request, service, body, make)


async def models(serving: Serving, request: Request, body: None) -> Response:
    """One card per name under which a model is served. What waits is counted for the whole server."""
    stats = {"queue_fraction": 0.0, "queue_absolute": 0, "results_pending": serving.running}
    cards = []
    for view in serving.models.views:
        card = {
            "stats": {**stats, "batch_size": view.info.report.batch_tokens},
            "object": "model",
            "owned_by": "infinity",
            "created": serving.started,
            "backend": "torch",
            "capabilities": answers.capabilities(view.info),
        }
        cards += [{"id": name, **card} for name in view.names]
    return json_response({"object": "list", "data": cards})


async def healthy(serving: Serving, request: Request, body: None) -> Response:
    """As `/health`, with the time as JSON."""
    answer = await health(serving, request, body)
    return json_response({"unix": time.time()}) if answer.status_code == 200 else answer


RAW = frozenset({"raw_scores"})
FORCED = frozenset({"infinity"})
"""Key that no body has: these routes are reached by the prefix alone."""
DIALECT = Dialect(
    "Infinity",
    (
        Route(
            "/v1/embeddings",
            embeddings,
            InfinityEmbeddingRequest,
            aliases=("/embeddings",),
            is_described=False,
            marks=frozenset({"modality"}),
            purpose="vectors",
        ),
        Route(
            "/rerank",
            rerank,
            InfinityRerankRequest,
            aliases=("/v1/rerank",),
            is_described=False,
            marks=RAW,
            foreign=frozenset({"texts"}),
            purpose="score",
        ),
        Route(
            "/classify",
            classify,
            InfinityClassifyRequest,
            aliases=("/v1/classify",),
            is_described=False,
            marks=RAW,
            purpose="classify",
        ),
        Route("/models", models, method="GET", aliases=("/v1/models",), is_described=False, marks=FORCED),
        Route("/health", healthy, method="GET", is_described=False, is_open=True, marks=FORCED),
    ),
    prefix="infinity",
)
