"""From the bytes of a request to the validated body that its route takes."""

from __future__ import annotations

import json
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from cenote.server.errors import BadBody
from cenote.server.wire.fields import Body

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import BaseModel

    from cenote.server.wire.fields import Lengths

DEEPEST = 200
"""Levels of lists and objects, pydantic's own limit: no walk through a body may run out of stack."""
MISSING = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}


def parse(content: bytes) -> Any:
    """Return the JSON value of a body.

    Raises:
        BadBody: it is not JSON.
        HTTPException: it cannot be read at all.
    """
    if not content:
        raise BadBody([MISSING])
    return _parsed(content)


def validate(value: Any, kind: type[BaseModel], lengths: Lengths) -> Any:
    """Return a parsed body as `kind`.

    Raises:
        BadBody: it does not fit `kind`.
        BadRequest: a list in it is longer than `lengths` allow.
    """
    if issubclass(kind, Body):
        kind.check_lengths(value, lengths)
    try:
        return _adapter(kind).validate_python(value, from_attributes=True)
    except ValidationError as error:
        entries = error.errors(include_url=False)
        raise BadBody([{**entry, "loc": ("body", *entry["loc"])} for entry in entries]) from error


@cache
def _adapter(kind: type[BaseModel]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _parsed(content: bytes) -> Any:
    """Parse JSON. Python's own reader has the last word: it takes other Unicode encodings and lone surrogates too."""
    try:
        return from_json(content)
    except ValueError:
        pass
    try:
        value = json.loads(content)
    except (RecursionError, UnicodeDecodeError) as error:
        raise HTTPException(400, "There was an error parsing the body") from error
    except json.JSONDecodeError as error:
        raise _invalid(error.msg, error.pos) from error
    except ValueError as error:
        raise _invalid(str(error).partition(";")[0], 0) from error
    if _is_deep(value):
        raise _invalid(f"lists and objects are nested more than {DEEPEST} levels deep", 0)
    return value


def _is_deep(value: Any) -> bool:
    """Return whether a value is nested more than `DEEPEST` levels deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [*chain.from_iterable(map(_entries, level))]
    return bool(level)


def _entries(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _invalid(message: str, position: int) -> BadBody:
    entry = {"type": "json_invalid", "loc": ("body", position), "msg": "JSON decode error", "input": {}}
    return BadBody([{**entry, "ctx": {"error": message}}])
