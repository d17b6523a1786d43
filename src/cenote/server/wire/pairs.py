"""Pairs of texts or pictures on the wire: fields and the trip of requests that score or rank them."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cenote.core import PoolingParams
from cenote.errors import BadRequest
from cenote.functions import coalesce
from cenote.pipeline import operations
from cenote.pipeline.pairs import PairOptions
from cenote.pipeline.parts import media_type
from cenote.server.wire import answers
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Shared, Some
from cenote.server.wire.items import CONTENT, with_picture

if TYPE_CHECKING:
    from collections.abc import Callable, Sized
    from collections.abc import Sequence as Seq

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import ModelInfo
    from cenote.pipeline.inputs import Illustrated
    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Ranked
    from cenote.pipeline.pipeline import Service
    from cenote.server.serving import Serving

TEXT = ("text",)
"""Keys of the texts of objects."""
Text = str | dict[str, Any]
"""A text, or `{"content": [parts]}` of texts and pictures, or `{"text": ...}`."""


class ScoringFields(Shared):
    """Fields of `/score` and `/rerank`."""

    use_activation: bool | None = None
    max_tokens_per_query: int = Field(0, description="tokens to which queries are cut; 0 = not")
    max_tokens_per_doc: int = Field(0, description="tokens to which documents are cut; 0 = not")
    instruction: str | None = Field(None, description="variable of the model's template")
    instruct: str | None = Field(None, description="as `instruction` (SGLang)")
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
            instruction=coalesce(self.instruction, self.instruct),
            chat_template_kwargs=self.chat_template_kwargs,
        )


Direction = Literal["Left", "left", "Right", "right"]
DIRECTIONS: dict[Direction | None, Any] = {
    None: None, "Left": "left", "left": "left", "Right": "right", "right": "right",
}  # fmt: skip
"""Ends of texts that are cut, as Text Embeddings Inference names them."""


class RankingFields(ScoringFields):
    """Fields of requests for an order, of all vendors, for they share paths: each dialect honours those of the others.

    Clients send the lengths of their vendor's models, so documents are cut.
    """

    cuts_unasked = True
    pictured: ClassVar[bool] = True
    """Whether documents that are objects have a picture at `image`, where `rank_fields` names no keys."""

    top_n: int | None = Field(None, ge=0, description="number of results; 0 = all")
    top_k: int | None = Field(None, ge=1, description="as `top_n` (Voyage, Mixedbread, NVIDIA)")
    return_documents: bool | None = Field(None, description="whether the results have the documents")
    return_text: bool | None = Field(None, description="as `return_documents` (Text Embeddings Inference)")
    return_input: bool | None = Field(None, description="as `return_documents` (Mixedbread)")
    raw_scores: bool = Field(False, description="logits of a cross-encoder")
    rank_fields: Some[str] | None = Field(None, description="keys of documents that are objects; default: text")
    truncation_direction: Direction = Field("Right", description="Right")

    @model_validator(mode="after")
    def _one_count(self) -> RankingFields:
        if self.top_n and self.top_k and self.top_n != self.top_k:
            raise PydanticCustomError(
                "count", "`top_n` and `top_k` are the same; only one of them can be given.", {"param": "top_k"}
            )
        return self

    @model_validator(mode="after")
    def _cut_at_the_right(self) -> RankingFields:
        if DIRECTIONS[self.truncation_direction] == "left":
            raise PydanticCustomError(
                "direction",
                "`truncation_direction` is 'Left', and pairs of texts are cut at the right; leave it out, or shorten "
                "the texts.",
                {"param": "truncation_direction"},
            )
        return self

    @property
    def count(self) -> int | None:
        """Number of results; `None` = all."""
        return self.top_n or self.top_k

    def activation(self, info: ModelInfo) -> bool | None:
        """Return `use_activation` for a model: false where `raw_scores` asks for the logits of a cross-encoder.

        Similarities have no other scale.
        """
        has_logits = info.score_types[:1] == ("cross-encoder",)
        return False if self.raw_scores and has_logits else self.use_activation

    def shows(self, *, unasked: bool = False) -> bool:
        """Return whether the results have the documents.

        Args:
            unasked: whether they do where the request says nothing.
        """
        words = (self.return_documents, self.return_text, self.return_input)
        return next((word for word in words if word is not None), unasked)

    def clamped(self, max_model_len: int) -> PairOptions:
        """Return how two texts become one input, without limits that the model's own makes needless."""
        options = self.pair_options()
        return replace(
            options,
            max_tokens_per_query=_clamped(options.max_tokens_per_query, max_model_len),
            max_tokens_per_doc=_clamped(options.max_tokens_per_doc, max_model_len),
        )


def _clamped(tokens: int, max_model_len: int) -> int:
    return tokens if tokens < max_model_len else 0


