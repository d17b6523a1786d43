"""Turns of an event loop: of short work for many requests only so much is done before the loop reads from others.

A refusal, or an answer about health, takes a tenth of a millisecond, and comes in the order of events. Where hundreds
of requests are accepted at once, or a batch ends, it would wait for the tokens and the answers of all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

A_TURN = 16
"""Pieces of work in one turn of the loop, some tenths of a millisecond each. With fewer, the answers of a batch leave
one by one, and the next requests of their clients are several small batches instead of one."""
A_CROWDED_TURN = 1
"""Likewise where many requests are under way, and each piece takes milliseconds beside the forwards."""


class Turns:
    """Work that waits for a turn of an event loop, first come, first served.

    Args:
        loop: whose thread calls every method.
        is_crowded: whether many requests are under way.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, is_crowded: Callable[[], bool]) -> None:
        self._loop = loop
        self._is_crowded = is_crowded
        self._waiting: deque[Callable[[], object]] = deque()
        self._is_counting = False
        self._left = 0

    @property
    def is_busy(self) -> bool:
        """Whether work waits."""
        return bool(self._waiting)

    def call(self, work: Callable[[], object]) -> None:
        """Call `work` now if this turn has room for it, else in one of the next turns."""
        self._waiting.append(work)
        if not self._is_counting:
            self._count()
        if self._left and len(self._waiting) == 1:
            self._work()

    async def wait(self) -> None:
        """Wait for a turn with room. What the caller does until it waits the next time is the work."""
        if not self._is_counting:
            self._count()
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self.call(partial(_end, turn))
        await turn

    def _begin(self) -> None:
        """Begin a turn, and see to the next one if this one has work."""
        self._is_counting = False
        if self._waiting:
            self._count()
        while self._left and self._waiting:
            self._work()

    def _count(self) -> None:
        """Count the work of this turn, until the next one begins."""
        self._is_counting = True
        self._left = A_CROWDED_TURN if self._is_crowded() else A_TURN
        self._loop.call_soon(self._begin)

    def _work(self) -> None:
        self._left -= 1
        self._waiting.popleft()()


def _end(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # else it was cancelled
        turn.set_result(None)
