"""The real clients of `make clients`: their rows are as many as documented, and their page is of these rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cenote.server.app import DIALECTS
from clients.__main__ import ENVIRONMENTS, FOLDER, rows
from clients.needs import NEEDS
from clients.page import BAD, page

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
    counts = []
    table = PAGE[: PAGE.index("## Bad requests")]
    for row in ROWS:
        title = re.escape(row["title"])
        (line,) = re.findall(rf"^\| {title} \| (?:(\d+) of (\d+))? \| (?:\d+ of \d+)? \|", table, re.MULTILINE)
        counts.append([int(part or 0) for part in line])
    works, of = (sum(column) for column in zip(*counts, strict=True))
    assert f"**{works} of {of} calls** work." in PAGE
    assert (of, works >= 445) == (498, True)


def test_a_page_is_made_of_results() -> None:
    title = ROWS[0]["title"]
    none = {"trouble": None, "fails": None, "bad": None, "raises": None, "cause": None}
    works = {**none, "name": "a", "cause": "late-chunking"}
    fails = {**none, "name": "b", "trouble": "KeyError", "fails": "the client's own fault"}
    full = {**none, "name": "c", "bad": "full", "raises": "RateLimitError", "cause": "readable-errors"}
    mute = {**none, "name": "d", "trouble": "KeyError", "fails": "it is mute", "bad": "key", "raises": "KeyError"}
    made = page(ROWS[:1], [{"calls": [works, fails], "errors": [full, full, mute]}])
    assert "**1 of 2 calls** work." in made
    assert f"| {title} | 1 of 2 | 2 of 3 | b: the client's own fault; d: it is mute |" in made
    assert f"| {title} |  |  |  |  |  | `RateLimitError` |  |\n" in made
    assert f"| {NEEDS['late-chunking']} | 1 of 1 |" in made
    assert f"| {NEEDS['readable-errors']} | 2 of 2 |" in made
    assert f"### {title}" in made


PARTS = {"weaviate", "elasticsearch"}
"""Dialects whose clients are parts of programs; `tests/server/test_bad_requests.py` has the bodies that these read."""


@pytest.mark.parametrize("prefix", sorted({dialect.prefix for dialect in DIALECTS if dialect.prefix} - PARTS))
def test_a_client_of_each_dialect_tells_of_every_bad_request(prefix: str) -> None:
    lines = PAGE[PAGE.index("## Bad requests") : PAGE.index("## Needs of clients")].splitlines()
    told: set[str] = set()
    for row in ROWS:
        if prefix in row.get("dialects", ()):
            (line,) = (line for line in lines if line.startswith(f"| {row['title']} |"))
            cells = line.removeprefix(f"| {row['title']} |").split("|")
            told |= {bad for bad, cell in zip(BAD, cells, strict=False) if cell.strip()}
    assert told == BAD.keys()


@pytest.mark.parametrize("need", NEEDS)
def test_each_need_has_calls_that_show_it(need: str) -> None:
    (works,) = re.findall(rf"^\| {re.escape(NEEDS[need])} \| (\d+) of \d+ \|$", PAGE, re.MULTILINE)
    assert int(works) >= 1


def test_calls_name_needs_that_there_are() -> None:
    files = [*(FOLDER / "calls").iterdir(), FOLDER / "js" / "calls.mjs", FOLDER / "refusals.py"]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    named = set(re.findall(r"""\bcause(?:=|: |": )"?([a-z][\w-]+)\b(?!\()""", text))
    assert named <= NEEDS.keys()
    assert [need for need in NEEDS if not re.search(rf'"{need}"|cause: {need}', text)] == []
