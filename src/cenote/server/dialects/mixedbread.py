"""Mixedbread's dialect: `/v1/reranking` with `input`. Its `/v1/embeddings` is OpenAI's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import short_usage
from cenote.server.wire.fields import Many
from cenote.server.wire.pairs import RankingFields, rank

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.operations import Ranked
    from cenote.server.serving import Serving

COUNT = 10
"""Results of a request that names no number."""


class MixedbreadRerankRequest(RankingFields):
    """Body of `POST /v1/reranking` with `input`."""

    query: str
    input: Many[str | dict[str, Any]]


async def rerank(serving: Serving, request: Request, body: MixedbreadRerankRequest) -> Response:
    """The inputs by falling relevance to the query."""

    def form(head: dict[str, Any], ranked: list[Ranked], documents: list[str]) -> dict[str, Any]:
        shown: Any = body.input if body.shows() else [None] * len(documents)
        data = [
            {"index": rank.index, "score": rank.score, "input": shown[rank.index], "object": "rank_result"}
            for rank in ranked
        ]
        return {
            "usage": short_usage(head),
            "model": head["model"],
            "data": data,
            "object": "list",
            "top_k": body.count or COUNT,
            "return_input": body.shows(),
        }

    return await rank(serving, request, body, (body.query, body.input), form, COUNT)


DIALECT = Dialect(
    "Mixedbread",
    (
        Route(
            "/v1/reranking",
            rerank,
            MixedbreadRerankRequest,
            aliases=("/v1/rerank",),
            is_described=False,
            marks=frozenset({"input"}),
            purpose="score",
        ),
    ),
    prefix="mixedbread",
)
