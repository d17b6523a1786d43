"""A call of a client, and the comparison of what it returns with the values of `LLM`.

Runs in the environments of the clients, which have neither Cenote nor NumPy for certain.
"""

from __future__ import annotations

import base64
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 1e-5
"""Largest difference of a number, relative to those above 1: answers are JSON or base64 of float32."""

VALUES: dict[str, Any] = json.loads(Path(os.environ["CENOTE_CLIENT_VALUES"]).read_text())
"""URLs of the servers, texts, and what `LLM` makes of them (`clients.served`)."""
A, B, C, KEY = VALUES["a"], VALUES["b"], VALUES["c"], VALUES["key"]
FULL, LARGE = "16384 sequences wait already", "at most 2000 are allowed"
"""Messages of server c, whatever it is asked."""


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: what is called, and how.
        do: the call as a user writes it; what it returns may be awaited.
        read: place of the value in the answer: names of attributes, keys and indices with dots between them, `*` for
            all, `a,b` for a list of several; or a function.
        equals: the expected value.
        error: part of the message that the client must raise instead.
        raises: name of the exception that carries it, or of a base of its class; empty = any.
        bad: what is bad about the request, one of `refusals.STATUS`; empty = nothing, or something else.
        cause: what the client needs, one of `needs.NEEDS`; empty = nothing special.
        fails: why the call cannot work, if it cannot: letter of the cause, and a sentence.
    """

    name: str
    do: Callable[[], Any]
    read: str | Callable[[Any], Any] = ""
    equals: Any = None
    error: str = ""
    raises: str = ""
    bad: str = ""
    cause: str = ""
    fails: str = ""


def read(value: Any, path: str) -> Any:
    """Return the part of `value` at a path of `Call.read`."""
    if not path:
        return value
    head, _, rest = path.partition(".")
    if head == "*":
        return [read(item, rest) for item in value]
    if "," in head:
        return [read(value, name) for name in head.split(",")]
    if isinstance(value, Mapping) or head.isdecimal():
        return read(value[int(head) if head.isdecimal() else head], rest)
    return read(getattr(value, head), rest)


def plain(value: Any) -> Any:
    """Return a value of any client as lists, mappings, numbers and texts."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def difference(found: Any, expected: Any, place: str = "") -> str:
    """Return where `found` differs from `expected` first, and how; empty if it does not."""
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        parts = (difference(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(found, expected, strict=True)))
        return next(filter(None, parts), "")
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return next(filter(None, (difference(found[key], expected[key], f"{place}.{key}") for key in expected)), "")
    if isinstance(expected, float) and isinstance(found, (int, float)):
        is_equal = math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    else:
        is_equal = found == expected
    return "" if is_equal else f"{place} is {str(found)[:200]}, expected {str(expected)[:200]}".strip()


def floats(code: str | bytes) -> list[float]:
    """Return the numbers of base64 of little-endian float32."""
    content = base64.b64decode(code)
    return list(struct.unpack(f"<{len(content) // 4}f", content))
