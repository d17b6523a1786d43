"""Voyage's dialect: `/v1/embeddings` and `/v1/rerank`, told from others by fields that its clients always send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cenote.server.dialects.openai import EmbeddingRequest, embeddings
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import short_usage
from cenote.server.wire.fields import Many
from cenote.server.wire.pairs import RankingFields, rank

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.operations import Ranked
    from cenote.server.errors import Fault
    from cenote.server.serving import Serving


class VoyageRerankRequest(RankingFields):
    """Body of `POST /v1/rerank` in Voyage's form."""

    query: str
    documents: str | Many[str]
    top_k: int | None = Field(None, ge=1, description="number of results")
    return_documents: bool = False


async def rerank(serving: Serving, request: Request, body: VoyageRerankRequest) -> Response:
    """The documents by falling relevance to the query, under `data`."""

    def form(head: dict[str, Any], ranked: list[Ranked], documents: list[Any]) -> dict[str, Any]:
        results: list[dict[str, Any]] = [{"index": rank.index, "relevance_score": rank.score} for rank in ranked]
        if body.return_documents:
            results = [result | {"document": documents[result["index"]]} for result in results]
        return {"object": "list", "data": results, "model": head["model"], "usage": short_usage(head)}

    return await rank(serving, request, body, (body.query, body.documents), body.top_k, form)


def error(fault: Fault) -> dict[str, Any]:
    """Return the body of an error, whose clients read `detail`, and older ones fail on an `error` that is an object."""
    return {"detail": fault.message}


DIALECT = Dialect(
    "Voyage",
    (
        Route(
            "/v1/embeddings",
            embeddings,
            EmbeddingRequest,
            is_described=False,
            marks=frozenset({"output_dtype", "output_dimension"}),
            purpose="vectors",
        ),
        Route(
            "/v1/rerank",
            rerank,
            VoyageRerankRequest,
            aliases=("/rerank",),
            is_described=False,
            marks=frozenset({"truncation", "top_k"}),
            foreign=frozenset({"top_n"}),
            purpose="score",
        ),
    ),
    error,
    prefix="voyage",
)
