"""Ollama's dialect: `/api/embed`, its older form `/api/embeddings`, and the list of models."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AliasChoices, Field, field_validator

import cenote
from cenote.core import PoolingParams
from cenote.pipeline.options import TextOptions
from cenote.server.errors import text_error
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Body, Many, Queued
from cenote.server.wire.plain import encoded

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Output
    from cenote.pipeline.pipeline import Service
    from cenote.server.serving import Serving

TAG = ":latest"
"""Tag that clients add to names without one."""


def _untagged(name: str | None) -> str | None:
    return name and name.removesuffix(TAG)


class OllamaOptions(Body):
    """Options of a model, of which vectors depend on one."""

    num_ctx: Annotated[int, Field(ge=0)] = Field(0, description="tokens to which texts are cut; 0 = the model's")


class OllamaFields(Queued):
    """Fields of requests for vectors."""

    model: str | None = None
    truncate: bool = Field(True, description="cut what is too long")
    dimensions: int | None = None
    options: OllamaOptions = OllamaOptions(num_ctx=0)

    _model = field_validator("model")(_untagged)

    def text_options(self, max_model_len: int) -> TextOptions:
        """Return how text becomes ids."""
        if not self.truncate:
            return TextOptions(whole=True)
        length = self.options.num_ctx
        return TextOptions(length if 0 < length < max_model_len else -1)


class OllamaEmbedRequest(OllamaFields):
    """Body of `POST /api/embed`."""

    input: str | Many[str]


class OllamaEmbeddingRequest(OllamaFields):
    """Body of `POST /api/embeddings`."""

    prompt: str


class OllamaShowRequest(Body):
    """Body of `POST /api/show`."""

    model: str | None = Field(None, validation_alias=AliasChoices("model", "name"))

    _model = field_validator("model")(_untagged)


async def embed(serving: Serving, request: Request, body: OllamaEmbedRequest) -> Response:
    """One vector per text."""
    began = time.monotonic_ns()

    def form(vectors: list[Any]) -> dict[str, Any]:
        return {
            "model": serving.name(body.model),
            "embeddings": vectors,
            "total_duration": time.monotonic_ns() - began,
            "load_duration": 0,
            "prompt_eval_count": request.state.tokens,
        }

    texts = [body.input] if isinstance(body.input, str) else body.input
    return await _vectors(serving, request, body, texts, form)


async def embedding(serving: Serving, request: Request, body: OllamaEmbeddingRequest) -> Response:
    """The vector of a text."""
    return await _vectors(serving, request, body, [body.prompt], lambda vectors: {"embedding": vectors[0]})


async def _vectors(serving: Serving, request: Request, body: OllamaFields, texts: list[str], form: Any) -> Response:
    service = serving.find(body.model)
    params = PoolingParams(dimensions=body.dimensions)
    options = body.text_options(service.info.limit("embed"))

    def encode(outputs: list[Output]) -> Response:
        return json_response(form([np.ascontiguousarray(output.data) for output in outputs]))

    return await encoded(serving, request, service, body, texts, "embed", params, options, encode)


async def tags(serving: Serving, request: Request, body: None) -> Response:
    """One card per name under which a model is served."""
    views = serving.models.views
    return json_response({"models": [_card(serving, view, name) for view in views for name in view.names]})


async def show(serving: Serving, request: Request, body: OllamaShowRequest) -> Response:
    """The model."""
    service = serving.find(body.model)
    architecture = service.info.architecture
    facts = {
        "general.architecture": architecture,
        f"{architecture}.context_length": service.info.max_model_len,
        f"{architecture}.embedding_length": service.info.dimension,
    }
    return json_response({
        "modelfile": "",
        "parameters": "",
        "template": "{{ .Prompt }}",
        "details": _details(service),
        "model_info": facts,
        "capabilities": ["embedding"],
        "modified_at": _started(serving),
    })  # fmt: skip


async def version(serving: Serving, request: Request, body: None) -> Response:
    """Version of Cenote."""
    return json_response({"version": cenote.__version__})


def _card(serving: Serving, service: Service, name: str) -> dict[str, Any]:
    """Return the card of a model. The bytes of its files are not known here, and clients take no null."""
    return {
        "name": name,
        "model": name,
        "modified_at": _started(serving),
        "size": 0,
        "digest": service.info.report.revision or "",
        "details": _details(service),
    }


def _details(service: Service) -> dict[str, Any]:
    family = service.info.architecture
    dtype = service.info.report.dtype
    return {
        "parent_model": service.parent or "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": dtype,
    }


def _started(serving: Serving) -> str:
    return datetime.fromtimestamp(serving.started, UTC).isoformat()


DIALECT = Dialect(
    "Ollama",
    (
        Route("/api/embed", embed, OllamaEmbedRequest, purpose="embed"),
        Route("/api/embeddings", embedding, OllamaEmbeddingRequest, purpose="embed"),
        Route("/api/tags", tags, method="GET"),
        Route("/api/show", show, OllamaShowRequest),
        Route("/api/version", version, method="GET"),
    ),
    text_error,
    prefix="ollama",
)
