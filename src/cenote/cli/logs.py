"""The log of a server, which must not wait for its reader: a pipe that nobody reads takes 64 kB and then blocks."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
WAITING = 10_000
"""Lines that wait to be written; others are dropped and counted."""
PATIENCE = 2.0
"""Seconds that the end of the process waits for lines to be written."""
STDERR = 2


class Writer(logging.Handler):
    """A handler whose lines are written by a thread of its own. No caller waits for the reader.

    Args:
        descriptor: of the file or pipe.
        waiting: maximum lines that wait.

    Attributes:
        dropped: lines that were dropped since the last one that was written.
    """

    def __init__(self, descriptor: int = STDERR, waiting: int = WAITING) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self.dropped = 0
        self._counting = threading.Lock()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(waiting)
        threading.Thread(target=self._write_all, name="cenote-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let a line be written, or drop it if too many wait."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._drop()
        except Exception:  # of a message that does not fit its arguments
            self.handleError(record)

    def flush(self) -> None:
        """Wait until all lines are written, for `PATIENCE` at most."""
        deadline = time.monotonic() + PATIENCE
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            try:
                self._write(line)
            except OSError:  # the reader is gone
                self._drop()
            self._lines.task_done()

    def _drop(self) -> None:
        with self._counting:
            self.dropped += 1

    def _take_dropped(self) -> int:
        with self._counting:
            count, self.dropped = self.dropped, 0
        return count

    def _write(self, line: str) -> None:
        content = f"{line}\n".encode(errors="backslashreplace")
        while content:
            content = content[os.write(self._descriptor, content) :]
        count = self._take_dropped()
        if count:
            message = f"{count} lines of the log were dropped, since nobody read them in time"
            self._write(self.format(logging.LogRecord("cenote", logging.WARNING, __file__, 0, message, (), None)))
