"""Parts of the answers of several dialects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.server.serving import request_id
from cenote.server.wire.items import CONTENT, PLAIN

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from starlette.requests import Request

    from cenote.core import ModelInfo, Output, Sequence
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.pipeline import Service
    from cenote.pipeline.prompts import Applied
    from cenote.server.serving import Serving
    from cenote.server.wire.fields import Inputs, Shared
    from cenote.tensors.similarity import Array


def head(
    serving: Serving,
    request: Request,
    body: Shared,
    prefix: str,
    sequences: Seq[Sequence],
    applied: Applied | None = None,
) -> dict[str, Any]:
    """Return `id`, `object`, `created`, `model` and `usage` of an answer."""
    return {
        "id": f"{prefix}-{request_id(request, body.request_id)}",
        "object": "list",
        "created": int(time.time()),
        "model": serving.name(body.model),
        "usage": usage(sequences, applied),
    }


def usage(sequences: Seq[Sequence], applied: Applied | None = None) -> dict[str, Any]:
    """Return the tokens of a request in OpenAI's five fields, and the prompt and adapters applied."""
    tokens = sum(map(len, sequences))
    details: dict[str, Any] = {}
    if applied is not None and applied.text:
        details |= {"prompt_name": applied.name, "prompt": applied.text}
    adapters = dict.fromkeys(sequence.adapter for sequence in sequences)
    adapters.pop(None, None)
    if adapters:
        details["adapters"] = list(adapters)
    return {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": details or None,
        "completion_tokens_details": None,
    }


def value(output: Output, service: Service, *, return_tokens: bool = False) -> Any:
    """Return an output as an answer has it: an array, or `{"indices", "values"}`, with `tokens` on request."""
    if output.indices is None:
        return output.data
    weights = {"indices": output.indices, "values": output.data}
    if not return_tokens:
        return weights
    return {**weights, "tokens": service.renderer.token_strings(output.indices.tolist())}


def labels(info: ModelInfo) -> list[str]:
    """Return the names of a model's classes, numbers where the checkpoint has none."""
    return [*info.labels] or [f"LABEL_{i}" for i in range(info.num_labels)]


def classes(info: ModelInfo, values: Array, count: int | None = None) -> list[dict[str, Any]]:
    """Return the classes of an input by falling score: the first `count`, or all."""
    names = labels(info)
    order = np.argsort(-values, kind="stable")[:count]
    return [{"label": names[i], "score": values[i]} for i in order.tolist()]


def is_ranker(info: ModelInfo) -> bool:
    """Return whether a model is made to rate pairs, and does not compare vectors."""
    return info.score_types[:1] in (("cross-encoder",), ("listwise",))


def capabilities(info: ModelInfo) -> list[str]:
    """Return the kinds of requests that a model answers, in the words of Cohere and of Infinity."""
    tasks = [task for task in info.tasks if task in ("embed", "classify")]
    return [*tasks, "rerank"] if info.score_types else tasks


def _illustrated(service: Service, body: Inputs, prompt: Any) -> Any:
    """Return a prompt with its pictures, if it is of content parts, and any other as it is."""
    if not isinstance(prompt, dict) or CONTENT not in prompt:
        return prompt
    if PLAIN in prompt and service.renderer.pictures is None:
        return prompt[PLAIN]
    return service.renderer.conversations.of_parts(prompt[CONTENT], body.mm_processor_kwargs)


def is_short(
    serving: Serving, request: Request, service: Service, body: Inputs, applied: Applied | None = None
) -> bool:
    """Return whether a request with `input` or `messages` is rendered in a moment, see `Serving.is_short`."""
    if not body.is_plain:
        return False
    pads = body.padding == "max_length"
    return serving.is_short(request, service, len(body.prompts()), applied, pads=pads)


def prompts_of(
    serving: Serving, service: Service, body: Inputs, applied: Applied | None = None
) -> tuple[list[Any], TextOptions]:
    """Return the prompts of a request with `input` or `messages`, and how they become ids.

    Raises:
        BadRequest: there are too many, or the chat template refuses one.
    """
    conversations = body.conversations()
    options = body.options(is_chat=conversations is not None)._replace(prompt=applied)
    if conversations is None:
        prompts = body.prompts()
        serving.check_count(len(prompts))
        return [_illustrated(service, body, prompt) for prompt in prompts], options
    serving.check_count(len(conversations))  # before any is rendered
    chat = body.chat_options(trust_template=serving.config.trust_request_chat_template)
    kwargs = body.mm_processor_kwargs
    prompts = [service.renderer.conversations.prompt(conversation, chat, kwargs) for conversation in conversations]
    return prompts, options._replace(rendered=True)
