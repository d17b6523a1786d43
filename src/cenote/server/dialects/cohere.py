"""Cohere's dialect: `/v2/embed`, field by field as vLLM has it and with int8 and uint8, and its older form `/v1/embed`.

The prompt that `input_type` chooses stands before texts verbatim, as in Sentence-Transformers, also where the model has
a chat template; only what is rendered by that template (`inputs`) has it as a system message.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from cenote.core import UNLIMITED, PoolingParams
from cenote.errors import BadRequest
from cenote.functions import coalesce
from cenote.pipeline import operations
from cenote.pipeline.inputs import Illustrated
from cenote.pipeline.options import TextOptions
from cenote.pipeline.parts import NO_NAMES
from cenote.server.routes import Dialect, Route
from cenote.server.serving import request_id
from cenote.server.wire import sizes
from cenote.server.wire.encoding import VectorType, json_response, short_usage, typed
from cenote.server.wire.fields import Body, Many, Queued, Some
from cenote.server.wire.pairs import RankingFields, Text, listed, meta, rank
from cenote.server.wire.vectors import ranges_for

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Output, Sequence
    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Ranked
    from cenote.pipeline.pipeline import Service
    from cenote.pipeline.prompts import Applied
    from cenote.server.serving import Serving

NEEDED = {"text": "text", "image_url": "image_url.url"}
"""Field that a part of an input must have, by the part's type."""


class Content(BaseModel):
    """A part of an input."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: dict[str, Any] | None = None
    uuid: Any = Field(None, description="refused: pictures are known by their content")

    @model_validator(mode="after")
    def _complete(self) -> Content:
        if self.uuid is not None:
            raise PydanticCustomError("content", NO_NAMES)
        image = self.image_url or {}
        values = {"text": self.text, "image_url": image.get("url") or None}
        if values[self.type] is None:
            raise PydanticCustomError(
                "content", f"CohereEmbedContent with type={self.type!r} requires {NEEDED[self.type]}"
            )
        return self


class Input(BaseModel):
    """An input of several parts."""

    content: Some[Content]

    @property
    def text(self) -> str:
        """Its texts, a line each."""
        return "\n".join(str(part.text) for part in self.content)

    def illustrated(self) -> Illustrated:
        """Return its texts and images in order."""
        parts = tuple(part.text if part.type == "text" else None for part in self.content)
        images = (part.image_url or {} for part in self.content if part.type == "image_url")
        return Illustrated(parts, tuple(image["url"] for image in images))

    @property
    def has_image(self) -> bool:
        """Whether a part of it is an image."""
        return any(part.type == "image_url" for part in self.content)


class EmbedRequest(Queued):
    """Body of `POST /v2/embed`: one of `texts`, `images` and `inputs`."""

    model: str | None = None
    input_type: str | None = Field(None, description="search_query, search_document, or one of the model's prompts")
    texts: Many[str] | None = None
    images: Many[str] | None = None
    inputs: Many[Input] | None = None
    output_dimension: int | None = None
    embedding_types: Many[VectorType] | None = Field(None, description="default: float")
    truncate: Literal["NONE", "START", "END"] = "END"
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="default: the model's maximum")

    @model_validator(mode="after")
    def _one_source(self) -> EmbedRequest:
        if len(self.sources) != 1:
            raise PydanticCustomError(
                "input",
                "Exactly one of texts, images, or inputs must be provided, and it must be non-empty",
                {"param": "texts"},
            )
        return self

    @property
    def has_images(self) -> bool:
        """Whether any input is or has an image."""
        return bool(self.images) or any(entry.has_image for entry in self.inputs or ())

    def illustrated(self) -> list[str | Illustrated]:
        """Return `images` and `inputs` for a model that takes images."""
        images = [Illustrated((None,), (url,)) for url in self.images or ()]
        return [*images, *(entry.illustrated() for entry in self.inputs or ())]

    @property
    def sources(self) -> list[list[Any]]:
        """Those of the three fields that have any inputs: one, in a valid request."""
        return list(filter(None, (self.texts, self.images, self.inputs)))


async def embed(serving: Serving, request: Request, body: EmbedRequest) -> Response:
    """One vector per input, in each of the types of the request."""
    return await _answer(serving, request, body, version="2")


async def embed_v1(serving: Serving, request: Request, body: EmbedRequest) -> Response:
    """The same; vectors stand in a bare list unless the request names types."""
    return await _answer(serving, request, body, version="1")


async def _answer(serving: Serving, request: Request, body: EmbedRequest, version: str) -> Response:
    service = serving.find(body.model)
    params = PoolingParams(dimensions=body.output_dimension)
    types: list[VectorType] = body.embedding_types or ["float"]
    is_bare = version == "1" and not body.embedding_types
    texts = {"texts": body.texts} if body.texts else {}

    def make() -> Job[Response]:
        prompts, options = _prompts(serving, service, body)
        job = operations.encode(service, prompts, "embed", params, options)
        _check_uncut(body, max(map(len, job.sequences)))
        number = sum(map(sizes.FORMS.__getitem__, {*types}))
        sizes.check(serving.config.max_response_bytes, sizes.numbers(service.info, job.sequences), number)
        ranges = ranges_for(service, types, params, "embedding_types")

        def encode(outputs: list[Output]) -> Response:
            forms = typed([output.data for output in outputs], types, ranges, param="embedding_types")
            embeddings, kind = (forms["float"], "embeddings_floats") if is_bare else (forms, "embeddings_by_type")
            answer = {
                "id": f"embd-{request_id(request, None)}",
                "embeddings": embeddings,
                **texts,
                "meta": {
                    "api_version": {"version": version},
                    "billed_units": _billed(job.sequences),
                },
                "response_type": kind,
            }
            return json_response(answer)

        return job.then(encode)

    return await serving.answer(request, service, body, make)


def _billed(sequences: Seq[Sequence]) -> dict[str, int]:
    """Return the tokens of a request: of images, where it has any."""
    tokens = sum(map(len, sequences))
    has_image = any(sequence.media for sequence in sequences)
    return {"input_tokens": 0 if has_image else tokens, "image_tokens": tokens if has_image else 0}


def _prompts(serving: Serving, service: Service, body: EmbedRequest) -> tuple[list[str | Illustrated], TextOptions]:
    """Return the prompts of a request, and how they become ids.

    Of a model that takes images, its own template renders `images` and `inputs`, as it does pictures from Python.

    Raises:
        BadRequest: it has images and the model takes none, or it names a prompt that the model does not have.
    """
    renderer, inputs = service.renderer, body.inputs or []
    (source,) = body.sources
    serving.check_count(len(source))
    applied = renderer.prompts.choose(input_type=body.input_type)
    options = _text_options(service, body)
    if renderer.pictures is not None and (body.has_images or not renderer.pictures.refusal):
        return body.illustrated() or list(body.texts or ()), options._replace(prompt=applied)
    _refuse_images(service, body)
    if inputs and renderer.tokenizer.chat_template:
        prompts: list[str | Illustrated] = [renderer.conversations.text(_messages(entry, applied)) for entry in inputs]
        unprompted = replace(applied, text="")
        return prompts, options._replace(prompt=unprompted, add_special_tokens=False, rendered=True)
    return [*(body.texts or (entry.text for entry in inputs))], options._replace(prompt=applied)


def _text_options(service: Service, body: EmbedRequest) -> TextOptions:
    length = min(coalesce(body.max_tokens, UNLIMITED), service.info.limit("embed"))
    return {
        "NONE": TextOptions(whole=True),
        "START": TextOptions(length, "left"),  # as in vLLM the ids are cut, the special token at their start too
        "END": TextOptions(length),
    }[body.truncate]


def _refuse_images(service: Service, body: EmbedRequest) -> None:
    if body.has_images:
        raise BadRequest(
            f"{service.info.architecture} takes no images, only texts: send `texts`, or `inputs` whose content has the "
            "type 'text'",
            param="images" if body.images else "inputs",
        )


def _check_uncut(body: EmbedRequest, longest: int) -> None:
    """Raise `BadRequest` where an input exceeds `max_tokens` and may not be cut."""
    if body.truncate == "NONE" and body.max_tokens is not None and longest > body.max_tokens:
        raise BadRequest(
            f"Input of {longest} tokens exceeds max_tokens={body.max_tokens} with truncate=NONE. "
            "Set truncate to END or START to allow truncation.",
            param="max_tokens",
        )


def _messages(entry: Input, applied: Applied) -> list[dict[str, Any]]:
    """Return an input as a user's message, behind its prompt as a system message."""
    user = {"role": "user", "content": [part.model_dump(exclude_none=True) for part in entry.content]}
    return [{"role": "system", "content": applied.text}, user] if applied.text else [user]


