"""The end of a server: requests under way have some time, then they are answered 503, then the process ends."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from socket import socket
    from types import FrameType

    from cenote.server.app import Application

log = logging.getLogger(__name__)

TICK = 0.1
"""Seconds between looks at the clock."""
TO_LEAVE = 1.0
"""Seconds in which clients can take their 503."""
LAST_RESORT = 10.0
"""Seconds after which a process that has not ended by itself is ended."""


class Server(uvicorn.Server):
    """uvicorn's server, whose end has a bound.

    A first signal stops it from accepting connections; requests under way have `timeout` seconds. A second one ends
    them at once. `LAST_RESORT` seconds later the process is ended with status 1, whatever hangs.

    Args:
        config: of uvicorn.
        app: the application.
        timeout: seconds that requests under way have.
    """

    def __init__(self, config: uvicorn.Config, app: Application, timeout: float) -> None:
        super().__init__(config)
        self._app = app
        self._timeout = timeout
        self._deadline = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, or, the second time, do it at once."""
        left = 0.0 if self.should_exit else self._timeout
        if not self.should_exit:
            self._captured_signals.append(sig)
        self.should_exit = True
        self._app.begin_end()
        self._deadline = time.monotonic() + left
        watchdog = threading.Timer(left + LAST_RESORT, _give_up)
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


def _give_up() -> None:
    log.critical("the process does not end by itself: something hangs")
    logging.shutdown()
    os._exit(1)