async def rank(
    serving: Serving,
    request: Request,
    body: RankingFields,
    sides: tuple[Text, Text | Seq[Text]],
    form: Callable[[dict[str, Any], list[Ranked], list[Any]], Any],
    count: int | None = None,
) -> Response:
    """Answer a request for the order of documents by their relevance to a query.

    Args:
        serving: the models.
        request: the request.
        body: its body.
        sides: the query, and the documents.
        form: makes the dialect's answer out of `id`, `model` and `usage`, the results, and all documents: the text of
            each, or `Illustrated`.
        count: number of results where the request names none; `None` = all.

    Raises:
        BadRequest: the documents are too many, or neither texts nor pictures.
    """
    service = serving.find(body.model)
    query, items_of_body = sides
    items = listed(items_of_body)
    serving.check_count(len(items), "documents")
    params = PoolingParams(use_activation=body.activation(service.info))
    pair_options = body.clamped(service.info.max_model_len)
    pictured = body.pictured and not body.rank_fields

    def make() -> Job[Response]:
        documents = contents(items, service, body, "documents", body.rank_fields or TEXT, pictured=pictured)
        (one_query,) = contents([query], service, body, "queries")
        number = body.count or count
        job = operations.rerank(
            service, one_query, documents, number, params, body.text_options(), pair_options, body.score_type
        )

        def encode(ranked: list[Ranked]) -> Response:
            head = answers.head(serving, request, body, "score", job.sequences)
            return json_response(form(head, ranked, documents))

        return job.then(encode)

    return await serving.answer(request, service, body, make)


def meta(head: dict[str, Any], documents: Sized, version: str = "1") -> dict[str, Any]:
    """Return the part of an answer that Cohere's clients read. A search unit is up to 100 documents."""
    return {
        "api_version": {"version": version},
        "billed_units": {"search_units": ceil(len(documents) / 100)},
        "tokens": {"input_tokens": head["usage"]["prompt_tokens"], "output_tokens": 0},
    }


def listed(side: Text | Seq[Text]) -> Seq[Text]:
    """Return the items of one side of the pairs."""
    return [side] if isinstance(side, (str, dict)) else side


def contents(
    items: Seq[Text], service: Service, body: Shared, side: str, keys: Seq[str] = TEXT, *, pictured: bool = True
) -> list[str | Illustrated]:
    """Return one side of the pairs as the operations take them.

    Args:
        items: texts, or objects with texts and pictures.
        service: the model.
        body: of the request, whose `mm_processor_kwargs` count.
        side: its name, for errors.
        keys: of objects whose values are read, a line each.
        pictured: whether the value at `image` is a picture, as Jina and NIM have it.

    Raises:
        BadRequest: a part is neither a text nor a picture that the model takes, or an object has none of the keys.
    """
    body.check_media(service)
    return [_content(item, service, body, side, keys, pictured=pictured) for item in items]


def _content(
    item: Text, service: Service, body: Shared, side: str, keys: Seq[str], *, pictured: bool
) -> str | Illustrated:
    if isinstance(item, str):
        return item
    shown = with_picture(item) if pictured else item
    if CONTENT not in shown:
        return _of_keys(shown, side, keys)
    content = shown[CONTENT]
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    kind = media_type([{CONTENT: parts}])
    if kind and service.renderer.pictures is not None:
        return _of_pictures(parts, service, body, side)
    lines = [line for part in parts for line in _lines(part, keys)]
    if not parts or len(lines) < len(parts):
        raise _no_text(kind, service, param=CONTENT if CONTENT in item else side)
    return "\n".join(lines)


def _of_pictures(parts: list[Any], service: Service, body: Shared, side: str) -> str | Illustrated:
    """Return content parts, some of which are pictures, as an input."""
    try:
        return service.renderer.conversations.of_parts(parts, body.mm_processor_kwargs)
    except BadRequest as error:  # which knows of messages, not of sides
        raise BadRequest(error.message, param=side) from None


def _of_keys(item: dict[str, Any], side: str, keys: Seq[str]) -> str:
    """Return the texts of an object under `keys`, a line each."""
    lines = _lines(item, keys)
    if lines:
        return "\n".join(lines)
    message = f"got an object with the keys {sorted(item)}; expected a text, or an object with one under "
    message += " or ".join(f"`{key}`" for key in keys)
    if side == "documents":
        message += " (Cohere's `rank_fields` names others)"
    raise BadRequest(message, param=side)


def _lines(part: Any, keys: Seq[str]) -> list[str]:
    values = [part.get(key) for key in keys] if isinstance(part, dict) else []
    return [value for value in values if isinstance(value, str)]


def _no_text(kind: str | None, service: Service, param: str) -> BadRequest:
    """Return the error of content parts that are no texts, of which one is of `kind`."""
    got = f"; got {kind!r}, and {service.info.name} takes no images, only texts" if kind else ""
    return BadRequest(
        f"MultiModalParam is not supported for {service.info.architecture}: only parts of type 'text' are{got}",
        param=param,
    )
