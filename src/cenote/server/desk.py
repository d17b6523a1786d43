"""Between an event loop and engines: requests that come together are handed over together, and answers likewise."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import CancelledError
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cenote import metrics
from cenote.engine.promise import times_of
from cenote.server.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from cenote.core import Engine, Output, Sequence

QUIET = 2
"""Turns of the event loop without a new request after which the held requests reach the engine."""
MOST_HELD = 1e-3
"""Seconds after which they do so even if others keep coming, unless these wait for their turn to be rendered."""
MANY_HELD = 64
"""Requests with which they do so then, too."""
T = TypeVar("T")


class _Held(NamedTuple):
    """A request that is to reach an engine.

    Attributes:
        answer: ends as the request does.
        followers: called with the engine's future once there is one.
    """

    submit: Callable[[], Future[list[Output]]]
    answer: asyncio.Future[list[Output]]
    followers: tuple[Callable[[Future[list[Output]]], None], ...]


class Desk:
    """Between one event loop and engines, whose futures belong to other threads.

    Requests are handed over once no other has come for some turns of the loop, and the loop is woken once for all
    answers that are there by then.

    Args:
        loop: the event loop.
        is_crowded: whether many requests are under way.

    Attributes:
        renders: turns of requests that are rendered on the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, is_crowded: Callable[[], bool] = lambda: False) -> None:
        self.loop = loop
        self.renders = Turns(loop, is_crowded)
        self._answers = Turns(loop, is_crowded)
        self._held: deque[_Held] = deque()
        self._held_since = 0.0
        self._done: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._woken = False

    def submit(
        self,
        engine: Engine,
        sequences: list[Sequence],
        progress: Callable[[int], None] | None = None,
        *followers: Callable[[Future[list[Output]]], None],
    ) -> asyncio.Future[list[Output]]:
        """Return a future of the outputs of `sequences`, or of the engine's refusal. To cancel it cancels the work.

        Args:
            engine: runs them.
            sequences: of one request.
            progress: see `cenote.core.Engine.submit`.
            followers: see `_Held`.
        """
        answer: asyncio.Future[list[Output]] = self.loop.create_future()
        trip = metrics.trip.get()
        if trip is not None:
            followers = (*followers, partial(_note_stages, trip))
        self._held.append(_Held(partial(engine.submit, sequences, progress=progress), answer, followers))
        if len(self._held) == 1:
            self._held_since = time.monotonic()
            self.loop.call_soon(self._hold, 1, 0)
        return answer

    def _hold(self, count: int, quiet: int) -> None:
        """Hand the held requests over, or wait for another turn of the loop.

        Args:
            count: requests that were held at the last turn.
            quiet: turns that brought no new one.
        """
        quiet = quiet + 1 if count == len(self._held) else 0
        is_late = time.monotonic() - self._held_since >= MOST_HELD
        others_come = quiet < QUIET and not is_late
        others_wait = self.renders.is_busy and len(self._held) < MANY_HELD
        if others_come or others_wait:
            self.loop.call_soon(self._hold, len(self._held), quiet)
            return
        while self._held:
            submit, answer, followers = self._held.popleft()
            if answer.done():  # cancelled
                continue
            try:
                future = submit()
            except Exception as error:  # the engine's refusal is the answer
                answer.set_exception(error)
                continue
            for follow in followers:
                follow(future)
            self._follow(future, answer)
            answer.add_done_callback(partial(_drop, future))

    def _follow(self, future: Future[T], answer: asyncio.Future[T]) -> None:
        """Let `answer` end as `future` does."""

        def done(future: Future[T]) -> None:
            self._done.append((answer, future))
            if not self._woken:  # else `_settle` has not begun yet and will find it
                self._woken = True
                self.loop.call_soon_threadsafe(self._settle)

        future.add_done_callback(done)

    def _settle(self) -> None:
        self._woken = False
        while self._done:
            self._answers.call(partial(_resolve, *self._done.popleft()))


def _note_stages(trip: metrics.Trip, future: Future[list[Output]]) -> None:
    """Add the stages of a request in its engine, as far as it has come, once it is done."""
    future.add_done_callback(partial(_add_stages, trip))


def _add_stages(trip: metrics.Trip, future: Future[list[Output]]) -> None:
    times = times_of(future)
    if times.launched:
        trip.stages.append(metrics.Stage("queue", times.accepted, times.launched))
    if times.finished:
        trip.stages.append(metrics.Stage("forward", times.launched, times.finished))


def _resolve(answer: asyncio.Future[T], future: Future[T]) -> None:
    """End `answer` as `future` ended, unless it has ended already."""
    if answer.done():
        return
    try:
        result = future.result()
    except CancelledError:
        answer.cancel()
    except BaseException as error:
        answer.set_exception(error)
    else:
        answer.set_result(result)


def _drop(work: Future[Any], _: asyncio.Future[Any]) -> None:
    work.cancel()
