"""Mixedbread's dialect: `/v1/reranking` with `input`. Its `/v1/embeddings` is OpenAI's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import short_usage
from cenote.server.wire.fields import Many, Some
from cenote.server.wire.pairs import RankingFields, rank

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.operations import Ranked
    from cenote.server.serving import Serving

TEXT = ("text",)


class MixedbreadRerankRequest(RankingFields):
    """Body of `POST /v1/reranking` with `input`."""

    query: str
    input: Many[str | dict[str, Any]]
    top_k: int = Field(10, ge=1, description="number of results")
    return_input: bool = False
    rank_fields: Some[str] | None = Field(None, description="keys of inputs that are objects; default: text")


async def rerank(serving: Serving, request: Request, body: MixedbreadRerankRequest) -> Response:
    """The inputs by falling relevance to the query."""

    def form(head: dict[str, Any], ranked: list[Ranked], documents: list[str]) -> dict[str, Any]:
        shown: Any = body.input if body.return_input else [None] * len(documents)
        data = [
            {"index": rank.index, "score": rank.score, "input": shown[rank.index], "object": "rank_result"}
            for rank in ranked
        ]
        return {
            "usage": short_usage(head),
            "model": head["model"],
            "data": data,
            "object": "list",
            "top_k": body.top_k,
            "return_input": body.return_input,
        }

    return await rank(serving, request, body, (body.query, body.input), body.top_k, form, body.rank_fields or TEXT)


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
