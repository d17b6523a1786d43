"""The engine's end of a request: its future, which is settled once, and its progress."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cenote.errors import EngineFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

T = TypeVar("T")

_callbacks = threading.local()
"""Whether this thread is in one: `progress`, and `done`, of a future that an engine settles."""


def check_caller() -> None:
    """Refuse a request of a progress callback, which runs in a thread of the engine's: nobody would be left to run it.

    Raises:
        EngineFailed: the caller is one.
    """
    if getattr(_callbacks, "progress", False):
        raise EngineFailed(
            "a progress callback asked the engine for more work, but it runs in the engine's own thread, and waiting "
            "there would never end; hand the work to another thread"
        )


def check_waiting() -> None:
    """Refuse to wait in a callback, which runs in a thread of the engine's.

    Raises:
        EngineFailed: the caller is one.
    """
    if getattr(_callbacks, "progress", False) or getattr(_callbacks, "done", False):
        raise EngineFailed(
            "a callback waits for an engine's work, but it runs in an engine's own thread, which would stand still "
            "meanwhile, and for ever if the work is its own; hand the waiting to another thread"
        )


@contextmanager
def _within(kind: str) -> Iterator[None]:
    """Note that this thread runs callbacks of a kind."""
    before = getattr(_callbacks, kind, False)
    setattr(_callbacks, kind, True)
    try:
        yield
    finally:
        setattr(_callbacks, kind, before)


@dataclass(slots=True)
class Times:
    """Times of a request, in seconds of the monotonic clock, which all processes of a machine share; 0 = not reached.

    The last forward is that of the sequences whose progress was told last.

    Attributes:
        accepted: the engine took it.
        launched: its first forward began.
        finished: its last forward ended.
        took: seconds of its last forward.
    """

    accepted: float = 0.0
    launched: float = 0.0
    finished: float = 0.0
    took: float = 0.0


class Timed(Future[T]):
    """A future with the times of the work for it, for which a callback cannot wait.

    Raises:
        EngineFailed: see `check_waiting`, of `result` and `exception`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times = Times()

    def result(self, timeout: float | None = None) -> T:
        """See `concurrent.futures.Future.result`."""
        self._check_waiting()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `concurrent.futures.Future.exception`."""
        self._check_waiting()
        return super().exception(timeout)

    def _check_waiting(self) -> None:
        if not self.done():
            check_waiting()


def times_of(future: Future[Any]) -> Times:
    """Return the times of the work for a future; of an engine that keeps none, all are 0."""
    return future.times if isinstance(future, Timed) else Times()


class Promise(Generic[T]):
    """A future that is settled by the first result, error or cancellation, and its caller's progress callback."""

    __slots__ = ("__weakref__", "_lock", "_progress", "future")

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self.future: Timed[T] = Timed()
        self._progress = progress
        self._lock = threading.RLock()

    @property
    def is_followed(self) -> bool:
        """Whether the caller is told of progress."""
        return self._progress is not None

    def advance(self, count: int) -> None:
        """Tell the caller that `count` more sequences are done. Errors of its callback are logged, not raised."""
        if self._progress is None or not count or self.future.done():
            return
        try:
            with self._lock, _within("progress"):  # several threads may have parts of a request
                self._progress(count)
        except BaseException:  # a broken progress bar must not stop the engine, even one that ends its thread
            log.exception("the progress callback failed")

    def resolve(self, result: T) -> None:
        """Settle with a result, unless settled already."""
        self._settle(self.future.set_result, result)

    def fail(self, error: BaseException) -> None:
        """Settle with an error, unless settled already."""
        self._settle(self.future.set_exception, error)

    @staticmethod
    def _settle(settle: Callable[[Any], None], outcome: Any) -> None:
        try:
            with _within("done"):
                settle(outcome)
        except InvalidStateError:
            log.debug("a request was answered already, or its caller gave up")
