"""`docs/clients.md`, made of the rows and what came of their calls."""

from __future__ import annotations

from typing import Any

Results = dict[str, list[dict[str, Any]]]
"""The `calls` and `errors` of a row: `name`, `trouble` and `fails` of each."""

HEAD = """\
# Clients

The clients of other services, as their packages are published, run against `cenote serve`; what they return is compared
with the values of `LLM`. This page is made by `make clients`; `.ci/run` makes the calls of those that are quick to
install.

**{count} calls** work. The rest fail for the reasons named here. Each client also gets errors; where none is among its
calls, further ones are made to see that the server's message reaches the user.

Three servers are asked: one of five models without a key; one of a model with a key, prompts, Matryoshka sizes,
`--token-ids cl100k`, `--allowed-origins`, and for clients that know only names of their vendor's
`--served-model-name minilm '*'`; and one that refuses all work as overloaded and large bodies.

| client | calls | further messages | fails |
|---|---|---|---|
{table}

## How each is pointed at a server

`minilm` and `cross` are names of served models. Clients that send no name of a model take a URL of one,
`http://127.0.0.1:8000/models/NAME`. More of the forms is in [dialects](dialects.md).
"""


def page(rows: list[dict[str, Any]], results: list[Results]) -> str:
    """Return the page."""
    calls = [entry for result in results for entry in result["calls"]]
    head = HEAD.format(count=count(calls), table="\n".join(map(_line, rows, results)))
    return head + "".join(map(_section, filter(_has_lines, rows)))


def count(entries: list[dict[str, Any]]) -> str:
    """Return how many calls work, of how many."""
    return f"{sum(not entry['trouble'] for entry in entries)} of {len(entries)}"


def _line(row: dict[str, Any], result: Results) -> str:
    """Return the line of a row: its title, its counts, and the causes of calls that fail."""
    causes: dict[str, list[str]] = {}
    for entry in result["calls"] + result["errors"]:
        if entry["trouble"]:
            causes.setdefault(entry["fails"] or entry["trouble"], []).append(entry["name"])
    reasons = "; ".join(f"{', '.join(names)}: {cause}" for cause, names in causes.items())
    errors = count(result["errors"]) if result["errors"] else ""
    return f"| {row['title']} | {count(result['calls'])} | {errors} | {reasons.replace('|', ' ')} |"


def _has_lines(row: dict[str, Any]) -> bool:
    return bool(row["lines"])


def _section(row: dict[str, Any]) -> str:
    language = "js" if row["environment"] == "js" else "py"
    return f"\n### {row['title']}\n\n```{language}\n{row['lines'].strip()}\n```\n"
