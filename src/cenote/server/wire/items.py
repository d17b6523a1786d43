"""Texts and pictures by the forms that vendors have for one input, as content parts.

Jina's inputs are objects (`{"image": ...}`), Infinity's and NIM's are texts that hold the URL of a picture, told by
`modality`. Without a modality a text that is a `data:` URL, or ends with one, is a picture for a model that takes them.
"""

from __future__ import annotations

import re
import reprlib
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Callable

CONTENT = "content"
"""Key of an input that holds content parts."""
PLAIN = "plain"
"""Key of such an input with the text that it was, for a model that takes no pictures."""
KEYS = ("text", "image", "url", "bytes")
"""Keys of inputs that are objects; all but the first are pictures."""
SCHEME = "data:image/"
_FILE = re.compile(r"[\w.+-]+;base64,[A-Za-z0-9+/=]+")
"""The rest of the URL of a picture."""


def is_object(item: Any) -> bool:
    """Return whether an input is an object; messages, which have a role, are not."""
    return isinstance(item, dict) and "role" not in item


def read(inputs: Any, modality: Any) -> Any:
    """Return inputs as texts, or where one has a picture all that are no messages as content parts.

    Args:
        inputs: of a request.
        modality: what they are, of all or a list with one for each; `None` = their form tells.

    Raises:
        PydanticCustomError: the modality is not served, or an input does not fit it.
    """
    listed = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(listed, list) or not listed or isinstance(listed[0], int):
        return inputs
    if modality is None and not any(map(_has_form, listed)):
        return inputs
    items = [*map(_content, _of_modality(listed, modality))]
    if any(isinstance(item, dict) and CONTENT in item for item in items):
        items = [{CONTENT: [_part("text", item)]} if isinstance(item, str) else item for item in items]
    return items


def with_picture(item: dict[str, Any]) -> dict[str, Any]:
    """Return an object with `image`, and maybe `text`, as one with content parts; any other as it is."""
    if CONTENT in item or not isinstance(item.get("image"), str):
        return item
    values = {key: item[key] for key in ("text", "image") if isinstance(item.get(key), str)}
    return {CONTENT: [*starmap(_part, values.items())]}


def _has_form(item: Any) -> bool:
    """Return whether an input may be more than a text, ids or a message."""
    return SCHEME in item if isinstance(item, str) else is_object(item)


def _of_modality(inputs: list[Any], modality: Any) -> list[Any]:
    """Return inputs with those that have pictures as objects."""
    if modality is None:
        return [*map(_told_by_form, inputs)]
    names = modality if isinstance(modality, list) else [modality]
    if len(names) not in (1, len(inputs)):
        raise PydanticCustomError(
            "modality",
            f"got {len(names)} modalities of {len(inputs)} inputs; expected one of all, or one for each",
            {"param": "modality"},
        )
    return [*map(_as, inputs, repeat(names[0]) if len(names) == 1 else names)]


def _told_by_form(item: Any) -> Any:
    """Return a text with a picture as an object, which keeps the text, and any other input as it is."""
    if not isinstance(item, str) or SCHEME not in item:
        return item
    values = _divided(item)
    return {**values, PLAIN: item} if values else item


def _as(item: Any, modality: Any) -> Any:
    """Return an input of a modality: as it is, or as an object with a picture."""
    reader = MODALITIES.get(modality) if isinstance(modality, str) else None
    if reader is None:
        raise PydanticCustomError(
            "modality",
            f"got the modality {modality!r}; expected {', '.join(map(repr, MODALITIES))}: nothing else is embedded "
            "here",
            {"param": "modality"},
        )
    return reader(item) if isinstance(item, str) else item


def _text(item: str) -> str:
    return item


def _image(item: str) -> dict[str, str]:
    return {"image": item}


def _text_image(item: str) -> dict[str, str]:
    values = _divided(item)
    if values is None:
        raise PydanticCustomError(
            "modality",
            "got a text without a picture of the modality 'text_image'; expected a text, and behind it the URL of a "
            "picture: 'A fox. data:image/png;base64,...'",
            {"param": "input"},
        )
    return values


MODALITIES: dict[str, Callable[[str], Any]] = {"text": _text, "image": _image, "text_image": _text_image}
"""Readers of inputs that are texts, by their modality."""


def _divided(item: str) -> dict[str, str] | None:
    """Return a text and the URL of the picture at its end; `None` if it has none there."""
    text, scheme, rest = item.rstrip().rpartition(SCHEME)
    if text[-1:].strip() or not scheme or not _FILE.fullmatch(rest):
        return None
    picture = {"image": scheme + rest}
    text = text.rstrip()
    return {"text": text, **picture} if text else picture


def _content(item: Any) -> Any:
    """Return the text of an input that is an object, or its content parts; and other inputs as they are."""
    if not is_object(item):
        return item
    values = {key: item[key] for key in KEYS if item.get(key) is not None}
    if not values or not all(isinstance(value, str) for value in values.values()):
        raise PydanticCustomError(
            "input",
            f"got an input with the keys {reprlib.repr(sorted(item))}; expected a text, {{'text': ...}}, or "
            "{'image': URL or base64}; messages have a role",
            {"param": "input"},
        )
    if values.keys() == {"text"}:
        return values["text"]
    plain = {PLAIN: item[PLAIN]} if PLAIN in item else {}
    return {CONTENT: [*starmap(_part, values.items())], **plain}


def _part(key: str, value: str) -> dict[str, Any]:
    """Return a value of an input that is an object as a content part. A picture is a URL, or its file's base64."""
    if key == "text":
        return {"type": "text", "text": value}
    url = value if ":" in value[:16] else f"data:image/png;base64,{value}"
    return {"type": "image_url", "image_url": {"url": url}}
