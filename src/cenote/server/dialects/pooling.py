"""vLLM's own routes: `/pooling`, `/tokenize`, `/detokenize`, and the trip that its vector routes share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cenote import metrics
from cenote.engine.rendering import ChatOptions
from cenote.errors import BadRequest
from cenote.server.dialects.requests import Chat, Conversation, PoolingFields
from cenote.server.encoding import json_response, vectors_response
from cenote.server.serving import request_id
from cenote.types import PoolingParams

if TYPE_CHECKING:
    from cenote.server.serving import Serving
    from cenote.service import Service
    from cenote.types import Sequence

LARGE = 65_536
"""Answers with more numbers than this are encoded off the event loop."""


class PoolingRequest(PoolingFields):
    """Body of `POST /pooling`: as `/v1/embeddings`, and the task to run."""

    task: str | None = Field(None, description="default: the model's default task")
    data: Any = Field(None, description="input of an IO-processor plugin")

    @property
    def for_plugin(self) -> bool:
        """See `PoolingFields.for_plugin`."""
        return self.data is not None or self.task == "plugin"


class TokenizeRequest(Chat):
    """Body of `POST /tokenize`: `prompt` or `messages`."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = None
    prompt: str | None = None
    messages: Conversation | None = None
    add_generation_prompt: bool | None = Field(None, description="default: true for `messages`")  # type: ignore[assignment]
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError(
                "input", "Exactly one of `prompt` and `messages` must be given.", {"param": "prompt"}
            )
        return self


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**63)]]


def router(serving: Serving) -> APIRouter:
    """The routes of this dialect."""
    routes = APIRouter(tags=["vLLM"])

    @routes.post("/pooling")
    async def pooling(body: PoolingRequest, request: Request) -> Response:
        """The result of any task that the model offers: a vector or a matrix per input."""
        if body.for_plugin:
            raise BadRequest(
                "No IOProcessor plugin installed. Send `input` or `messages` instead of `data`.", param="data"
            )
        if body.dimensions is not None:
            raise BadRequest("dimensions is currently not supported", param="dimensions")
        task = body.task or serving.find(body.model).info.default_task
        return await answer_vectors(serving, request, body, task, prefix="pooling", kind="pooling", field="data")

    @routes.post("/tokenize")
    @routes.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt or a conversation, of any length."""
        service = serving.find(body.model)
        ids = await serving.in_pool("render", lambda: _tokens(serving, service, body))
        return json_response(
            {
                "count": len(ids),
                "max_model_len": service.info.max_model_len,
                "tokens": ids,
                "token_strs": service.renderer.token_strings(ids) if body.return_token_strs else None,
            }
        )

    @routes.post("/detokenize")
    @routes.post("/v1/detokenize", include_in_schema=False)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service = serving.find(body.model)
        text = await serving.in_pool("render", lambda: service.renderer.detokenize(body.tokens))
        return json_response({"prompt": text})

    return routes


def _tokens(serving: Serving, service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        special = body.add_special_tokens if body.add_special_tokens is not None else True
        return service.renderer.tokenize(body.prompt or "", add_special_tokens=special)
    options = body.chat_options(trust_template=serving.config.trust_request_chat_template)
    opens = body.add_generation_prompt if body.add_generation_prompt is not None else not body.continue_final_message
    options = ChatOptions(opens, options.continue_final_message, options.template, options.kwargs)
    text = service.renderer.chat_text(body.messages, options)
    return service.renderer.tokenize(text, add_special_tokens=bool(body.add_special_tokens))


async def answer_vectors(
    serving: Serving, request: Request, body: PoolingFields, task: str, *, prefix: str, kind: str, field: str
) -> Response:
    """The whole trip of a request whose answer is one vector or matrix per input."""
    service = serving.find(body.model)
    body.refuse_media()
    params = PoolingParams(use_activation=body.use_activation, dimensions=body.dimensions)
    sequences, outputs = await serving.compute(request, service, lambda: _render(serving, service, body, task, params))
    tokens = sum(map(len, sequences))
    head = {
        "id": f"{prefix}-{request_id(request, body.request_id)}",
        "object": "list",
        "created": int(time.time()),
        "model": serving.name(body.model),
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
    }
    vectors = [output.data for output in outputs]

    def encode() -> Response:
        return vectors_response(
            head,
            vectors,
            kind=kind,
            field=field,
            encoding_format=body.encoding_format,
            embed_dtype=body.embed_dtype,
            endianness=body.endianness,
        )

    if sum(v.size for v in vectors) > LARGE:
        return await serving.in_pool("encode", encode)
    with metrics.stage_seconds.labels("encode").time():
        return encode()


def _render(
    serving: Serving, service: Service, body: PoolingFields, task: str, params: PoolingParams
) -> list[Sequence]:
    conversations = body.conversations()
    options = body.text_options(is_chat=conversations is not None)
    if conversations is None:
        prompts = body.prompts()
    else:
        serving.check_count(len(conversations))  # before any is rendered
        chat = body.chat_options(trust_template=serving.config.trust_request_chat_template)
        prompts = [service.renderer.chat_text(conversation, chat) for conversation in conversations]
    serving.check_count(len(prompts))
    return service.renderer.render(prompts, task, params, options)
