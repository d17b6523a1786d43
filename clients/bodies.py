"""HTTP requests as YAML: bodies from the sources of applications and from documents of vendors.

An entry has `name`, `path`, and, where they differ from the defaults: `method` (POST with a `body`, else GET), `server`
(a; b brings its key), `headers`, `body`, `status` (200), `says` (text of the answer), `header` (a header of the answer
whose value `equals` is), and `read`, `equals`, `cause` and `fails` as a `Call`. `$name` stands for a value, `$name.0`
for a part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import requests
import yaml

from clients.call import VALUES, Call, read

FOLDER = Path(__file__).parent / "calls"


def filled(value: Any) -> Any:
    """Return a part of an entry with the values in place of their names."""
    if isinstance(value, str) and value.startswith("$"):
        return read(VALUES, value[1:])
    if isinstance(value, dict):
        return {key: filled(item) for key, item in value.items()}
    return [filled(item) for item in value] if isinstance(value, list) else value


def send(entry: dict[str, Any]) -> Any:
    """Send a request, and return its answer: the header that is asked for, JSON, else text.

    Raises:
        AssertionError: the status is another one, or the text does not say what it should.
    """
    server = entry.get("server", "a")
    headers = {"Authorization": f"Bearer {VALUES['key']}"} if server == "b" else {}
    body = filled(entry.get("body"))
    answer = requests.request(
        entry.get("method", "GET" if body is None else "POST"),
        VALUES[server] + entry["path"],
        json=body,
        headers=entry.get("headers", headers),
        timeout=60,
    )
    expected = entry.get("status", 200)
    assert answer.status_code == expected, f"status {answer.status_code}, expected {expected}: {answer.text[:300]}"
    assert entry.get("says", "") in answer.text, f"{answer.text[:300]!r} does not say {entry['says']!r}"
    if "header" in entry:
        return answer.headers.get(entry["header"])
    return answer.json() if answer.text[:1] in ("{", "[") else answer.text


def calls(file: str) -> list[Call]:
    """Return the calls of a file."""
    return [call(entry) for entry in yaml.safe_load((FOLDER / file).read_text())]


def call(entry: dict[str, Any]) -> Call:
    """Return the call of an entry; without `equals` the status is all that is compared."""
    reading: str | Callable[[Any], Any] = entry.get("read", "")
    if "equals" not in entry:
        reading = nothing
    told = {name: entry.get(name, "") for name in ("cause", "fails")}
    return Call(entry["name"], partial(send, entry), reading, filled(entry.get("equals")), **told)


def nothing(answer: Any) -> None:
    """Read nothing of an answer."""
