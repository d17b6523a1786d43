"""Score and rerank, as vLLM and Jina spell them: `/score`, `/rerank` and their versioned paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from cenote.core import PoolingParams
from cenote.pipeline import operations
from cenote.server.routes import Dialect, Route
from cenote.server.wire import answers
from cenote.server.wire.encoding import json_response, short_usage, with_data
from cenote.server.wire.fields import Many
from cenote.server.wire.pairs import RankingFields, ScoringFields, Text, contents, listed, meta, rank

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.inputs import Illustrated
    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Ranked
    from cenote.server.serving import Serving
    from cenote.tensors.similarity import Array

SPELLINGS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
"""The names of the two sides of `/score`; the first pair that is complete counts."""


class ScoreRequest(ScoringFields):
    """Body of `POST /score`: two sides, 1:1, 1:N or N:N, under any of four pairs of names."""

    queries: Text | Many[Text] | None = None
    documents: Text | Many[Text] | None = None
    items: Text | Many[Text] | None = None
    data_1: Text | Many[Text] | None = None
    data_2: Text | Many[Text] | None = None
    text_1: Text | Many[Text] | None = None
    text_2: Text | Many[Text] | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> ScoreRequest:
        if self.sides() is None:
            names = ", or ".join(f"`{a}` and `{b}`" for a, b in SPELLINGS)
            raise PydanticCustomError("sides", f"Two sides must be given: {names}.", {"param": "queries"})
        return self

    def sides(self) -> tuple[Any, Any] | None:
        """Return the two sides, or `None` if no pair of names is complete."""
        for first, second in SPELLINGS:
            sides = getattr(self, first), getattr(self, second)
            if None not in sides:
                return sides
        return None


class RerankRequest(RankingFields):
    """Body of `POST /rerank`."""

    query: Text
    documents: Text | Many[Text]


async def score(serving: Serving, request: Request, body: ScoreRequest) -> Response:
    """One score per query and document, in order."""
    service = serving.find(body.model)
    sides = body.sides()
    assert sides is not None
    items_of_queries, items_of_documents = map(listed, sides)
    serving.check_count(len(items_of_queries), "queries")
    serving.check_count(len(items_of_documents), "documents")
    params = PoolingParams(use_activation=body.use_activation)

    def make() -> Job[Response]:
        queries = contents(items_of_queries, service, body, "queries")
        documents = contents(items_of_documents, service, body, "documents")
        job = operations.score(
            service, queries, documents, params, body.text_options(), body.pair_options(), body.score_type
        )

        def encode(scores: Array) -> Response:
            data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores.tolist())]
            return json_response(with_data(answers.head(serving, request, body, "score", job.sequences), data))

        return job.then(encode)

    return await serving.answer(request, service, body, make)


async def rerank(serving: Serving, request: Request, body: RerankRequest) -> Response:
    """The documents by falling relevance to the query."""

    items = listed(body.documents)

    def form(head: dict[str, Any], ranked: list[Ranked], documents: list[Any]) -> dict[str, Any]:
        """Return the keys that clients of Jina, Cohere and vLLM read, and `data` for those of Voyage and Pinecone."""
        shown = list(map(_shown, documents, items))
        results = [_result(body, rank, shown[rank.index]) for rank in ranked]
        answer = {
            "id": head["id"],
            "object": "list",
            "model": head["model"],
            "usage": short_usage(head),
            "meta": meta(head, documents),
            "results": results,
        }
        return answer if body.top_n else answer | {"data": results}

    return await rank(serving, request, body, (body.query, body.documents), form)


def _shown(document: str | Illustrated, item: Any) -> dict[str, Any]:
    """Return a document as an answer has it: its text, or its parts in the request."""
    if isinstance(document, str):
        return {"text": document, "multi_modal": None}
    return {"text": None, "multi_modal": item.get("content", item)}


def _result(body: RerankRequest, rank: Ranked, document: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"index": rank.index}
    if body.shows(unasked=True):
        result["document"] = document
    return result | {"relevance_score": rank.score}


DIALECT = Dialect(
    "Jina",
    (
        Route("/score", score, ScoreRequest, aliases=("/v1/score",), purpose="score"),
        Route("/rerank", rerank, RerankRequest, aliases=("/v1/rerank",), purpose="score"),
    ),
    prefix="jina",
)
