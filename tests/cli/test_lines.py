"""The log as JSON: one object a line, whoever writes it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import requests

from cenote.cli import lines
from tests import PATIENCE

FIELDS = ["time", "level", "logger", "message"]


def record(message: str, *args: Any, **more: Any) -> logging.LogRecord:
    return logging.LogRecord("cenote.engine", logging.WARNING, __file__, 1, message, args, more.pop("exc_info", None))


def test_a_line_has_the_time_level_logger_and_message() -> None:
    entry = record("%d of %s\nlost", 3, "five")
    entry.created = 1_800_000_000.25
    line = lines.JsonLines().format(entry)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2027-01-15T08:00:00.250+00:00",
        "level": "warning",
        "logger": "cenote.engine",
        "message": "3 of five\nlost",
    }


def test_a_line_of_an_error_has_its_traceback() -> None:
    try:
        raise ValueError("a text\nof two lines")
    except ValueError:
        entry = record("it failed", exc_info=sys.exc_info())
    fields = json.loads(lines.JsonLines().format(entry))
    assert list(fields) == [*FIELDS, "exception"]
    assert fields["exception"].startswith("Traceback (most recent call last):")
    assert fields["exception"].endswith("ValueError: a text\nof two lines")


def test_a_lone_surrogate_is_a_line_too() -> None:
    assert json.loads(lines.JsonLines().format(record("a \ud800 b")))["message"] == "a \\ud800 b"


@pytest.fixture
def restored() -> Iterator[None]:
    """Whatever `set_format` changes in the process is as before after the test."""
    root = logging.getLogger()
    formatters = [handler.formatter for handler in root.handlers]
    yield
    for handler, formatter in zip(root.handlers, formatters, strict=True):
        handler.setFormatter(formatter)
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__


def test_an_exception_that_ends_a_thread_is_a_line(restored: None, caplog: pytest.LogCaptureFixture) -> None:
    lines.set_format("json")

    def fail() -> None:
        raise KeyError("lost")

    thread = threading.Thread(target=fail, name="reader")
    thread.start()
    thread.join(PATIENCE)
    (entry,) = [entry for entry in caplog.records if entry.levelname == "CRITICAL"]
    assert json.loads(lines.JsonLines().format(entry))["message"] == "an exception ends the thread reader"
    assert json.loads(lines.JsonLines().format(entry))["exception"].endswith("KeyError: 'lost'")


def test_the_reason_of_an_early_end_is_a_line(restored: None, caplog: pytest.LogCaptureFixture) -> None:
    lines.tell_end("cannot listen")
    assert not caplog.records
    lines.set_format("json")
    lines.tell_end("cannot listen")
    assert [(entry.levelname, entry.getMessage()) for entry in caplog.records] == [("CRITICAL", "cannot listen")]


@pytest.mark.full
def test_every_line_of_a_server_is_an_object() -> None:
    """A real process from start to end, with uvicorn's lines: of its own, and of each request."""
    began = datetime.now(UTC)
    flags = ["--log-format", "json", "--log-level", "debug"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cenote", "serve", "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    assert process.stderr is not None
    entries = []
    with process.stderr as log:
        for line in log:
            entries.append(json.loads(line))
            message = entries[-1]["message"]
            if message.startswith("serving http://"):
                url = message.removeprefix("serving ").partition(",")[0]
                answer = requests.post(f"{url}/v1/embeddings", json={"input": "a cenote"}, timeout=PATIENCE)
                assert answer.status_code == 200, answer.text
                process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    timer.cancel()
    assert all(list(entry)[:4] == FIELDS for entry in entries)
    messages = {(entry["logger"], entry["level"], entry["message"].partition(",")[0]) for entry in entries}
    assert ("uvicorn.error", "info", f"Finished server process [{process.pid}]") in messages
    assert any(
        logger == "uvicorn.access" and message.endswith('"POST /v1/embeddings HTTP/1.1" 200')
        for logger, _, message in messages
    )
    assert any(logger == "cenote" and message.startswith("model: ") for logger, _, message in messages)
    times = [datetime.fromisoformat(entry["time"]) for entry in entries]
    assert began.replace(microsecond=0) <= times[0] <= times[-1] <= datetime.now(UTC)
