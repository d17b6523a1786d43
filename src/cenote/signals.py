"""The signals that end a process of Cenote."""

from __future__ import annotations

import signal

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end a process; a terminal sends the last one when it is closed."""


def heard() -> list[int]:
    """Return those that the process was not started to ignore, as `nohup` starts it."""
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
