"""Admission: a request that would wait too long is refused before its body is parsed.

Two lines form in a server: bodies that wait for a render thread, counted in bytes, and sequences that wait for an
engine, counted in tokens. Each knows the pace at which it was worked off of late, so the wait that a new request has
before it is a division. Nothing here looks at the requests that wait. A pace that falls, as when a flood begins, is
believed sooner than one that rises: what is accepted by too high a pace waits longer than anybody should.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from cenote import metrics
from cenote.engine.promise import Times, times_of
from cenote.engine.scheduler import BULK
from cenote.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from concurrent.futures import Future
    from types import TracebackType
    from typing import Self

    from cenote.config import ServerConfig
    from cenote.core import ModelInfo
    from cenote.pipeline.pipeline import Service

T = TypeVar("T")
RENDER_THREADS = 2
KNOWN_AFTER = 0.5
"""Seconds of full work after which a pace is believed."""
MEMORY, SHORT_MEMORY = 10.0, 2.0
"""Seconds of full work that the two paces of a line remember; older work counts ever less. The slower one counts."""
KEPT = 0.75
"""Part of its memory that a pace keeps at least when work ends: where each forward takes long, it knows several."""
MARGIN = 1.2
"""Part of its estimate that a wait may take: a pace may fall by a tenth while requests wait, and then they run."""
BYTES_PER_TOKEN = 4
"""A guess for bodies that are not tokenised yet."""
SMALL_BODY = 65_536
"""Bytes up to which a body is never refused for the memory of others: the number of connections bounds these."""

_OPEN: weakref.WeakSet[Admission] = weakref.WeakSet()
metrics.waiting_seconds.set_function(lambda: max((admission.seconds for admission in [*_OPEN]), default=0.0))
metrics.pending_bytes.set_function(lambda: sum(admission.pending for admission in [*_OPEN]))


class Pace:
    """Work by the time that it took, of late.

    Args:
        memory: seconds of work that are remembered.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._seconds = 0.0
        self._finished = 0.0

    def add(self, amount: float, seconds: float, took: float = 0.0) -> None:
        """Remember that so much was finished.

        Args:
            amount: of work.
            seconds: since other work was finished.
            took: seconds of the forward. Only the end of it counts if that is more than is remembered.
        """
        if seconds:
            kept = min(1.0, max(KEPT, (self._memory - seconds) / max(self._seconds, 1e-9)))
            self._seconds = kept * self._seconds + seconds
            self._finished *= kept
        span = max(self._memory, self._seconds)
        self._finished += amount * min(1.0, span / max(took, span))

    def seconds_of(self, amount: float) -> float:
        """Return the seconds that so much work takes; 0 while the pace is not known."""
        if self._seconds < KNOWN_AFTER or not self._finished:
            return 0.0
        return amount * self._seconds / self._finished


