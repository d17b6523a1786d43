"""Score and rerank, as vLLM, Jina, Cohere v2 and Voyage spell them: `/score`, `/rerank` and their versioned paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cenote.core import PoolingParams
from cenote.errors import BadRequest
from cenote.pipeline import operations
from cenote.pipeline.pairs import PairOptions
from cenote.server.routes import Dialect, Route
from cenote.server.wire import answers
from cenote.server.wire.encoding import json_response, short_usage, with_data
from cenote.server.wire.fields import Many, Shared

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Ranked
    from cenote.pipeline.pipeline import Service
    from cenote.server.serving import Serving
    from cenote.tensors.similarity import Array

Text = str | dict[str, Any]
"""A text, or `{"content": [parts]}` of texts, or `{"text": ...}`."""

SPELLINGS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
"""The names of the two sides of `/score`; the first pair that is complete counts."""


class ScoringFields(Shared):
    """Fields of `/score` and `/rerank`."""

    use_activation: bool | None = None
    max_tokens_per_query: int = Field(0, description="tokens to which queries are cut; 0 = not")
    max_tokens_per_doc: int = Field(0, description="tokens to which documents are cut; 0 = not")
    instruction: str | None = Field(None, description="variable of the model's template")
    chat_template_kwargs: dict[str, Any] | None = None
    score_type: str | None = Field(None, description="cross-encoder, bi-encoder or late-interaction")

    def pair_options(self) -> PairOptions:
        """Return how two texts become one input.

        Raises:
            BadRequest: a variable of the template is one that requests may not set.
        """
        return PairOptions.of(
            max_tokens_per_query=self.max_tokens_per_query,
            max_tokens_per_doc=self.max_tokens_per_doc,
            instruction=self.instruction,
            chat_template_kwargs=self.chat_template_kwargs,
        )


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


class RerankRequest(ScoringFields):
    """Body of `POST /rerank`."""

    query: Text
    documents: Text | Many[Text]
    top_n: int | None = Field(0, ge=0, description="number of results; 0 = all")
    top_k: int | None = Field(None, ge=1, description="as `top_n` (Voyage, whose results are under `data`)")
    return_documents: bool | None = Field(None, description="false leaves the documents out")

    @property
    def is_voyage(self) -> bool:
        """Whether the request is in Voyage's form, whose clients always send `top_k`."""
        return "top_k" in self.model_fields_set and "top_n" not in self.model_fields_set


async def score(serving: Serving, request: Request, body: ScoreRequest) -> Response:
    """One score per pair of texts, in order."""
    service = serving.find(body.model)
    sides = body.sides()
    assert sides is not None
    queries, documents = (texts(side, service) for side in sides)
    body.refuse_media()
    serving.check_count(max(len(queries), len(documents)))
    params = PoolingParams(use_activation=body.use_activation)

    def make() -> Job[Response]:
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
    service = serving.find(body.model)
    documents = texts(body.documents, service)
    (query,) = texts(body.query, service)
    body.refuse_media()
    serving.check_count(len(documents))
    top_n = body.top_k if body.is_voyage else body.top_n
    params = PoolingParams(use_activation=body.use_activation)

    def make() -> Job[Response]:
        job = operations.rerank(
            service, query, documents, top_n, params, body.text_options(), body.pair_options(), body.score_type
        )

        def encode(ranked: list[Ranked]) -> Response:
            results = [_result(body, rank, documents[rank.index]) for rank in ranked]
            head = answers.head(serving, request, body, "score", job.sequences)
            entries = {"object": "list", "data": results} if body.is_voyage else {"results": results}
            return json_response({"id": head["id"], "model": head["model"], "usage": short_usage(head), **entries})

        return job.then(encode)

    return await serving.answer(request, service, body, make)


def _result(body: RerankRequest, rank: Ranked, document: str) -> dict[str, Any]:
    """Return an entry of the answer, in vLLM's form or in Voyage's, which has documents only on request."""
    result: dict[str, Any] = {"index": rank.index}
    if body.is_voyage:
        if body.return_documents:
            result["document"] = document
    elif body.return_documents is not False:
        result["document"] = {"text": document, "multi_modal": None}
    result["relevance_score"] = rank.score
    return result


def texts(side: Text | list[Text], service: Service) -> list[str]:
    """Return one side of the pairs as texts.

    Raises:
        BadRequest: a part is not a text.
    """
    items = side if isinstance(side, list) else [side]
    return [_text(item, service) for item in items]


def _text(item: Text, service: Service) -> str:
    if isinstance(item, str):
        return item
    content = item.get("content", [item])
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    lines = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not parts or len(lines) < len(parts):
        raise BadRequest(
            f"MultiModalParam is not supported for {service.info.architecture}: only parts of type 'text' are",
            param="content",
        )
    return "\n".join(lines)


DIALECT = Dialect(
    "Scoring",
    (
        Route("/score", score, ScoreRequest, aliases=("/v1/score",), purpose="score"),
        Route("/rerank", rerank, RerankRequest, aliases=("/v1/rerank", "/v2/rerank"), purpose="score"),
    ),
)
