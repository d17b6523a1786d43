"""Lines of the log: as text, or each as a JSON object for programs that collect logs."""

from __future__ import annotations

import logging
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import orjson

from cenote.cli.logs import FORMAT

if TYPE_CHECKING:
    from types import TracebackType

    from cenote.config import LogFormat

log = logging.getLogger("cenote")


class JsonLines(logging.Formatter):
    """A JSON object per record: time (ISO 8601, UTC), level, logger, message and, of an error, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return orjson.dumps({name: _valid(text) for name, text in fields.items()}).decode()


def _valid(text: str) -> str:
    """Return a text without lone surrogates, which JSON in UTF-8 cannot have."""
    return text.encode(errors="backslashreplace").decode()


def set_format(kind: LogFormat) -> None:
    """Let the handlers of the root logger write lines of a kind.

    As JSON, Python's warnings and exceptions that nobody catches are lines of the log, too.
    """
    formatter = JsonLines() if kind == "json" else logging.Formatter(FORMAT)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
    logging.captureWarnings(kind == "json")
    if kind == "json":
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


def tell_end(message: str) -> None:
    """Tell on standard error why the process ends: as a line of the log if that is JSON."""
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        log.critical(message)
        return
    print(f"cenote: {message}", file=sys.stderr)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("an exception ends the process: %s", kind.__name__, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "unknown"
    error = args.exc_value or args.exc_type()
    log.critical("an exception ends the thread %s", name, exc_info=error)
