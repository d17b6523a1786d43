"""`docs/clients.md`, made of the rows and what came of their calls."""

from __future__ import annotations

from typing import Any

from clients.needs import NEEDS

Results = dict[str, list[dict[str, Any]]]
"""The `calls` and `errors` of a row: `name`, `trouble`, and the fields of a `Call` that are told here, of each."""
BAD = {
    "missing": "no input",
    "type": "wrong type",
    "model": "unknown model",
    "long": "too long",
    "key": "wrong key",
    "full": "overload",
    "large": "body too large",
}
"""Columns of the bad requests."""

HEAD = """\
# Clients

The clients of other services, as their packages are published, run against `cenote serve`; what they return is compared
with the values of `LLM`. This page is made by `make clients`; `.ci/run` makes the calls of those that are quick to
install.

**{count} calls** work. The rest fail for the reasons named here. Further calls are those of clients without a list of
documented ones, and bad requests: the server's message must reach the user, by the client's own exception.

Three servers are asked: one of five models without a key; one of a model with a key, prompts, Matryoshka sizes,
`--token-ids cl100k`, `--allowed-origins`, and for clients that know only names of their vendor's
`--served-model-name minilm '*'`; and one that refuses all work as overloaded and large bodies.

| client | calls | further calls | fails |
|---|---|---|---|
{table}

## Bad requests

The exceptions that carry the server's message. An empty place is a request that the client refuses by itself or cannot
send, or one that its dialect takes: what is too long is cut there.

| client | {columns} |
|---|{rules}
{bad}

The clients of two dialects are parts of programs, not packages: that of Weaviate's containers, and Elasticsearch's
service `hugging_face`. Their sources read a text at `error`; `tests/server/test_bad_requests.py` has that body for
every bad request. llama.cpp, FastDeploy and vLLM have no client of their own: they name openai's.

## Needs of clients

Beyond the request that a vendor documents first, clients need what is listed here; each has calls that show it.

| need | calls |
|---|---|
{needs}

## How each is pointed at a server

`minilm` and `cross` are names of served models. Clients that send no name of a model take a URL of one,
`http://127.0.0.1:8000/models/NAME`. More of the forms is in [dialects](dialects.md).
"""


def page(rows: list[dict[str, Any]], results: list[Results]) -> str:
    """Return the page."""
    calls = [entry for result in results for entry in result["calls"]]
    every = calls + [entry for result in results for entry in result["errors"]]
    head = HEAD.format(
        count=count(calls),
        table="\n".join(map(_line, rows, results)),
        columns=" | ".join(BAD.values()),
        rules="---|" * len(BAD),
        bad="\n".join(filter(None, map(_bad_line, rows, results))),
        needs="\n".join(
            _need(need, [entry for entry in every if entry["cause"] == name]) for name, need in NEEDS.items()
        ),
    )
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
    counts = " | ".join(count(entries) if entries else "" for entries in (result["calls"], result["errors"]))
    return f"| {row['title']} | {counts} | {reasons.replace('|', ' ')} |"


def _bad_line(row: dict[str, Any], result: Results) -> str:
    """Return the exceptions of a row's bad requests, empty if it makes none."""
    told: dict[str, list[str]] = {}
    for entry in result["errors"]:
        if entry["bad"] and not entry["trouble"]:
            told.setdefault(entry["bad"], []).append(f"`{entry['raises']}`")
    cells = " | ".join(", ".join(dict.fromkeys(told.get(bad, ()))) for bad in BAD)
    return f"| {row['title']} | {cells} |" if told else ""


def _need(need: str, entries: list[dict[str, Any]]) -> str:
    """Return the line of what clients need."""
    return f"| {need} | {count(entries)} |"


def _has_lines(row: dict[str, Any]) -> bool:
    return bool(row["lines"])


def _section(row: dict[str, Any]) -> str:
    language = "js" if row["environment"] == "js" else "py"
    return f"\n### {row['title']}\n\n```{language}\n{row['lines'].strip()}\n```\n"
