"""The health of the models: one probe of each is under way, whoever asks."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cenote.core import Engine


class Probe:
    """The health of one engine, of which a probe may take half a minute where the engine hangs.

    Those that ask meanwhile, on any event loop, wait for the probe that is under way. It has a thread of its own, which
    neither the end of the process nor other work waits for, and which lives until `close`: a process that is short of
    memory starts no thread.

    Args:
        engine: of a model.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._under_way: Future[bool] | None = None
        self._asked: SimpleQueue[Future[bool] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def healthy(self) -> bool:
        """See `cenote.core.Engine.healthy`."""
        return await asyncio.wrap_future(self._future())

    def close(self) -> None:
        """Let the thread end after the probe that is under way; a later one has another."""
        with self._lock:
            if self._thread is not None:
                self._asked.put(None)
                self._thread = None

    def _future(self) -> Future[bool]:
        """Return the future of the probe that is under way, or of a new one. Whoever gives up does not cancel it."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="cenote-health", daemon=True)
                thread.start()
                self._thread = thread
            if self._under_way is None or self._under_way.done():
                self._under_way = Future()
                self._under_way.set_running_or_notify_cancel()
                self._asked.put(self._under_way)
            return self._under_way

    def _work(self) -> None:
        while True:
            future = self._asked.get()
            if future is None:
                return
            try:
                future.set_result(self._engine.healthy())
            except BaseException as error:  # the answer of those who wait, and the thread goes on
                future.set_exception(error)
