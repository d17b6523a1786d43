"""`docs/clients.md`, made of the rows and what came of their calls."""

from __future__ import annotations

from typing import Any

HEAD = """\
# Clients

The clients of other services, as their packages are published, run against `cenote serve`; what they return is compared
with the values of `LLM`. This page is made by `make clients`; `.ci/run` makes the calls of all that are light to install.

**{works} of {count} calls** work. The rest fail for the reasons named here.

Two servers are asked: one of five models without a key, and one of a model with a key, prompts, Matryoshka sizes and
`--served-model-name minilm '*'`, for clients that know only their vendor's names.

| client | calls | fails |
|---|---|---|
{table}

## How each is pointed at a server

`minilm` and `cross` are names of served models. Clients that send no name of a model take a URL of one,
`http://127.0.0.1:8000/models/NAME`. More of the forms is in [dialects](dialects.md).
"""


def page(rows: list[dict[str, Any]], results: list[list[dict[str, Any]]]) -> str:
    """Return the page."""
    counted = [entry for entries in results for entry in entries]
    table = "\n".join(map(_line, rows, results))
    head = HEAD.format(works=_works(counted), count=len(counted), table=table)
    return head + "".join(map(_section, filter(_has_lines, rows)))


def _works(entries: list[dict[str, Any]]) -> int:
    return sum(not entry["trouble"] for entry in entries)


def _line(row: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """Return the line of a row: its title, its count, and the causes of calls that fail."""
    causes: dict[str, list[str]] = {}
    for entry in entries:
        if entry["trouble"]:
            causes.setdefault(entry["fails"] or entry["trouble"], []).append(entry["name"])
    reasons = "; ".join(f"{', '.join(names)}: {cause}" for cause, names in causes.items())
    return f"| {row['title']} | {_works(entries)} of {len(entries)} | {reasons.replace('|', ' ')} |"


def _has_lines(row: dict[str, Any]) -> bool:
    return bool(row["lines"])


def _section(row: dict[str, Any]) -> str:
    language = "js" if row["environment"] == "js" else "py"
    return f"\n### {row['title']}\n\n```{language}\n{row['lines'].strip()}\n```\n"
