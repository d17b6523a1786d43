"""Content parts of messages: texts, and pictures by any of the names that clients have for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.errors import BadRequest
from cenote.functions import coalesce
from cenote.pipeline.inputs import content_of_message

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

PARAM = "messages"
NAMES = ("image_url", "image", "image_pil", "input_image", "image_base64")
"""Types of parts that are pictures."""
PLACES = ("image_url", "image", "image_pil", "image_base64", "url", "path")
"""Keys of such a part that name the picture, or hold it."""
OTHERS = (
    "input_audio", "audio_url", "audio", "audio_embeds", "video_url", "video_base64", "video", "video_embeds",
    "image_embeds", "prompt_embeds", "input_file",
)  # fmt: skip
"""Types of parts that are refused by name."""

NO_NAMES = "content parts with a `uuid` are not supported: pictures are known by their content; leave it out"


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
    reader = _Reader()
    shown = [reader.message(message) for message in messages]
    if placeholder and "".join(reader.texts).count(placeholder) == len(reader.sources):
        shown = [_without_pictures(message) for message in shown]
    return Read(shown, reader.sources)


def media_type(messages: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the type of the first content part that is a picture, or is refused by name; `None` = there is none."""
    contents = (message.get("content") for message in messages)
    lists = (content for content in contents if isinstance(content, list))
    parts = (part for part in chain.from_iterable(lists) if isinstance(part, Mapping))
    return next(filter({*NAMES, *OTHERS}.__contains__, map(_type, parts)), None)


def texts_and_pictures(messages: Iterable[Mapping[str, Any]]) -> tuple[str | None, ...]:
    """Return the parts of messages that were read, as `Illustrated.content`."""
    parts = chain.from_iterable(message["content"] for message in messages)
    return tuple(part.get("text") for part in parts)


@dataclass
class _Reader:
    """Texts and pictures that were met in content parts."""

    texts: list[str] = field(default_factory=list)
    sources: list[Any] = field(default_factory=list)

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message as a chat template takes it."""
        content = coalesce(content_of_message(message), "")
        parts = content if isinstance(content, list) else [content]
        return {**message, "content": [self._part(part) for part in parts]}

    def _part(self, part: Any) -> dict[str, Any]:
        """Return a part as a chat template takes it."""
        kind = _type(part)
        text = part if isinstance(part, str) else part.get("text")
        if kind == "text" and isinstance(text, str):
            self.texts.append(text)
            return {"type": "text", "text": text}
        if kind not in NAMES:
            raise BadRequest(
                f"content parts of type {kind!r} are not supported by this model, only text and {NAMES[0]}",
                param=PARAM,
            )
        self.sources.append(_source(part, kind))
        return {"type": "image"}


def _source(part: Mapping[str, Any], kind: str) -> Any:
    """Return the picture of a part, or its name."""
    if part.get("uuid") is not None:
        raise BadRequest(NO_NAMES, param=PARAM)
    source = next(filter(None, map(part.get, PLACES)), None)
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise BadRequest(f"a content part of type {kind!r} needs a picture, as {{'url': ...}}", param=PARAM)
    return source


def _type(part: Any) -> str:
    """Return the type of a part, by its keys where it names none."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        raise BadRequest(f"a content part must be an object or a text, got {type(part).__name__}", param=PARAM)
    by_keys = next(filter(part.__contains__, (*NAMES, *OTHERS)), "text")
    return str(coalesce(part.get("type"), by_keys))


def _without_pictures(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose parts are its texts alone."""
    return {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
