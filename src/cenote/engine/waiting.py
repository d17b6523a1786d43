"""Waiting for requests: how a thread blocks on an engine, and drops the work that it no longer waits for."""

from __future__ import annotations

from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq
    from concurrent.futures import Future
    from types import TracebackType

    from cenote.core import Engine, Output, Sequence


class UnderWay:
    """Requests of one caller. Leaving the context by an error, or because the user interrupts, cancels them.

    Progress is counted by the engine's threads and told in the caller's, where a progress bar may raise, take its time,
    or use the engine.
    """

    def __init__(self) -> None:
        self._futures: list[Future[list[Output]]] = []
        self._told: SimpleQueue[int] = SimpleQueue()

    def __enter__(self) -> UnderWay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for future in self._futures:
            future.cancel()  # without effect on one that is done

    def submit(self, engine: Engine, sequences: Seq[Sequence]) -> None:
        """Submit a request; see `cenote.core.Engine.submit`."""
        future = engine.submit(sequences, progress=self._told.put)
        self._futures.append(future)
        future.add_done_callback(lambda _: self._told.put(0))

    def progress(self) -> int:
        """Return the number of sequences that are done since the last time, without waiting."""
        count = 0
        while not self._told.empty():
            count += self._told.get()
        return count

    def results(self, tell: Callable[[int], object] = int) -> list[list[Output]]:
        """Wait for the outputs of each request, in order.

        Args:
            tell: called with the number of sequences that are done since the last time.

        Raises:
            CenoteError: one of them failed.
        """
        outputs: list[list[Output]] = []
        for future in self._futures:
            while not future.done():
                tell(self._told.get())
            outputs.append(future.result())
        tell(self.progress())
        return outputs
