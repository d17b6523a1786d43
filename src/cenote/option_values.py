"""Values of options as they are written in flags, variables and files: JSON, counts, names, adapters."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from itertools import chain
from typing import Annotated, Any

from pydantic import BeforeValidator

from cenote.adapters import LoraModule

JSON = ("{", "[")
"""Beginnings of JSON of a mapping or a list."""


def parse_json(value: Any) -> Any:
    """Return the content of JSON, or a value that is none as it is.

    Raises:
        ValueError: a text is not valid JSON.
    """
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None


_COUNT = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[kmg])|(?P<whole>\d+)(?P<binary>[KMG])")
_POWERS = {"k": 1, "m": 2, "g": 3}


def parse_count(value: Any) -> Any:
    """Return a number of tokens out of vLLM's short form, or another value as it is.

    A small letter stands for a power of 1000, `25.6k` for 25600; a capital one for a power of 1024, `4K` for 4096.
    """
    match = _COUNT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    if match["whole"]:
        return int(match["whole"]) * 1024 ** _POWERS[match["binary"].lower()]
    return Decimal(match["number"]) * 1000 ** _POWERS[match["unit"]]


def parse_lora_modules(value: Any) -> Any:
    """Return adapters out of `name=path`, JSON, mappings, or a list of those."""
    if isinstance(value, str):
        value = [value] if value.lstrip().startswith(JSON) else value.split(",")
    if isinstance(value, (dict, LoraModule)):
        value = [value]
    return [module for entry in value for module in _lora_modules(entry)]


def _lora_modules(entry: Any) -> list[Any]:
    """Return the adapters of one entry of `lora_modules`, which may be JSON of several."""
    if not isinstance(entry, str):
        return [entry]
    if entry.lstrip().startswith(JSON):
        content = parse_json(entry)
        return content if isinstance(content, list) else [content]
    name, _, path = entry.partition("=")
    return [{"name": name, "path": path}]


def one_or_several(value: Any) -> Any:
    """Return a text as a tuple of one, or another value as it is."""
    return (value,) if isinstance(value, str) else value


Overrides = Annotated[dict[str, Any], BeforeValidator(parse_json)]
Several = Annotated[tuple[str, ...], BeforeValidator(one_or_several)]
"""Texts; a single one may be given by itself."""


def _parse_names(value: Any) -> Any:
    """Return texts out of a text, JSON of a list, or a list of those."""
    entries = one_or_several(value)
    if not isinstance(entries, (list, tuple)):
        return entries
    lists = [parse_json(entry) if str(entry).startswith("[") else [entry] for entry in entries]
    return [*chain.from_iterable(lists)]


Names = Annotated[tuple[str, ...], BeforeValidator(_parse_names)]
"""Texts; a single one may be given by itself, and several as JSON."""


def parse_counts(value: Any) -> Any:
    """Return counts by kind; each may also be an object with its count."""
    parsed = parse_json(value)
    if not isinstance(parsed, dict):
        return parsed
    return {kind: one.get("count") if isinstance(one, dict) else one for kind, one in parsed.items()}
