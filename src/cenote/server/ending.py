"""The end of a server: requests under way have some time, then they are answered 503, then the process ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from cenote import signals
from cenote.config import LAST_RESORT
from cenote.server import connections

if TYPE_CHECKING:
    from collections.abc import Iterator
    from socket import socket
    from types import FrameType

    import uvicorn

    from cenote.server.app import Application

log = logging.getLogger(__name__)

STATUSES: dict[int, int] = {signal.SIGINT: 130}
"""Exit statuses of the process by the signal that ended it, as shells have them, where they are not 0."""
TICK = 0.1
"""Seconds between looks at the clock."""
TO_LEAVE = 1.0
"""Seconds in which clients can take their 503."""


class Server(connections.Server):
    """A server whose end has a bound.

    A first signal stops it from accepting connections; requests under way have `timeout` seconds. A second one ends
    them at once. `LAST_RESORT` seconds later the process is ended with status 1, whatever hangs. A fault of an engine
    ends it, too, with status 1, once the refusals are sent.

    Args:
        config: of uvicorn.
        app: the application.
        timeout: seconds that requests under way have.

    Attributes:
        status: exit status of the process.
    """

    def __init__(self, config: uvicorn.Config, app: Application, timeout: float) -> None:
        super().__init__(config)
        self._app = app
        self._timeout = timeout
        self.status = 0
        self._deadline = float("inf")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals as they are: `take_signals` has taken them."""
        yield

    def take_signals(self) -> None:
        """Let the signals that end a process end the server, but for those that its parent ignores, as `nohup` does."""
        for number in signals.heard():
            signal.signal(number, self.handle_exit)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, or, the second time, do it at once."""
        left = 0.0 if self.should_exit else self._timeout
        if not self.should_exit:
            self.status = STATUSES.get(sig, 0)
        self._end_within(left)

    def run(self, sockets: list[socket] | None = None) -> None:
        """Serve until a signal; return, or end the process if a fault was the reason."""
        super().run(sockets)
        if self._app.fault:
            _end_with_error()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end: after a signal, or because of a fault."""
        fault = self._app.fault
        if fault and not self.should_exit:
            log.critical("%s; the process ends", fault)
            self._end_within(TO_LEAVE)
        return await super().on_tick(counter)

    def _end_within(self, seconds: float) -> None:
        """Begin to end. Requests under way have `seconds`; the process has `LAST_RESORT` more."""
        self.should_exit = True
        self._app.begin_end()
        self._deadline = time.monotonic() + seconds
        watchdog = threading.Timer(seconds + LAST_RESORT, _give_up)
        watchdog.daemon = True
        watchdog.start()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop accepting, and wait for the requests under way as long as they have."""
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_requests(self) -> None:
        while time.monotonic() < self._deadline:
            await asyncio.sleep(TICK)
        count = self._app.under_way.end()
        log.warning("%d requests were not done in time and are answered 503", count)
        await asyncio.sleep(TO_LEAVE)
        for connection in [*self.server_state.connections]:
            if connection.transport is not None:
                connection.transport.abort()


def ignore_signals() -> None:
    """Ignore the signals that have ended the server from now on."""
    for number in signals.ENDING:
        signal.signal(number, signal.SIG_IGN)


def _give_up() -> None:
    log.critical("the process does not end by itself: something hangs")
    _end_with_error()


def _end_with_error() -> NoReturn:
    """End the process with status 1, whatever its threads are doing."""
    logging.shutdown()
    os._exit(1)
