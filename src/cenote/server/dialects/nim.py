"""The dialect of NVIDIA's NIM: ranking of passages by logits, under `/v1/ranking`, and its probes of health.

Its `/v1/embeddings` is OpenAI's, with `input_type`, `truncate` and `modality`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cenote.server.dialects import operations
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import short_usage
from cenote.server.wire.fields import Many
from cenote.server.wire.pairs import RankingFields, rank

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.operations import Ranked
    from cenote.server.serving import Serving


class NimRankingRequest(RankingFields):
    """Body of `POST /v1/ranking`."""

    query: str | dict[str, Any]
    passages: Many[str | dict[str, Any]]


async def ranking(serving: Serving, request: Request, body: NimRankingRequest) -> Response:
    """The passages by falling relevance to the query, with logits."""

    def form(head: dict[str, Any], ranked: list[Ranked], passages: list[Any]) -> dict[str, Any]:
        rankings = [{"index": rank.index, "logit": rank.score} for rank in ranked]
        return {"rankings": rankings, "usage": short_usage(head)}

    unscaled = body.model_copy(update={"raw_scores": True})
    return await rank(serving, request, unscaled, (body.query, body.passages), form)


DIALECT = Dialect(
    "NIM",
    (
        Route(
            "/v1/ranking",
            ranking,
            NimRankingRequest,
            aliases=("/ranking", "/v1/retrieval/{model}/reranking"),
            purpose="score",
        ),
        Route("/v1/health/live", operations.live, method="GET", is_open=True),
        Route("/v1/health/ready", operations.ready, method="GET", is_open=True),
    ),
    prefix="nim",
)
