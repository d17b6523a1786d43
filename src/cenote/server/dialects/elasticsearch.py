"""Elasticsearch's dialect: its service `hugging_face` posts to the URL itself, and reads sparse vectors by token.

Its bodies are those of Text Embeddings Inference, so that the prefix alone tells them from others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from cenote.core import PoolingParams
from cenote.server.dialects import tei
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Many
from cenote.server.wire.pairs import RankingFields
from cenote.server.wire.plain import encoded

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Output
    from cenote.pipeline.rendering import Renderer
    from cenote.server.serving import Serving


class ElasticRequest(tei.RootRequest):
    """Body of a request for vectors or classes."""


class ElasticRerankRequest(RankingFields):
    """Body of a request for an order: of `texts`, or in older releases of `documents`."""

    query: str
    texts: Many[str] | None = None
    documents: Many[str] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ElasticRerankRequest:
        if (self.texts is None) == (self.documents is None):
            raise PydanticCustomError(
                "input", "Exactly one of `texts` and `documents` must be given.", {"param": "texts"}
            )
        return self


async def root(serving: Serving, request: Request, body: ElasticRequest) -> Response:
    """As `POST /`; the weights of a sparse vector stand under their tokens."""
    service = serving.find(body.model)
    if service.info.default_task != "sparse":
        return await tei.root(serving, request, body)

    def encode(outputs: list[Output]) -> Response:
        return json_response([_weights(service.renderer, output) for output in outputs])

    options = body.prompted(service.renderer)
    return await encoded(
        serving, request, service, body, body.prompts(), "sparse", PoolingParams(), options, encode, is_slow=True
    )


def _weights(renderer: Renderer, output: Output) -> dict[str, Any]:
    assert output.indices is not None
    return dict(zip(renderer.token_strings(output.indices.tolist()), output.data, strict=True))


async def rerank(serving: Serving, request: Request, body: ElasticRerankRequest) -> Response:
    """The texts by falling relevance to the query, as a bare list."""
    documents: Any = body.documents if body.texts is None else body.texts
    return await tei.in_order(serving, request, body, (body.query, documents))


FORCED = frozenset({"elasticsearch"})
"""Key that no body has: these routes are reached by the prefix alone."""
DIALECT = Dialect(
    "Elasticsearch",
    (
        Route("/", root, ElasticRequest, is_described=False, marks=FORCED),
        Route(
            "/",
            rerank,
            ElasticRerankRequest,
            is_described=False,
            marks=frozenset({"query"}),
            either=frozenset({"texts", "documents"}),
            purpose="score",
        ),
        Route("/rerank", rerank, ElasticRerankRequest, is_described=False, marks=FORCED, purpose="score"),
    ),
    tei.error,
    prefix="elasticsearch",
)
