"""Waiting for requests: how a thread blocks on an engine, and drops the work that it no longer waits for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from cenote.engine.promise import check_waiting

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from types import TracebackType

    from cenote.core import Engine, Output, Sequence

MOST_AHEAD = 1 << 30
"""Bytes of processed pictures that a caller's requests may have until they are done."""


class UnderWay:
    """Requests of one caller. Leaving the context by an error, or because the user interrupts, cancels them.

    Progress is counted by the engine's threads and told in the caller's, where a progress bar may raise, take its time,
    or use the engine.
    """

    def __init__(self) -> None:
        self._futures: list[Future[list[Output]]] = []
        self._pictured: list[tuple[Future[Any], int]] = []
        self._told: SimpleQueue[int] = SimpleQueue()

    def __enter__(self) -> UnderWay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for future in self._futures:
            future.cancel()  # without effect on one that is done

    def submit(self, engine: Engine, sequences: list[Sequence]) -> None:
        """Submit a request; see `cenote.core.Engine.submit`. Its sequences lose their pictures once it is done."""
        future = engine.submit(sequences, progress=self._told.put)
        self._futures.append(future)
        size = sum(medium.nbytes for sequence in sequences for medium in sequence.media)
        if size:
            self._pictured.append((future, size))
            future.add_done_callback(partial(_let_go, sequences))
        future.add_done_callback(lambda _: self._told.put(0))

    def make_room(self, tell: Callable[[int], object] = int) -> None:
        """Wait until the pictures of requests that are not done have at most `MOST_AHEAD` bytes.

        Args:
            tell: called with the number of sequences that are done since the last time.

        Raises:
            EngineFailed: see `promise.check_waiting`.
        """
        while self._ahead() > MOST_AHEAD:
            self._wait(tell)

    def _ahead(self) -> int:
        """Return the bytes of pictures of requests that are not done."""
        self._pictured = [(future, size) for future, size in self._pictured if not future.done()]
        return sum(size for _, size in self._pictured)

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
            EngineFailed: see `promise.check_waiting`.
        """
        outputs: list[list[Output]] = []
        for future in self._futures:
            while not future.done():
                self._wait(tell)
            outputs.append(future.result())
        tell(self.progress())
        return outputs

    def _wait(self, tell: Callable[[int], object]) -> None:
        """Wait until something is done, and tell how many sequences are."""
        check_waiting()
        tell(self._told.get())


def _let_go(sequences: list[Sequence], future: Future[Any]) -> None:
    """Let the pictures of a request go that has its outputs, as its caller keeps its sequences for their ids."""
    if future.cancelled() or future.exception() is not None:
        return  # a part of it may still run
    sequences[:] = [replace(sequence, media=(), spans=(), positions=None) for sequence in sequences]
