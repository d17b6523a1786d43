"""Score and rerank, as vLLM, Jina, Cohere v2 and Voyage spell them: `/score`, `/rerank` and their versioned paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cenote.engine import scoring
from cenote.engine.pairs import PairOptions
from cenote.errors import BadRequest
from cenote.server.dialects import answers
from cenote.server.dialects.requests import Many, Shared
from cenote.server.encoding import json_response, with_data
from cenote.tensors.scoring import ranking
from cenote.types import PoolingParams

if TYPE_CHECKING:
    from cenote.engine.scoring import Plan
    from cenote.server.serving import Serving
    from cenote.service import Service
    from cenote.tensors.scoring import Array
    from cenote.types import Sequence

Text = str | dict[str, Any]
"""A text, or `{"content": [parts]}` or `{"text": ...}` whose parts are texts."""

SPELLINGS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
"""The names of the two sides of `/score`; the first pair that is complete counts."""

RESERVED = ("chat_template", "tools", "tokenize")


class ScoringFields(Shared):
    """What `/score` and `/rerank` have in common."""

    use_activation: bool | None = None
    max_tokens_per_query: int = Field(0, description="tokens to which queries are cut; 0 = not")
    max_tokens_per_doc: int = Field(0, description="tokens to which documents are cut; 0 = not")
    instruction: str | None = Field(None, description="variable of the model's template")
    chat_template_kwargs: dict[str, Any] | None = None
    score_type: str | None = Field(None, description="cross-encoder, bi-encoder or late-interaction")

    def pair_options(self) -> PairOptions:
        """How two texts become one input.

        Raises:
            BadRequest: a variable of the template is one that requests may not set.
        """
        kwargs = dict(self.chat_template_kwargs or {})
        for name in RESERVED:
            if name in kwargs:
                raise BadRequest(f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs")
        if self.instruction is not None:
            kwargs.setdefault("instruction", self.instruction)
        return PairOptions(self.max_tokens_per_query, self.max_tokens_per_doc, None, kwargs)


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
        """The two sides, or `None` if no pair of names is complete."""
        found = [(getattr(self, a), getattr(self, b)) for a, b in SPELLINGS]
        return next((pair for pair in found if pair[0] is not None and pair[1] is not None), None)


class RerankRequest(ScoringFields):
    """Body of `POST /rerank`."""

    query: Text
    documents: Text | Many[Text]
    top_n: int | None = Field(0, ge=0, description="how many results; 0 = all")
    top_k: int | None = Field(None, ge=1, description="as `top_n` (Voyage, whose results are under `data`)")
    return_documents: bool | None = Field(None, description="false leaves the documents out")

    @property
    def is_voyage(self) -> bool:
        """Whether the request is in Voyage's form, whose clients always send `top_k`."""
        return "top_k" in self.model_fields_set and "top_n" not in self.model_fields_set


def router(serving: Serving) -> APIRouter:
    """The routes of this dialect."""
    routes = APIRouter(tags=["Scoring"])

    @routes.post("/score")
    @routes.post("/v1/score", include_in_schema=False)
    async def score(body: ScoreRequest, request: Request) -> Response:
        """How well texts go together: one score per pair, in order."""
        service = serving.find(body.model)
        sides = body.sides()
        assert sides is not None
        queries, documents = (texts(side, service) for side in sides)
        sequences, scores = await _rate(serving, request, service, body, queries, documents)
        data = [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores.tolist())]
        return json_response(with_data(answers.head(serving, request, body, "score", sequences), data))

    @routes.post("/rerank")
    @routes.post("/v1/rerank", include_in_schema=False)
    @routes.post("/v2/rerank", include_in_schema=False)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """The documents by falling relevance to the query."""
        service = serving.find(body.model)
        documents = texts(body.documents, service)
        sequences, scores = await _rate(serving, request, service, body, texts(body.query, service), documents)
        results: list[dict[str, Any]] = []
        for i in ranking(scores, body.top_k if body.is_voyage else body.top_n):
            shown = documents[i] if body.is_voyage else {"text": documents[i], "multi_modal": None}
            is_shown = body.return_documents if body.is_voyage else body.return_documents is not False
            echo = {"document": shown} if is_shown else {}
            results.append({"index": i, **echo, "relevance_score": float(scores[i])})
        head = answers.head(serving, request, body, "score", sequences)
        usage = {key: head["usage"][key] for key in ("prompt_tokens", "total_tokens")}
        answer = {"id": head["id"], "model": head["model"], "usage": usage}
        return json_response(answer | ({"object": "list", "data": results} if body.is_voyage else {"results": results}))

    return routes


async def _rate(
    serving: Serving,
    request: Request,
    service: Service,
    body: ScoringFields,
    queries: list[str],
    documents: list[str],
) -> tuple[list[Sequence], Array]:
    """Plan, compute and reduce: what ran, and one score per pair."""
    body.refuse_media()
    serving.check_count(max(len(queries), len(documents)))
    params = PoolingParams(use_activation=body.use_activation)
    plans: list[Plan] = []

    def planned() -> list[Sequence]:
        made = scoring.plan(
            service.renderer,
            service.pairs,
            queries,
            documents,
            params,
            body.text_options(),
            body.pair_options(),
            body.score_type,
        )
        plans.append(made)
        return made.sequences

    sequences, outputs = await serving.compute(request, service, planned)
    return sequences, await serving.in_pool("encode", lambda: plans[0].scores(outputs))


def texts(side: Text | list[Text], service: Service) -> list[str]:
    """One side of the pairs as texts.

    Raises:
        BadRequest: a part is no text.
    """
    return [_text(item, service) for item in (side if isinstance(side, list) else [side])]


def _text(item: Text, service: Service) -> str:
    if isinstance(item, str):
        return item
    parts = item.get("content", [item])
    if isinstance(parts, str):
        return parts
    listed = parts if isinstance(parts, list) and parts else [None]
    found = [part.get("text") if isinstance(part, dict) else None for part in listed]
    if not all(isinstance(text, str) for text in found):
        raise BadRequest(
            f"MultiModalParam is not supported for {service.info.architecture}: only parts of type 'text' are",
            param="content",
        )
    return "\n".join(str(text) for text in found)
