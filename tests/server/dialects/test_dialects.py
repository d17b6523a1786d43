"""The page of dialects names every prefix, every path that dialects share, and the keys that decide there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cenote.server.app import DIALECTS
from cenote.server.shared import BEGIN, END, section
from cenote.server.table import Table, collisions

PAGE = (Path(__file__).parents[3] / "docs" / "dialects.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("|")]
SHARED = {
    (path, entry.dialect.prefix, entry.route.marks | entry.route.either)
    for (_, path), entries in collisions(Table(DIALECTS, ()).routes).items()
    for entry in entries
    if entry.route.marks or entry.route.either
}


def _order(entry: tuple[str, str, frozenset[str]]) -> list[object]:
    path, prefix, marks = entry
    return [path, prefix, sorted(marks)]


def test_the_table_of_shared_paths_is_current() -> None:
    assert PAGE[PAGE.index(BEGIN) : PAGE.index(END)] in section(), "run: python -m cenote.server.shared"


@pytest.mark.parametrize("prefix", [dialect.prefix for dialect in DIALECTS if dialect.prefix])
def test_every_dialect_has_a_row(prefix: str) -> None:
    assert sum(f" | `{prefix}` | " in row for row in ROWS) == 1


@pytest.mark.parametrize(
    ("path", "prefix", "marks"),
    [pytest.param(path, prefix, marks, id=f"{path}-{prefix}") for path, prefix, marks in sorted(SHARED, key=_order)],
)
def test_the_keys_of_a_shared_path_are_told(path: str, prefix: str, marks: frozenset[str]) -> None:
    (row,) = (row for row in ROWS if f" | `{prefix}` | " in row)
    assert all(f"`{mark}`" in row for mark in marks), row
