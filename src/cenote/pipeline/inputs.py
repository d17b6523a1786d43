"""Forms of an input: text, token ids, mappings of either, and messages with content parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cenote.errors import BadRequest
from cenote.functions import coalesce
from cenote.pipeline.tokenizing import Ids

Prompt = str | Ids | Mapping[str, Any] | Any
"""Text, ids, a mapping of either, or a picture: `PIL.Image.Image`, the bytes of a file, or its path."""
Pair = tuple[str, str]
"""Two texts that a model reads together."""


@dataclass(frozen=True)
class Illustrated:
    """A prompt with pictures.

    Attributes:
        content: text or ids with a placeholder for each picture; or texts and, as `None`, pictures, in order, which the
            model's template renders.
        sources: the pictures, see `cenote.pipeline.media.picture`.
        kwargs: arguments of the image processor (`mm_processor_kwargs`).
    """

    content: str | Ids | tuple[str | None, ...]
    sources: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """Its texts that are not empty."""
        parts = self.content if isinstance(self.content, tuple) else (self.content,)
        return [part for part in parts if isinstance(part, str) and part]


Side = str | Illustrated
"""Query or document."""


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


def content_of(prompt: Prompt | Pair, place: int) -> str | Ids | Illustrated:
    """Return the text, the ids or the pictures of a prompt; a pair has none of them.

    Args:
        prompt: in any form.
        place: its index among the inputs, for the message of an error.

    Raises:
        BadRequest: it has another form.
    """
    if isinstance(prompt, Illustrated):
        return prompt
    if isinstance(prompt, Mapping):
        return _of_mapping(prompt, place)
    if is_picture(prompt):
        return Illustrated((None,), (prompt,))
    return _plain(prompt, place)


def is_picture(value: Any) -> bool:
    """Return whether `value` can only be a picture: opened by Pillow, the bytes of a file, or a path."""
    return isinstance(value, (bytes, bytearray, memoryview, Path)) or hasattr(value, "getexif")


def has_pictures(prompt: Any) -> bool:
    """Return whether a prompt, of any form, has pictures."""
    if isinstance(prompt, Mapping):
        return bool(prompt.get("multi_modal_data")) or prompt.get("image") is not None
    return isinstance(prompt, Illustrated) or is_picture(prompt)


def _plain(prompt: Any, place: int) -> str | Ids:
    """Return a prompt that is text or ids."""
    if isinstance(prompt, str):
        return prompt
    if is_ids(prompt):
        return list(prompt)
    kind = type(prompt).__name__
    raise BadRequest(f"a prompt is text or a list of token ids, got {kind} at index {place}", param="input")


def _of_mapping(prompt: Mapping[str, Any], place: int) -> str | Ids | Illustrated:
    """Return the content of `{"prompt": ...}` and `{"prompt_token_ids": ...}`, which may bring `multi_modal_data`.

    Those of sentence-transformers, `{"text": ..., "image": ...}`, have parts in the order of their keys.
    """
    if prompt and set(prompt) <= {"text", "image"}:
        return _of_parts(prompt)
    unknown = set(prompt) - {*CONTENTS, *OF_MEDIA}
    if unknown:
        raise BadRequest(f"a prompt has keys that are not supported: {sorted(unknown)}", param="input")
    names = CONTENTS & prompt.keys()
    if len(names) != 1:
        raise BadRequest("a prompt has either `prompt` or `prompt_token_ids`", param="input")
    content = _plain(prompt[names.pop()], place)
    media, kwargs = (_mapping(prompt, name) for name in OF_MEDIA)
    sources = _sources(media)
    return Illustrated(content, sources, kwargs) if sources else content


CONTENTS = {"prompt", "prompt_token_ids"}
OF_MEDIA = ("multi_modal_data", "mm_processor_kwargs")


def _mapping(prompt: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the dict that a prompt has under `name`, by default an empty one."""
    value = coalesce(prompt.get(name), {})
    if not isinstance(value, Mapping):
        raise BadRequest(f"{name} of a prompt must be a dict, got {value!r:.80}", param="input")
    return value


def _sources(data: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the pictures in `multi_modal_data`, of which each kind is one or a list."""
    others = sorted(set(data) - {"image"})
    if others:
        raise BadRequest(f"multi_modal_data has {', '.join(others)}; only `image` is supported", param="input")
    return as_sources(data.get("image"))


def as_sources(value: Any) -> tuple[Any, ...]:
    """Return one picture or a list of them as a tuple; `None` = there are none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _of_parts(prompt: Mapping[str, Any]) -> Illustrated:
    """Return texts and pictures in the order of their keys."""
    parts: list[str | None] = []
    for name, value in prompt.items():
        if name == "image":
            parts += [None] * len(as_sources(value))
        elif isinstance(value, str):
            parts.append(value)
        else:
            raise BadRequest(f"`text` of a prompt must be a text, got {type(value).__name__}", param="input")
    return Illustrated(tuple(parts), as_sources(prompt.get("image")))


def content_of_message(message: Mapping[str, Any]) -> str | list[Any] | None:
    """Return the text or the content parts of a message; `None` = it has calls of tools instead.

    Raises:
        BadRequest: it has another content, or no role.
    """
    content: str | list[Any] | None = message.get("content")
    _check_field("role", message.get("role"), str, "a text")
    instead = message.get("tool_calls") or None
    _check_field("content", coalesce(content, instead), (str, list), "a text or a list of content parts")
    return content


def _check_field(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kinds):
        message = f"got {value!r:.80} as the `{name}` of a message, which must be {expected}"
        raise BadRequest(message, param="messages")


def flattened(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its content parts joined into one text, as templates of text models expect."""
    content = content_of_message(message)
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
