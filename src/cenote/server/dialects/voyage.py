"""Voyage's dialect: `/v1/embeddings` and `/v1/rerank`, told from others by fields that its clients always send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from cenote.core import PoolingParams
from cenote.pipeline import operations
from cenote.pipeline.options import TextOptions
from cenote.server.dialects.openai import EmbeddingRequest, embeddings
from cenote.server.routes import Dialect, Route
from cenote.server.wire import sizes
from cenote.server.wire.encoding import VectorType, entries, json_response, short_usage, typed_values
from cenote.server.wire.fields import Many, Queued, Some
from cenote.server.wire.pairs import RankingFields, rank
from cenote.server.wire.vectors import ranges_for

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Output, Sequence
    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Ranked
    from cenote.server.errors import Fault
    from cenote.server.serving import Serving
    from cenote.tensors.similarity import Array


class VoyageRerankRequest(RankingFields):
    """Body of `POST /v1/rerank` in Voyage's form."""

    query: str
    documents: str | Many[str]


class ContextRequest(Queued):
    """Body of `POST /v1/contextualizedembeddings`: documents, each in chunks."""

    model: str | None = None
    inputs: Some[Some[str]]
    input_type: str | None = Field(None, description="query or document")
    output_dtype: VectorType = "float"
    output_dimension: int | None = None
    encoding_format: Literal["base64"] | None = None


class MultimodalInput(BaseModel):
    """An input of texts and pictures."""

    content: Some[dict[str, Any]]


class MultimodalRequest(Queued):
    """Body of `POST /v1/multimodalembeddings`: inputs, each of content parts."""

    model: str | None = None
    inputs: Some[MultimodalInput]
    input_type: str | None = Field(None, description="query or document")
    truncation: bool = Field(True, description="cut texts that are too long; false: refuse them")
    output_dtype: VectorType = "float"
    output_dimension: int | None = None
    encoding_format: Literal["base64"] | None = None
    output_encoding: Literal["base64"] | None = Field(None, description="as `encoding_format`")


async def contextualized(serving: Serving, request: Request, body: ContextRequest) -> Response:
    """A vector per chunk, made of the states of its tokens in the whole document."""
    service = serving.find(body.model)
    applied = service.renderer.prompts.choose(input_type=body.input_type)
    params = PoolingParams(dimensions=body.output_dimension)
    types: list[VectorType] = [body.output_dtype]
    serving.check_count(sum(map(len, body.inputs)))

    def make() -> Job[Response]:
        job = operations.embed_chunks(service, body.inputs, params, TextOptions(prompt=applied))
        count = sizes.numbers(service.info, job.sequences)
        sizes.check(serving.config.max_response_bytes, count, sizes.FORMS[body.output_dtype])
        ranges = ranges_for(service, types, params, "output_dtype")

        def encode(documents: list[Array]) -> Response:
            as_base64 = body.encoding_format == "base64"
            forms = [typed_values([*rows_ND], types, ranges, as_base64=as_base64) for rows_ND in documents]
            data = [
                {"object": "list", "data": entries("embedding", "embedding", form), "index": i}
                for i, form in enumerate(forms)
            ]
            return json_response({
                "object": "list",
                "data": data,
                "model": serving.name(body.model),
                "usage": {"total_tokens": job.tokens},
            })  # fmt: skip

        return job.then(encode)

    return await serving.answer(request, service, body, make)


async def multimodal(serving: Serving, request: Request, body: MultimodalRequest) -> Response:
    """A vector per input of texts and pictures."""
    service = serving.find(body.model)
    applied = service.renderer.prompts.choose(input_type=body.input_type)
    params = PoolingParams(dimensions=body.output_dimension)
    types: list[VectorType] = [body.output_dtype]
    options = TextOptions(-1 if body.truncation else None, whole=not body.truncation, prompt=applied)
    serving.check_count(len(body.inputs))

    def make() -> Job[Response]:
        prompts = [service.renderer.conversations.of_parts(entry.content) for entry in body.inputs]
        job = operations.encode(service, prompts, "embed", params, options)
        count = sizes.numbers(service.info, job.sequences)
        sizes.check(serving.config.max_response_bytes, count, sizes.FORMS[body.output_dtype])
        ranges = ranges_for(service, types, params, "output_dtype")

        def encode(outputs: list[Output]) -> Response:
            as_base64 = "base64" in (body.encoding_format, body.output_encoding)
            form = typed_values([output.data for output in outputs], types, ranges, as_base64=as_base64)
            return json_response({
                "object": "list",
                "data": entries("embedding", "embedding", form),
                "model": serving.name(body.model),
                "usage": _usage(job.sequences),
            })  # fmt: skip

        return job.then(encode)

    return await serving.answer(request, service, body, make)


def _usage(sequences: Seq[Sequence]) -> dict[str, int]:
    """Return the tokens of a request, and the pixels of its pictures as they came."""
    media = [one for sequence in sequences for one in sequence.media]
    tokens = sum(map(len, sequences))
    return {
        "text_tokens": tokens - sum(one.tokens for one in media),
        "image_pixels": sum(one.pixels for one in media),
        "video_pixels": 0,
        "total_tokens": tokens,
    }


async def rerank(serving: Serving, request: Request, body: VoyageRerankRequest) -> Response:
    """The documents by falling relevance to the query, under `data`."""

    def form(head: dict[str, Any], ranked: list[Ranked], documents: list[Any]) -> dict[str, Any]:
        results: list[dict[str, Any]] = [{"index": rank.index, "relevance_score": rank.score} for rank in ranked]
        if body.shows():
            results = [result | {"document": documents[result["index"]]} for result in results]
        return {"object": "list", "data": results, "model": head["model"], "usage": short_usage(head)}

    return await rank(serving, request, body, (body.query, body.documents), form)


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
            nulls=True,
            purpose="vectors",
        ),
        Route(
            "/v1/contextualizedembeddings",
            contextualized,
            ContextRequest,
            aliases=("/contextualizedembeddings",),
            purpose="token_embed",
        ),
        Route(
            "/v1/multimodalembeddings",
            multimodal,
            MultimodalRequest,
            aliases=("/multimodalembeddings",),
            purpose="embed",
        ),
        Route(
            "/v1/rerank",
            rerank,
            VoyageRerankRequest,
            aliases=("/rerank",),
            is_described=False,
            marks=frozenset({"truncation", "top_k"}),
            nulls=True,
            foreign=frozenset({"top_n"}),
            purpose="score",
        ),
    ),
    error,
    prefix="voyage",
)
