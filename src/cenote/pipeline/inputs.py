"""Forms of an input: text, token ids, mappings of either, and messages with content parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.errors import BadRequest
from cenote.pipeline.tokenizing import Ids

if TYPE_CHECKING:
    from cenote.core import Pair

Prompt = str | Ids | Mapping[str, Any]


def is_ids(prompt: Any) -> bool:
    """Return whether `prompt` is a list, tuple or array of integers, which booleans are not."""
    if not isinstance(prompt, (list, tuple, np.ndarray)):
        return False
    return all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, prompt)))


def listed(prompts: Any) -> list[Any]:
    """Return prompts as a list: one text, mapping or list of ids is a single prompt."""
    is_one = isinstance(prompts, (str, bytes, bytearray, memoryview)) or hasattr(prompts, "keys")
    if is_one or not hasattr(prompts, "__iter__"):
        return [prompts]
    elements = list(prompts)
    return [elements] if elements and is_ids(elements) else elements


def is_count(value: Any) -> bool:
    """Return whether `value` is a non-negative integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def content_of(prompt: Prompt | Pair) -> str | Ids:
    """Return the text or the ids of a prompt; a pair has neither."""
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown:
            raise BadRequest(f"a prompt has keys that are not supported: {sorted(unknown)}", param="input")
        if len(prompt) != 1:
            raise BadRequest("a prompt has either `prompt` or `prompt_token_ids`", param="input")
        (prompt,) = prompt.values()
    if isinstance(prompt, str):
        return prompt
    if is_ids(prompt):
        return list(prompt)  # type: ignore[arg-type]
    raise BadRequest(f"a prompt is text or a list of token ids, got {type(prompt).__name__}", param="input")


def flattened(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its content parts joined into one text, as templates of text models expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": "\n".join(map(_text_of_part, content))}


def _text_of_part(part: Any) -> str:
    """Return the text of a content part: a str, or a mapping of type "text"."""
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, Mapping) else {"type": type(part).__name__}
    text = fields.get("text")
    if fields.get("type", "text") == "text" and isinstance(text, str):
        return text
    kind = fields.get("type", "?")
    raise BadRequest(f"content parts of type {kind!r} are not supported by this model, only text", param="messages")
