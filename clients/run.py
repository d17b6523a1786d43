"""`python -m clients.run OUTPUT FILE ...`: make the calls of some files, in an environment of clients.

Writes JSON: for each file its `CALLS` and its `ERRORS`; of every call the fields that the page needs, and as `trouble`
why it failed, null if it did not.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clients.call import Call, difference, plain, read


def result_of(call: Call, loop: asyncio.AbstractEventLoop) -> str:
    """Return how the result of a call differs from the expected one; empty if it does not.

    Raises:
        Exception: whatever the client raises.
    """
    answer = call.do()
    if inspect.isawaitable(answer):
        answer = loop.run_until_complete(answer)
    if call.error:
        return f"no error, expected {call.error!r}"
    value = read(answer, call.read) if isinstance(call.read, str) else call.read(answer)
    return difference(plain(value), call.equals)


def trouble(call: Call, loop: asyncio.AbstractEventLoop) -> str:
    """Return why a call does not do as it should; empty if it does."""
    try:
        return result_of(call, loop)
    except Exception as error:
        kinds, message = [base.__name__ for base in type(error).__mro__], f"{type(error).__name__}: {error}"
        if os.environ.get("CENOTE_CLIENT_TRACE"):
            traceback.print_exc()
    if not call.error:
        return message[:600]
    if call.error not in message:
        return f"the message is {message[:400]!r}, expected {call.error!r}"
    return "" if call.raises in ("", *kinds) else f"{kinds[0]} is raised, expected {call.raises}"


def entries(calls: Iterable[Call]) -> list[dict[str, Any]]:
    """Make calls, and return what the table needs of each."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    results = []
    for call in calls:
        why = trouble(call, loop)
        told = {name: getattr(call, name) or None for name in ("name", "fails", "bad", "raises", "cause")}
        results.append({**told, "trouble": why or None})
    return results


def main(output: str, *files: str) -> None:
    """Make the calls of `files`, modules of `clients.calls` or YAML."""
    warnings.simplefilter("ignore")
    results = {}
    for file in files:
        if file.endswith(".yaml"):
            from clients.bodies import calls

            results[file] = {"calls": entries(calls(file)), "errors": []}
        else:
            module = importlib.import_module(f"clients.calls.{file}")
            results[file] = {"calls": entries(module.CALLS), "errors": entries(getattr(module, "ERRORS", ()))}
    Path(output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads of telemetry and of event loops that clients leave behind do not delay the end