class CohereRerankRequest(RankingFields):
    """Body of `POST /v2/rerank`, and of `/v1/rerank` with fields that only Cohere has."""

    pictured = False

    query: Text
    documents: Text | Many[Text]


async def rerank(serving: Serving, request: Request, body: CohereRerankRequest) -> Response:
    """The documents by falling relevance to the query; `document` stands in the results on request."""
    version = "1" if body.rank_fields or body.shows() else "2"
    items = listed(body.documents)

    def result(rank: Ranked) -> dict[str, Any]:
        entry = {"index": rank.index, "relevance_score": rank.score}
        if not body.shows():
            return entry
        document = items[rank.index]
        return entry | {"document": {"text": document} if isinstance(document, str) else document}

    def form(head: dict[str, Any], ranked: list[Ranked], documents: list[Any]) -> dict[str, Any]:
        return {
            "id": head["id"],
            "results": [result(rank) for rank in ranked],
            "meta": meta(head, documents, version),
            "model": head["model"],
            "usage": short_usage(head),
        }

    return await rank(serving, request, body, (body.query, body.documents), form)


class CohereTokenizeRequest(Body):
    """Body of `POST /v1/tokenize` with `text`."""

    model: str | None = None
    text: str


async def tokenize(serving: Serving, request: Request, body: CohereTokenizeRequest) -> Response:
    """The token ids of a text, without special tokens, and their vocabulary entries."""
    renderer = serving.find(body.model).renderer

    def tokens() -> Response:
        serving.check_size(body.text, "text")
        ids = renderer.tokenize(body.text, add_special_tokens=False)
        strings = renderer.token_strings(ids)
        return json_response({"tokens": ids, "token_strings": strings, "meta": {"api_version": {"version": "1"}}})

    return await serving.rendered(request, tokens)


OF_V1 = frozenset({"rank_fields"})
"""Key of a body for the first version, which shares its path with Jina and vLLM."""

DIALECT = Dialect(
    "Cohere",
    (
        Route("/v2/embed", embed, EmbedRequest, purpose="embed"),
        Route("/v1/embed", embed_v1, EmbedRequest, is_described=False, purpose="embed"),
        Route("/v2/rerank", rerank, CohereRerankRequest, purpose="score"),
        Route("/v1/rerank", rerank, CohereRerankRequest, is_described=False, marks=OF_V1, purpose="score"),
        Route("/v1/tokenize", tokenize, CohereTokenizeRequest, is_described=False, marks=frozenset({"text"})),
    ),
    prefix="cohere",
)
