"""What the answers of several dialects have in common."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cenote.server.serving import request_id

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from starlette.requests import Request

    from cenote.server.dialects.requests import Inputs, Shared
    from cenote.server.serving import Serving
    from cenote.service import Service
    from cenote.types import PoolingParams, Sequence


def head(serving: Serving, request: Request, body: Shared, prefix: str, sequences: Seq[Sequence]) -> dict[str, Any]:
    """`id`, `object`, `created`, `model` and `usage` of an answer."""
    return {
        "id": f"{prefix}-{request_id(request, body.request_id)}",
        "object": "list",
        "created": int(time.time()),
        "model": serving.name(body.model),
        "usage": usage(sequences),
    }


def usage(sequences: Seq[Sequence]) -> dict[str, int | None]:
    """The tokens that a request was charged with, in OpenAI's five fields."""
    tokens = sum(map(len, sequences))
    return {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def render(serving: Serving, service: Service, body: Inputs, task: str, params: PoolingParams) -> list[Sequence]:
    """The sequences of a request with `input` or `messages`."""
    conversations = body.conversations()
    options = body.options(is_chat=conversations is not None)
    if conversations is None:
        prompts = body.prompts()
    else:
        serving.check_count(len(conversations))  # before any is rendered
        chat = body.chat_options(trust_template=serving.config.trust_request_chat_template)
        prompts = [service.renderer.chat_text(conversation, chat) for conversation in conversations]
    serving.check_count(len(prompts))
    return service.render(prompts, task, params, options)
