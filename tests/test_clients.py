"""The real clients of `make clients`: their rows are as many as documented, and their page is of these rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from clients.__main__ import ENVIRONMENTS, FOLDER, rows
from clients.page import page

PAGE = (Path(__file__).parent.parent / "docs" / "clients.md").read_text()
ROWS = rows()


@pytest.mark.parametrize("row", ROWS, ids=[row["title"] for row in ROWS])
def test_every_row_has_calls_in_an_environment(row: dict[str, Any]) -> None:
    name = row["file"]
    assert row["environment"] in ENVIRONMENTS
    if row["environment"] == "js":
        assert re.search(rf'^  "?{re.escape(name)}"?: {{$', (FOLDER / "js" / "calls.mjs").read_text(), re.MULTILINE)
    else:
        assert (FOLDER / "calls" / (name if name.endswith(".yaml") else f"{name}.py")).exists()


@pytest.mark.parametrize("file", sorted((FOLDER / "calls").glob("*.yaml")), ids=lambda file: file.name)
def test_bodies_say_what_is_expected(file: Path) -> None:
    for entry in yaml.safe_load(file.read_text()):
        assert entry["path"].startswith("/")
        assert {"equals", "says", "status"} & entry.keys() or "body" not in entry, entry["name"]


def test_the_page_has_every_row() -> None:
    counts = {}
    for row in ROWS:
        (line,) = re.findall(rf"^\| {re.escape(row['title'])} \| (\d+) of (\d+) \|", PAGE, re.MULTILINE)
        counts[row["title"]] = [*map(int, line)]
    works, of = (sum(column) for column in zip(*counts.values(), strict=True))
    assert f"**{works} of {of} calls** work." in PAGE
    assert (of, works >= 445) == (498, True)


def test_a_page_is_made_of_results() -> None:
    works = {"name": "a", "trouble": None, "fails": None}
    fails = {"name": "b", "trouble": "KeyError", "fails": "the client's own fault"}
    made = page(ROWS[:1], [{"calls": [works, fails], "errors": [works]}])
    assert "**1 of 2 calls** work." in made
    assert f"| {ROWS[0]['title']} | 1 of 2 | 1 of 1 | b: the client's own fault |" in made
    assert f"### {ROWS[0]['title']}" in made
