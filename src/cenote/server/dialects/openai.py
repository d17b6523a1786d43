"""OpenAI's dialect, with vLLM's extensions: `/v1/embeddings` and `/v1/models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from cenote.server.dialects.pooling import answer_vectors
from cenote.server.dialects.requests import PoolingFields
from cenote.server.encoding import json_response

if TYPE_CHECKING:
    from cenote.server.serving import Serving


class EmbeddingRequest(PoolingFields):
    """Body of `POST /v1/embeddings`: `input` (text, ids, or lists of them) or `messages`."""


def router(serving: Serving) -> APIRouter:
    """The routes of this dialect."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/embeddings")
    @routes.post("/embeddings", include_in_schema=False)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """One vector per input."""
        return await answer_vectors(serving, request, body, "embed", prefix="embd", kind="embedding", field="embedding")

    @routes.get("/v1/models")
    @routes.get("/models", include_in_schema=False)
    async def models() -> Response:
        """One card per name under which a model is served."""
        cards = [_card(serving, service, name) for service in serving.services for name in service.names]
        return json_response({"object": "list", "data": cards})

    return routes


def _card(serving: Serving, service: Any, name: str) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": serving.started,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": serving.started,
        "owned_by": "cenote",
        "root": service.info.name,
        "parent": None,
        "max_model_len": service.info.max_model_len,
        "permission": [permission],
    }
