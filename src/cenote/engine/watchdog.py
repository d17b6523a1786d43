"""Batches under way, and a thread that notices one that does not come back."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

OFTEN = 4
"""Looks at the batches within one time-out."""
SELDOM = 5.0
"""Most seconds between two looks."""


class Watchdog:
    """Tells once of batches that have been under way for longer than `timeout`.

    Args:
        timeout: seconds; 0 = no thread is started, and nothing is told.
        hung: called with the late batches, from the watchdog's own thread.
        clock: seconds.
    """

    def __init__(
        self, timeout: float, hung: Callable[[list[Any]], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._timeout = timeout
        self._hung = hung
        self._clock = clock
        self._numbers = itertools.count()
        self._under_way: dict[int, tuple[float, Any]] = {}
        self._stopped = threading.Event()
        if timeout:
            threading.Thread(target=self._run, name="cenote-watchdog", daemon=True).start()

    def begin(self, batch: Any) -> int:
        """Note that a batch is launched; return its number."""
        number = next(self._numbers)
        self._under_way[number] = (self._clock(), batch)
        return number

    def end(self, number: int) -> None:
        """Note that a batch has come back, or failed."""
        self._under_way.pop(number, None)

    def late(self) -> list[Any]:
        """Return the batches that have been under way for longer than the time-out."""
        now = self._clock()
        return [batch for began, batch in [*self._under_way.values()] if now - began > self._timeout]

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(min(SELDOM, self._timeout / OFTEN)):
            late = self.late()
            if late:
                self._hung(late)
                return
