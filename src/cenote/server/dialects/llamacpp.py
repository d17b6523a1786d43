"""The dialect of llama.cpp's server: `content` on `/embedding` and `/tokenize`, and rerank under `/reranking`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from cenote.core import PoolingParams
from cenote.pipeline.options import TextOptions
from cenote.server.dialects import scoring
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Body, Queued, TextInput, is_prompt, prompts_in
from cenote.server.wire.plain import encoded

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Output
    from cenote.server.serving import Serving

UNNORMALISED = -1
"""Value of `embd_normalize` for vectors as they are."""


class LlamaEmbeddingRequest(Queued):
    """Body of `POST /embedding`."""

    model: str | None = None
    content: TextInput
    embd_normalize: Literal[-1, 2] | None = Field(
        None, description="-1: not at all; 2: to length 1; default: the model's"
    )

    def params(self) -> PoolingParams:
        """Return the parameters of the task."""
        activation = None if self.embd_normalize is None else self.embd_normalize != UNNORMALISED
        return PoolingParams(use_activation=activation)


class LlamaTokenizeRequest(Body):
    """Body of `POST /tokenize` with `content`."""

    model: str | None = None
    content: str
    add_special: bool = False
    parse_special: Literal[True] = Field(True, description="true: texts of special tokens become these tokens")
    with_pieces: bool = False


async def embedding(serving: Serving, request: Request, body: LlamaEmbeddingRequest) -> Response:
    """`{"embedding"}` of one text, as older servers; of a list an entry each, whose vector is in a list."""
    is_one = is_prompt(body.content)

    def encode(outputs: list[Output]) -> Response:
        vectors = [np.ascontiguousarray(output.data) for output in outputs]
        if is_one:
            return json_response({"index": 0, "embedding": vectors[0]})
        return json_response([{"index": i, "embedding": [vector]} for i, vector in enumerate(vectors)])

    service, prompts = serving.find(body.model), prompts_in(body.content)
    return await encoded(serving, request, service, body, prompts, "embed", body.params(), TextOptions(), encode)


async def tokenize(serving: Serving, request: Request, body: LlamaTokenizeRequest) -> Response:
    """The token ids of a text, each with its vocabulary entry on request."""
    renderer = serving.find(body.model).renderer

    def tokens() -> Response:
        serving.check_size(body.content, "content")
        ids = renderer.tokenize(body.content, add_special_tokens=body.add_special)
        if not body.with_pieces:
            return json_response({"tokens": ids})
        pieces = zip(ids, renderer.token_strings(ids), strict=True)
        return json_response({"tokens": [{"id": number, "piece": piece} for number, piece in pieces]})

    return await serving.rendered(request, tokens)


CONTENT = frozenset({"content"})
DIALECT = Dialect(
    "llama.cpp",
    (
        Route("/embedding", embedding, LlamaEmbeddingRequest, purpose="embed"),
        Route("/embeddings", embedding, LlamaEmbeddingRequest, is_described=False, marks=CONTENT, purpose="embed"),
        Route("/tokenize", tokenize, LlamaTokenizeRequest, is_described=False, marks=CONTENT),
        Route("/v1/reranking", scoring.rerank, scoring.RerankRequest, aliases=("/reranking",), purpose="score"),
    ),
    prefix="llamacpp",
)
