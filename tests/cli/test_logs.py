"""The log waits for no reader."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from cenote.cli import logs
from tests import PATIENCE


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("cenote", logging.INFO, __file__, 1, "%s", (text,), None)


def lines_until(reader: int, end: str) -> list[str]:
    """Read a pipe up to a line that ends so."""
    content = ""
    while not content.endswith(f"{end}\n"):
        content += os.read(reader, 65_536).decode()
    return content.splitlines()


def test_lines_are_written_in_order(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = logs.Writer(writer)
    for text in ("one", "two \ud800", "three"):
        handler.handle(record(text))
    lines = lines_until(reader, "three")
    assert [line.partition("INFO cenote: ")[2] for line in lines] == ["one", "two \\ud800", "three"]
    handler.flush()
    assert not handler.dropped


def test_a_pipe_that_nobody_reads_stalls_nobody(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """64 kB stay in the pipe and ten lines wait; all others are dropped, and counted when somebody reads again."""
    monkeypatch.setattr(logs, "PATIENCE", 0.01)
    reader, writer = pipe
    handler = logs.Writer(writer, waiting=10)
    long = "x" * 1000
    callers = [threading.Thread(target=lambda: [handler.handle(record(long)) for _ in range(100)]) for _ in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE)
        assert not caller.is_alive()
    handler.flush()  # gives up
    monkeypatch.setattr(logs, "PATIENCE", PATIENCE)
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(lines_until(reader, "last")))
    reading.start()
    handler.flush()
    handler.handle(record("last"))
    reading.join(PATIENCE)
    dropped = [
        int(line.partition("WARNING cenote: ")[2].split()[0])
        for line in lines
        if line.endswith("lines of the log were dropped, since nobody read them in time")
    ]
    assert sum(dropped) >= 500 - 65 - 11
    assert len(lines) - len(dropped) - 1 + sum(dropped) == 500


def test_a_reader_that_is_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    handler = logs.Writer(writer)
    handler.handle(record("a"))
    handler.flush()
    assert handler.dropped == 1
    os.close(writer)