class Line:
    """Work that is accepted and not finished, and its pace. Any thread may change it.

    Args:
        full: amount of work from which on nothing idles; only then is the pace measured.
        clock: seconds of a monotonic clock.

    Attributes:
        amount: accepted and not finished.
    """

    def __init__(self, full: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.amount = 0
        self._full = full
        self._clock = clock
        self._lock = threading.Lock()
        self._was_full = False
        self._is_counted = False
        self._since = -1.0  # before any time of a clock
        self._paces = [Pace(MEMORY), Pace(SHORT_MEMORY)]

    @property
    def seconds(self) -> float:
        """Seconds until all of it is finished; 0 while the pace is not known."""
        return self._seconds_of(self.amount)

    def _seconds_of(self, amount: int) -> float:
        """Return the seconds that so much work takes by the slower pace; 0 while none is known."""
        return max(pace.seconds_of(amount) for pace in self._paces) if amount else 0.0

    def change(self, amount: int) -> None:
        """Add work, or take it away."""
        with self._lock:
            self.amount += amount
            self._was_full = self._was_full and self.amount >= self._full

    def finish(self, amount: int, took: float = 0.0, at: float = 0.0) -> None:
        """Note that so much was finished. It stays in the line until `change` takes it away.

        All that is finished at one time, as the parts of a batch, was made since the time before; it counts if the line
        was full all the while.

        Args:
            amount: of work.
            took: seconds, see `Pace.add`.
            at: time of the clock; 0 = now.
        """
        with self._lock:
            seconds = max(0.0, (at or self._clock()) - self._since)
            if seconds:
                self._is_counted = self._was_full
                self._since += seconds
            self._was_full = self.amount >= self._full
            if self._is_counted:
                self._add(amount, seconds, took)

    def _add(self, amount: float, seconds: float, took: float = 0.0) -> None:
        """Let the paces remember some work, see `Pace.add`. Under the lock."""
        for pace in self._paces:
            pace.add(amount, seconds, took)


class Place:
    """A request's place in a line, left at the end of the block.

    Args:
        line: where it waits.
        amount: its work.
    """

    def __init__(self, line: Line, amount: int) -> None:
        self._line = line
        self._amount = 0
        self._lock = threading.Lock()
        self.resize(amount)

    def resize(self, amount: int) -> None:
        """Change the amount of work. Any thread may call it."""
        with self._lock:
            self._line.change(amount - self._amount)
            self._amount = amount

    def shrink(self, amount: int) -> None:
        """Let at most so much be left of the work. Any thread may call it, also when the place was left."""
        with self._lock:
            left = min(amount, self._amount)
            self._line.change(left - self._amount)
            self._amount = left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.resize(0)


class RenderLine(Line):
    """The line before the render threads, in bytes of the bodies that none of them has begun.

    A body that is long in the hands of one thread is in nobody's way as long as there is another one. So the pace is
    that of the threads while they work, and not that of all results while something waits.

    Args:
        threads: that render.
        clock: see `Line`.
    """

    def __init__(self, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(0, clock)
        self._threads = threads

    async def run(self, size: int, in_pool: Callable[[Callable[[], T]], Awaitable[T]], work: Callable[[], T]) -> T:
        """Return the result of `work`, for a body of `size` bytes, which `in_pool` runs on a render thread."""
        with Place(self, size) as place:

            def begun() -> T:
                place.resize(0)
                began = self._clock()
                try:
                    return work()
                finally:
                    self.rendered(size, self._clock() - began)

            return await in_pool(begun)

    def rendered(self, size: int, seconds: float) -> None:
        """Note that a thread took so long for a body."""
        with self._lock:
            self._add(size, seconds / self._threads)


class EngineLine(Line):
    """The line before an engine, in tokens; `amount` has those that the engine has, the rest is still to be rendered.

    The scheduler gives each request its turn, so that a request waits for as many tokens of another one as it has
    itself, and for a batch at least. Requests are counted by the power of two of their size.
    """

    def __init__(self, info: ModelInfo, clock: Callable[[], float] = time.monotonic) -> None:
        self.batch = info.report.batch_tokens
        self._streams = info.report.streams
        super().__init__((info.report.streams + 1) * self.batch, clock)
        self.most = BULK * self.batch
        self._counts = [0] * (self.most.bit_length() + 1)
        self._tokens = [0] * (self.most.bit_length() + 1)
        self._before_short = 0  # tokens that come before a request of at most a batch: of each one a batch at most

    def fits(self, info: ModelInfo) -> bool:
        """Return whether the engine still makes batches of this size, as many at a time."""
        return info.report.batch_tokens == self.batch and info.report.streams == self._streams

    def enter(self, body_bytes: int) -> EnginePlace:
        """Return the place of a request that is not tokenised yet."""
        return EnginePlace(self, body_bytes // BYTES_PER_TOKEN)

    def wait(self, tokens: int = 0) -> float:
        """Return the seconds that a new request of so many tokens would wait; 0 while the pace is not known."""
        if tokens <= self.batch:
            return self._seconds_of(self._before_short)
        share = min(tokens, self.most)
        return self._seconds_of(sum(self._before(place, share) for place in range(len(self._counts))))

    def _before(self, place: int, share: int) -> int:
        """Return the tokens of a class that come before a request, of each request at most `share`."""
        return min(self._tokens[place], self._counts[place] * share)

    def count(self, tokens: int, instead: int | None = None) -> None:
        """Count a request.

        Args:
            tokens: of it, at most `most`.
            instead: number under which it is counted already.
        """
        with self._lock:
            if instead is not None:
                self._add_request(instead, -1)
            self._add_request(tokens, 1)

    def leave(self, tokens: int) -> None:
        """Count a request of so many tokens no longer."""
        with self._lock:
            self._add_request(tokens, -1)

    def _add_request(self, tokens: int, by: int) -> None:
        """Add a request, or take it away. Under the lock."""
        place = tokens.bit_length()
        self._counts[place] += by
        self._tokens[place] += by * tokens
        self._before_short += by * min(tokens, self.batch)


class EnginePlace:
    """A request's place in the line before an engine, left at the end of the block.

    Its tokens are finished as its sequences are. The scheduler gives each request its turn, so that requests that came
    together end together: by whole requests, nothing would be finished for seconds, and then as much in a moment. In
    the wait of others it counts whole until it is left, since those that come later have their turn as well.

    Args:
        line: where it waits.
        tokens: a guess of its tokens.
    """

    def __init__(self, line: EngineLine, tokens: int) -> None:
        self._line = line
        self._tokens = min(line.most, tokens)
        self._queued: Place | None = None
        self._left = 0
        self._mean = 0.0
        self._future: weakref.ref[Future[Any]] | None = None
        line.count(self._tokens)

    def queue(self, tokens: int, sequences: int = 1) -> None:
        """Note that the engine has the request, how many tokens it has indeed, and in how many sequences."""
        guess, self._tokens = self._tokens, min(self._line.most, tokens)
        self._line.count(self._tokens, guess)
        self._queued = Place(self._line, self._tokens)
        self._left = tokens
        self._mean = tokens / max(1, sequences)

    def begin(self, future: Future[Any]) -> None:
        """Follow the engine's future of the request, which has the times of the work."""
        self._future = weakref.ref(future)  # which calls this place when it is done
        future.add_done_callback(self._end)

    def advance(self, sequences: int) -> None:
        """Note that so many more sequences are finished. Called in threads of the engine's, one at a time."""
        future = None if self._future is None else self._future()
        self._finish(min(self._left, round(sequences * self._mean)), Times() if future is None else times_of(future))

    def _end(self, future: Future[Any]) -> None:
        """Note that all is finished, unless the request has failed."""
        if not future.cancelled() and future.exception() is None:
            self._finish(self._left, times_of(future))

    def _finish(self, tokens: int, times: Times) -> None:
        """Tell the line of finished tokens, by the times of the engine: those of a batch are the same."""
        self._left -= tokens
        self._line.finish(tokens, times.took, times.finished)
        if self._queued is not None:
            self._queued.shrink(self._left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._line.leave(self._tokens)
        if self._queued is not None:
            self._queued.resize(0)


class Held:
    """Bytes of one request's body, which stay in memory until `release`.

    Attributes:
        size: bytes.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.size = 0

    def add(self, size: int) -> None:
        """Take more bytes.

        Raises:
            Overloaded: all bodies together have too many.
        """
        self.size += size
        self._admission.pending += size
        others = self._admission.pending - self.size
        if self.size > SMALL_BODY and others and self._admission.pending > self._admission.max_bytes:
            raise Overloaded(
                f"the bodies of other requests take {others} bytes, and all together may take "
                f"{self._admission.max_bytes} (--max-pending-bytes); try again later",
                retry_after=self._admission.retry_after(self._admission.seconds),
                reason="bytes",
            )

    def release(self) -> None:
        """Give the bytes back; may be called twice."""
        self._admission.pending -= self.size
        self.size = 0


class Admission:
    """Decides which requests may wait, in constant time.

    Args:
        services: the models.
        config: of the server.
        clock: seconds of a monotonic clock.

    Attributes:
        rendering: line before the render threads.
        lines: those before the engines, one of each model.
        pending: bytes of bodies that are received and not answered.
        max_bytes: maximum of `pending`.
    """

    def __init__(
        self, services: Iterable[Service], config: ServerConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rendering = RenderLine(RENDER_THREADS, clock)
        self.pending: int = 0
        self.max_bytes = config.max_pending_bytes
        self._longest = config.max_waiting_time
        self._clock = clock
        self.lines: list[EngineLine] = []
        self._line_of: dict[tuple[str, ...], EngineLine] = {}
        for service in services:
            line = EngineLine(service.info, clock)
            self.lines.append(line)
            self._line_of |= dict.fromkeys([view.names for view in service.views], line)
        _OPEN.add(self)

    def line(self, service: Service) -> EngineLine:
        """Return the line before the engine of `service`, a new one if its process was started with other batches."""
        line = self._line_of[service.names]
        return line if line.fits(service.info) else self._replaced(line, service.info)

    def _replaced(self, line: EngineLine, info: ModelInfo) -> EngineLine:
        """Put a new line in the place of one, whose requests leave that one."""
        other = EngineLine(info, self._clock)
        self.lines[self.lines.index(line)] = other
        names = [names for names, entry in self._line_of.items() if entry is line]
        self._line_of |= dict.fromkeys(names, other)
        return other

    @property
    def seconds(self) -> float:
        """Seconds that a new short request would wait for the model with the shortest line."""
        return self._seconds(0)

    def _seconds(self, body_bytes: int) -> float:
        tokens = body_bytes // BYTES_PER_TOKEN
        return self.rendering.seconds + min((line.wait(tokens) for line in self.lines), default=0.0)

    def check(self, body_bytes: int = 0) -> None:
        """Raise `Overloaded` if a new request would wait too long for any model.

        Args:
            body_bytes: of its body, as far as they are known.
        """
        self._check(self._seconds(body_bytes))

    def check_model(self, service: Service, body_bytes: int = 0) -> None:
        """Raise `Overloaded` if a new request would wait too long for this one of several models."""
        if len(self._line_of) > 1:
            wait = self.line(service).wait(body_bytes // BYTES_PER_TOKEN)
            self._check(self.rendering.seconds + wait)

    def _check(self, seconds: float) -> None:
        if MARGIN * seconds > self._longest:
            raise Overloaded(
                f"the server is overloaded: a new request would wait {seconds:.0f} to {MARGIN * seconds:.0f} s, and at "
                f"most {self._longest:g} s are allowed (--max-waiting-time); try again later",
                retry_after=self.retry_after(seconds),
                reason="waiting",
            )

    def retry_after(self, seconds: float) -> int:
        """Return the seconds after which of a wait of `seconds` half of the longest one is left.

        At least 1, and at most the longest wait: no estimate says more of a line that was not longer when its last
        request was admitted, and by then there is another one.
        """
        return max(1, math.ceil(min(seconds - self._longest / 2, self._longest)))
