"""Paths that several dialects have, and what tells them apart. `python -m cenote.server.shared` prints the table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cenote.server.app import DIALECTS
from cenote.server.table import Table, collisions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cenote.server.table import Entry

BEGIN, END = "<!-- shared paths -->", "<!-- end of paths -->"
"""Comments around the table in docs/dialects.md."""


def section() -> str:
    """Return the table, as Markdown, between its comments."""
    shared = collisions(Table(DIALECTS, ()).routes)
    rows = [
        f"| `{method} {path}` | {_readers(entries)} |"
        for (method, path), entries in sorted(shared.items(), key=lambda item: item[0][::-1])
        if method != "HEAD" and len({entry.dialect for entry in entries}) > 1  # HEAD is as GET
    ]
    return "\n".join([BEGIN, "", "| path | read as |", "|---|---|", *rows, "", END])


def _readers(entries: Iterable[Entry]) -> str:
    """Return the dialects of a path, each with the keys that tell it, in the order in which they are tried."""
    told = [f"{_keys(entry)}: {entry.dialect.name}" for entry in entries if _keys(entry)]
    (default,) = (entry.dialect.name for entry in entries if not _keys(entry))
    return "; ".join([*told, f"else {default}"])


def _keys(entry: Entry) -> str:
    """Return the keys that tell a body for a route; empty if it needs none."""
    route = entry.route
    if route.marks == {entry.dialect.prefix}:
        return f"behind `/{entry.dialect.prefix}`"
    parts = [_joined(route.marks, " and "), _joined(route.either, " or ")]
    return " with ".join(filter(None, parts))


def _joined(names: Iterable[str], word: str) -> str:
    return word.join(f"`{name}`" for name in sorted(names))


if __name__ == "__main__":
    sys.stdout.write(f"{section()}\n")
