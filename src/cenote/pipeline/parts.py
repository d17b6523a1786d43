"""Content parts of messages: texts, and pictures by any of the names that clients have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

PARAM = "messages"
NAMES = ("image_url", "image", "image_pil", "input_image")
"""Types of parts that are pictures."""
PLACES = ("image_url", "image", "image_pil", "url", "path")
"""Keys of such a part that name the picture, or hold it."""
OTHERS = ("input_audio", "audio_url", "audio", "video_url", "video", "image_embeds", "input_file")
"""Types of parts that are refused by name."""


class Read(NamedTuple):
    """Messages with pictures.

    Attributes:
        messages: as a chat template takes them, with `{"type": "image"}` for each picture that it is to place.
        sources: the pictures, in order.
    """

    messages: list[dict[str, Any]]
    sources: list[Any]


def read(messages: Seq[Mapping[str, Any]], placeholder: str) -> Read:
    """Read the content parts of messages.

    Pictures whose places a text names are left out of the messages: some clients send both a part with the picture and
    a text part with its placeholder.

    Args:
        messages: each with a role and its content, a text or a list of parts.
        placeholder: the text of the token that stands for a picture; empty = there is none.

    Raises:
        BadRequest: a part is of another type, or has no picture.
    """
    contents = [_parts(message.get("content")) for message in messages]
    sources = [part.source for parts in contents for part in parts if isinstance(part, Found)]
    texts = [part for parts in contents for part in parts if isinstance(part, str)]
    are_placed = bool(placeholder) and sum(text.count(placeholder) for text in texts) == len(sources)
    shown = []
    for message, parts in zip(messages, contents, strict=True):
        kept = [part for part in parts if isinstance(part, str) or not are_placed]
        shown.append({**message, "content": [_shown(part) for part in kept]})
    return Read(shown, sources)


def has_pictures(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a content part of a message is a picture or of a type that is refused by name."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(_type(part) in (*NAMES, *OTHERS) for part in content):
            return True
    return False


def texts_and_pictures(messages: Iterable[Mapping[str, Any]]) -> tuple[str | None, ...]:
    """Return the parts of messages that were read, as `Illustrated.content`."""
    return tuple(part.get("text") for message in messages for part in message["content"])


class Found(NamedTuple):
    """A picture among the parts of a message."""

    source: Any


def _parts(content: Any) -> list[str | Found]:
    """Return the parts of a message's content."""
    if isinstance(content, list):
        return [_part(part) for part in content]
    return [] if content is None else [str(content)]


def _part(part: Any) -> str | Found:
    """Return a part's text, or its picture."""
    if isinstance(part, str):
        return part
    kind = _type(part)
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind not in NAMES:
        raise BadRequest(
            f"content parts of type {kind!r} are not supported by this model, only text and {NAMES[0]}", param=PARAM
        )
    if part.get("uuid") is not None:
        raise BadRequest(
            "content parts with a `uuid` are not supported: pictures are known by their content; leave it out",
            param=PARAM,
        )
    source = next((part[name] for name in PLACES if part.get(name) is not None), None)
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise BadRequest(f"a content part of type {kind!r} needs a picture, as {{'url': ...}}", param=PARAM)
    return Found(source)


def _type(part: Any) -> str:
    """Return the type of a part, by its keys where it names none."""
    if not isinstance(part, Mapping):
        return "text" if isinstance(part, str) else type(part).__name__
    named = part.get("type")
    if named is not None:
        return str(named)
    return next((name for name in (*NAMES, *OTHERS) if name in part), "text")


def _shown(part: str | Found) -> dict[str, Any]:
    """Return a part as a chat template takes it."""
    return {"type": "image"} if isinstance(part, Found) else {"type": "text", "text": part}
