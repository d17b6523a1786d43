"""The local engine: device threads that pull batches, and a future per request.

Callers submit from any thread. A device thread asks the scheduler for a batch when it can take one; no request waits
for a timer. A GPU has one device thread, which launches the next batch while the last one runs. A CPU has several
*streams*, each with its part of the cores: two forwards side by side leave fewer cores idle between layers than one on
all cores. Only a sequence that waits alone may run on all cores, in the *wide* stream, where that has been faster of
late (`cenote.engine.lone`). A batch whose forward raises is run again in halves, down to single sequences, so that only
the sequences that fail alone are answered with an error.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, deque
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cenote import metrics
from cenote.core import ModelInfo, Output, Sequence
from cenote.engine.cache import copied
from cenote.engine.equal import distinct
from cenote.engine.failures import Failures, answer, is_fatal, release
from cenote.engine.lone import Lone
from cenote.engine.owner import Owner
from cenote.engine.promise import Promise, check_caller
from cenote.engine.scheduler import Scheduler
from cenote.engine.watchdog import Watchdog
from cenote.errors import CenoteError, Closed, EngineFailed, EngineGone, Overloaded
from cenote.functions import coalesce
from cenote.tensors.process import release_freed_memory, release_threads
from cenote.tensors.sharing import common_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Seq
    from concurrent.futures import Future

log = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = {"cpu": 768, "cuda": 16384}
DEFAULT_STREAMS = 2
"""Streams on a CPU, of models that are reentrant."""
HEALTH_PATIENCE = 30.0
"""Seconds that a health check waits for its own forward."""
LAST_FORWARDS = 5.0
"""Seconds that the other streams of an engine that is lost have to end."""
TICK = 0.1
"""Seconds between looks at the fault of an engine that ends."""
REST, LONG_WORK = 2.0, 10.0
"""Seconds without work, and seconds of work with pauses, after which freed memory goes back to the system."""

_RUNNING: weakref.WeakSet[LocalEngine] = weakref.WeakSet()
metrics.queued_sequences.set_function(lambda: sum(engine._scheduler.depth for engine in [*_RUNNING]))
metrics.queued_tokens.set_function(lambda: sum(engine._scheduler.tokens for engine in [*_RUNNING]))
metrics.tokens_per_second.set_function(lambda: sum(engine._rate.value() for engine in [*_RUNNING]))


class Launched(Protocol):
    """A batch that the model has begun."""

    def ready(self) -> bool:
        """Return whether `finish` would return at once."""

    def finish(self) -> list[Output | CenoteError]:
        """Wait for the results, one per sequence."""


class Model(Protocol):
    """A model that the engine can run, such as `cenote.models.model.PoolingModel`.

    A model that runs the common beginning of sequences once has the attribute `shares_prefixes = True`; one that
    several threads may launch at a time has `is_reentrant = True`.
    """

    info: ModelInfo

    def launch(self, sequences: Seq[Sequence]) -> Launched:
        """Start a forward."""


class _Request(Promise[list[Output]]):
    """An accepted request and its outputs, which come one by one."""

    __slots__ = ("_left", "_outputs", "priority", "shared")

    def __init__(self, size: int, progress: Callable[[int], None] | None, shared: int = 0, priority: int = 0) -> None:
        super().__init__(progress)
        self.shared = shared
        self.priority = priority
        self.future.times.accepted = time.monotonic()
        self._outputs: list[Output | None] = [None] * size
        self._left = size

    def cancelled(self) -> bool:
        """Return whether the caller gave up or a part failed: sequences that still wait need not run."""
        return self.future.done()

    def put(self, places: list[int], output: Output) -> None:
        """Store one output, and copies of it in further places; the last one resolves the future."""
        first, *others = places
        with self._lock:
            self._outputs[first] = output
            for place in others:
                self._outputs[place] = copied(output, writable=True)
            self._left -= len(places)
            is_whole = not self._left
        if is_whole:
            self.resolve([output for output in self._outputs if output is not None])


class _Entry:
    """A sequence and its places in a request, several where it comes several times.

    Its length is its cost: tokens, and patches of pictures at `ModelInfo.patch_cost`.
    """

    __slots__ = ("_cost", "places", "request", "sequence")

    def __init__(self, request: _Request, places: list[int], sequence: Sequence, patch_cost: float) -> None:
        self.request = request
        self.places = places
        self.sequence = sequence
        self._cost = len(sequence) + round(patch_cost * sequence.patches)

    def __len__(self) -> int:
        return self._cost


class _Run(NamedTuple):
    """A batch under way on the device, with the time of its launch and its number at the watchdog."""

    batch: list[_Entry]
    launched: Launched
    began: float
    number: int


_Result = tuple[_Entry, "Output | CenoteError"]
"""A sequence with its output, or with the error that its output is."""


class _Stream:
    """A device thread, from the outside.

    Attributes:
        threads: CPU threads of its forwards; `None` = torch's.
        woken: notified when there may be work for it.
        lone: tokens and start of a sequence that it took while nothing else ran; `None` = it runs something else.
    """

    def __init__(self, number: int, threads: int | None, lock: threading.RLock) -> None:
        self.number = number
        self.threads = threads
        self.woken = threading.Condition(lock)
        self.lone: tuple[int, float] | None = None


class LocalEngine:
    """Runs one model on one device.

    Args:
        model: runs the batches.
        max_batch_tokens: maximum tokens per batch; `None` = by device.
        max_batch_sequences: maximum sequences per batch.
        max_queued: maximum sequences that wait. A request beyond it is refused as a whole, unless nothing waits.
        threads: CPU threads in all; `None` = torch's. Torch keeps a number for each thread, so setting it on another
            thread changes nothing here.
        streams: forwards that run at a time, each on its part of `threads`; `None` = by device. Always 1 for a model
            that is not reentrant.
        by_priority: requests of lower `Sequence.priority` run first.
        forward_timeout: seconds after which a batch that has not come back means that the device hangs; 0 = never.

    Attributes:
        fault: reason why nothing can be run any more: a device thread died, or the device hangs. Empty while all is
            well. The process should end then; requests are refused.
    """

    fault = ""
    _closing = False
    _last_failed = False
    _untidy_since: float | None = None
    _worked_until = 0.0

    def __init__(
        self,
        model: Model,
        *,
        max_batch_tokens: int | None = None,
        max_batch_sequences: int = 256,
        max_queued: int = 16384,
        threads: int | None = None,
        streams: int | None = None,
        by_priority: bool = True,
        forward_timeout: float = 0,
    ) -> None:
        self._model = model
        self._owner = Owner()
        self._by_priority = by_priority
        device = model.info.report.device.partition(":")[0]
        self.max_batch_tokens = max_batch_tokens or DEFAULT_BATCH_TOKENS.get(device, 768)
        self._max_queued = max_queued
        self._lock = threading.RLock()
        shares = _shares(threads, self._parallel(streams, device))
        self._narrow = [_Stream(number, share, self._lock) for number, share in enumerate(shares)]
        self._wide = _Stream(len(shares), sum(filter(None, shares)), self._lock) if len(shares) > 1 else None
        self._streams = [*self._narrow, *filter(None, [self._wide])]
        self.info = model.info.reported(streams=len(self._narrow), batch_tokens=self.max_batch_tokens)
        self._scheduler: Scheduler[_Entry] = Scheduler(
            self.max_batch_tokens, max_batch_sequences, streams=self.info.report.streams
        )
        self._busy: set[_Stream] = set()
        self._lone = Lone()
        self._failures = Failures()
        self._forward_timeout = forward_timeout
        self._rate: metrics.Rate = metrics.Rate()
        _RUNNING.add(self)
        self._watchdog = Watchdog(forward_timeout, self._hang)
        self._threads = self._started()
        release_threads()  # those with which this thread has loaded the model

    def _started(self) -> list[threading.Thread]:
        """Start the device threads; torch's number of CPU threads stays the same for other threads."""
        began = threading.Barrier(len(self._streams) + 1)
        threads = [
            threading.Thread(target=self._work, args=(stream, began), name="cenote-device", daemon=True)
            for stream in self._streams
        ]
        for thread in threads:
            thread.start()
        began.wait()
        if any(stream.threads is not None for stream in self._streams):
            import torch

            torch.set_num_threads(torch.get_num_threads())  # new threads begin with the last number set
        return threads

    def _parallel(self, streams: int | None, device: str) -> int:
        """Return the number of forwards that run at a time."""
        if device != "cpu" or not getattr(self._model, "is_reentrant", False):
            return 1
        return coalesce(streams, DEFAULT_STREAMS)

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`. Equal sequences run once.

        Raises:
            EngineGone: the engine has a `fault`.
            EngineFailed: it is called in a forked child, or from a progress callback.
        """
        self._owner.check()
        check_caller()
        places_of = distinct(sequences)
        different = [sequences[places[0]] for places in places_of]
        shared = common_prefix(different) if getattr(self._model, "shares_prefixes", False) else 0
        priority = sequences[0].priority if sequences and self._by_priority else 0
        request = _Request(len(sequences), progress, shared, priority)
        cost = self.info.patch_cost
        entries = [_Entry(request, *entry, cost) for entry in zip(places_of, different, strict=True)]
        with self._lock:
            if self.fault:
                raise EngineGone(self.fault)
            if self._closing:
                raise Closed("the engine is shutting down")
            self._make_room(len(entries))
            self._scheduler.add(request, entries)
            self._wake()
        request.future.add_done_callback(partial(_leave, self._scheduler, weakref.ref(request)))
        if not entries:
            request.resolve([])
        return request.future

    def healthy(self) -> bool:
        """Return whether the device threads live, and the last forward succeeded or a new one of one token does."""
        if not self._owner.is_here or self.fault or not all(thread.is_alive() for thread in self._threads):
            return False
        if not self._last_failed:
            return True
        try:
            self.submit([Sequence([0], task=self.info.default_task)]).result(timeout=HEALTH_PATIENCE)
        except (CenoteError, TimeoutError):
            return False
        return True

    def close(self) -> None:
        """Refuse new requests, finish the accepted ones, and stop. May be called twice.

        A thread that hangs is not waited for, and in a forked child there is nothing to close.
        """
        if not self._owner.is_here:
            return
        with self._lock:
            self._closing = True
            self._wake()
        _RUNNING.discard(self)
        for thread in self._threads:
            if thread is not threading.current_thread():  # an owner may be garbage-collected there
                self._join(thread)
        self._watchdog.stop()

    def _join(self, thread: threading.Thread) -> None:
        """Wait until a device thread ends; from a fault on, which may come meanwhile, at most `LAST_FORWARDS`."""
        while thread.is_alive() and not self.fault:
            thread.join(TICK)
        thread.join(LAST_FORWARDS)

    def _make_room(self, count: int) -> None:
        """Raise `Overloaded` if `count` more sequences may not wait; cancelled ones are dropped first."""
        if not self._is_full(count):
            return
        self._drop_cancelled()
        if self._is_full(count):
            raise self._overloaded(count)

    def _drop_cancelled(self) -> None:
        """Forget sequences whose request needs them no more. Under the lock."""
        _count("dropped", self._scheduler.drop_cancelled())

    def _is_full(self, count: int) -> bool:
        depth = self._scheduler.depth
        return depth > 0 and depth + count > self._max_queued

    def _overloaded(self, count: int) -> Overloaded:
        rate = self._rate.value()
        seconds = self._scheduler.tokens / rate if rate else 1
        return Overloaded(
            f"the queue is full: {self._scheduler.depth} inputs wait, at most {self._max_queued} may, "
            f"and this request brings {count}; try again later",
            retry_after=min(60, max(1, round(seconds))),
        )

    def _work(self, stream: _Stream, began: threading.Barrier) -> None:
        """Run a device thread: take a batch, launch it, deliver the one before."""
        running: deque[_Run] = deque()
        batch: list[_Entry] = []
        try:
            _use_threads(stream.threads)
            began.wait()
            while True:
                batch = self._take(stream) if running else self._wait(stream)
                if batch:
                    running += self._launch(batch)
                elif not running:
                    return
                while running and (not batch or len(running) > 1 or running[0].launched.ready()):
                    self._deliver(running[0])
                    running.popleft()
        except BaseException as error:  # the thread is lost: nobody may wait for it
            began.abort()
            log.exception("the device thread died")
            under_way = chain(batch, *(run.batch for run in running))
            self._die(error, [*dict.fromkeys(under_way)])  # the last batch is under way, too

    def _wait(self, stream: _Stream) -> list[_Entry]:
        """Wait for the next batch of `stream`, which runs nothing; an empty one means that the engine closes."""
        with self._lock:
            self._worked_until = time.monotonic()
            self._note_lone(stream)
            self._busy.discard(stream)
            self._scheduler.done(stream.number)
        while True:
            with self._lock:
                batch = self._take(stream)
                is_closed = self._closing and not self._scheduler.depth
                if batch or is_closed:
                    return batch
                stream.woken.wait(None if self._untidy_since is None else REST)
            self._tidy()

    def _take(self, stream: _Stream) -> list[_Entry]:
        """Take a batch for `stream`, if there is one, and wake another stream for the rest."""
        with self._lock:
            self._drop_cancelled()
            batch = self._scheduler.next_batch(stream.number) if stream in self._takers() else []
            if batch:
                is_lone = len(batch) == 1 and not self._busy
                stream.lone = (len(batch[0]), time.monotonic()) if is_lone else None
                self._busy.add(stream)
                self._untidy_since = self._untidy_since or time.monotonic()
            self._wake()
            return batch

    def _note_lone(self, stream: _Stream) -> None:
        """Remember how long a sequence took that came alone and stayed so. Under the lock."""
        if stream.lone is not None and self._busy == {stream}:
            tokens, began = stream.lone
            self._lone.note(tokens, is_wide=stream is self._wide, seconds=self._worked_until - began)
        stream.lone = None

    def _takers(self) -> list[_Stream]:
        """Return the streams that waiting sequences are for, busy ones included. Under the lock.

        A sequence with nothing beside it is for the wide stream, where that has been faster; beside it runs nothing.
        """
        if self._wide in self._busy:
            return []
        is_alone = not self._busy and self._scheduler.depth == 1
        if self._wide is not None and is_alone and self._lone.is_wide(self._scheduler.tokens):
            return [self._wide]
        return self._narrow

    def _wake(self) -> None:
        """Wake a stream that can take work; when closing, all streams, which may have to end."""
        woken = self._streams
        if not self._closing:
            idle = [stream for stream in self._takers() if stream not in self._busy]
            woken = idle[:1] if self._scheduler.depth else []
        for stream in woken:
            stream.woken.notify()

    def _tidy(self) -> None:
        """Give freed memory back if nothing runs, and there was no work for a while or no pause for long."""
        with self._lock:
            if self._untidy_since is None or self._busy:
                return
            now = time.monotonic()
            if now - self._worked_until < REST and now - self._untidy_since <= LONG_WORK:
                return
            self._untidy_since = None
        release_freed_memory()

    def _launch(self, batch: list[_Entry]) -> list[_Run]:
        """Start a forward; return its run, or none if it failed and the batch was answered."""
        began = time.monotonic()
        for request in _requests(batch):
            times = request.future.times
            times.launched = times.launched or began
            metrics.stage("queue").observe(began - times.accepted)
        try:
            return [self._begin(batch)]
        except BaseException as error:  # the model may raise anything, and none of it ends the device thread
            failure = error
        self._isolate(batch, failure)
        return []

    def _deliver(self, run: _Run) -> None:
        """Wait for the outputs of a run, and hand them to its requests."""
        try:
            results = self._finish(run)
        except BaseException as error:  # as in _launch: a GPU reports its failures here
            failure = error
        else:
            self._answer(run, results)
            return
        self._isolate(run.batch, failure)

    def _begin(self, batch: list[_Entry]) -> _Run:
        """Launch a forward, under the eye of the watchdog."""
        began, number = time.monotonic(), self._watchdog.begin(batch)
        try:
            return _Run(batch, self._model.launch([entry.sequence for entry in batch]), began, number)
        except BaseException:
            self._watchdog.end(number)
            raise

    def _finish(self, run: _Run) -> list[_Result]:
        """Wait for the outputs of a run, and return each with its sequence."""
        try:
            return [*zip(run.batch, run.launched.finish(), strict=True)]
        finally:
            self._watchdog.end(run.number)

    def _answer(self, run: _Run, results: list[_Result]) -> None:
        """Hand the outputs of a run to its requests."""
        self._succeeded(run)
        answered = [entry for entry, output in results if isinstance(output, Output)]
        _count("done", answered)
        done: Counter[_Request] = Counter()
        for entry in answered:
            done[entry.request] += len(entry.places)
        _note_finished(run.batch, time.monotonic() - run.began)
        for request, count in done.items():
            request.advance(count)
        for entry, output in results:
            if isinstance(output, Output):
                entry.request.put(entry.places, output)
            else:
                self._failures.note(output, _count("failed", [entry]))
                entry.request.fail(output)

    def _succeeded(self, run: _Run) -> None:
        """Note that a forward has succeeded."""
        tokens = sum(map(len, map(attrgetter("sequence"), run.batch)))
        with self._lock:
            self._last_failed = False
            self._rate.add(sum(map(len, run.batch)))
        metrics.tokens.inc(tokens)
        metrics.batch_tokens.observe(tokens)
        metrics.batch_sequences.observe(len(run.batch))
        metrics.stage("forward").observe(time.monotonic() - run.began)

    def _isolate(self, batch: list[_Entry], error: BaseException) -> None:
        """Answer a batch that failed: run its halves, and the halves of those that fail, down to single sequences.

        Of n sequences k fail alone after at most 2 k log2(n) forwards, and never more than 2 n. Sequences whose request
        has failed meanwhile, or was cancelled, are left out. After an error of the device nothing is run again.
        """
        self._last_failed = True  # until a part succeeds
        parts = deque(self._halves(batch, error))
        while parts:
            part = parts.popleft()
            failure = self._run_again(part)
            if failure is not None and is_fatal(failure):
                part = [*part, *chain.from_iterable(parts)]
                parts.clear()
            if failure is not None:
                parts.extendleft(reversed(self._halves(part, failure)))

    def _halves(self, batch: list[_Entry], error: BaseException) -> list[list[_Entry]]:
        """Return the halves of a batch that failed; none if it was a single sequence, whose request then fails."""
        if len(batch) == 1 or is_fatal(error):
            self._fail(batch, error)
            return []
        release(error)
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]

    def _run_again(self, part: list[_Entry]) -> BaseException | None:
        """Run a part of a failed batch and answer it; return the exception if it fails too."""
        awaited = [entry for entry in part if not entry.request.cancelled()]
        _count("dropped", set(part).difference(awaited))
        if not awaited:
            return None
        metrics.forwards_again.inc()
        try:
            run = self._begin(awaited)
            results = self._finish(run)
        except BaseException as error:
            return error
        self._answer(run, results)
        return None

    def _fail(self, part: list[_Entry], error: BaseException) -> None:
        """Fail the requests of a sequence that failed alone, or of all that failed with the device."""
        self._failures.note(error, _count("failed", part))
        failure = answer(error)
        _note_finished(part)
        for request in _requests(part):
            request.fail(failure)

    def _die(self, error: BaseException, lost: list[_Entry]) -> None:
        """Give up: a device thread is gone, and the batches `lost` with it."""
        fault = f"the device thread died: {type(error).__name__}; the engine's log has the details"
        self._give_up(fault, lost, EngineFailed(fault))

    def _hang(self, late: list[list[_Entry]]) -> None:
        """Give up: the batches `late` do not come back."""
        fault = f"the device hangs: a forward has not come back within {self._forward_timeout:g} seconds"
        log.critical("%s; see --forward-timeout", fault)
        self._give_up(fault, [*chain.from_iterable(late)], EngineGone(fault))

    def _give_up(self, fault: str, lost: list[_Entry], failure: CenoteError) -> None:
        """Refuse all that comes from now on, and answer the batches `lost` with `failure`, and all that waits."""
        with self._lock:
            self.fault = self.fault or fault
            self._closing = True
            self._drop_cancelled()
            waiting = self._scheduler.drain()
            self._wake()
        _count("failed", chain(lost, waiting))
        for request in _requests(lost):
            request.fail(failure)
        for request in _requests(waiting):
            request.fail(EngineGone(self.fault))


def _leave(scheduler: Scheduler[_Entry], request: weakref.ref[_Request], future: Future[Any]) -> None:
    """Let the scheduler drop the rest of a request whose caller gave up, or of which a part failed."""
    settled = request()  # a reference of its own would be a cycle, which keeps outputs until the garbage is collected
    if settled is not None and (future.cancelled() or future.exception() is not None):
        scheduler.cancel(settled)


def _count(outcome: str, entries: Iterable[_Entry]) -> int:
    """Count sequences that have ended in one way, equal ones of a request each by itself; return their number."""
    number = sum(len(entry.places) for entry in entries)
    metrics.sequences_of(outcome).inc(number)
    return number


def _requests(batch: list[_Entry]) -> Iterable[_Request]:
    """Return the requests of a batch, each once, in order."""
    return dict.fromkeys(entry.request for entry in batch)


def _note_finished(batch: list[_Entry], took: float = 0.0) -> None:
    """Note that a forward of these sequences has ended, and the seconds that it took."""
    now = time.monotonic()
    for request in _requests(batch):
        times = request.future.times
        times.finished, times.took = now, took


def _use_threads(count: int | None) -> None:
    """Let torch use `count` CPU threads in forwards of this thread; `None` = torch's number."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
        torch.get_num_threads()  # its first call on a thread takes the last number that any thread has set


def _shares(threads: int | None, streams: int) -> list[int | None]:
    """Return the CPU threads of each stream; `None` = torch's."""
    if streams > 1:
        import torch

        threads = threads or torch.get_num_threads()
        streams = min(streams, threads)
    if streams < 2:
        return [threads]
    assert threads is not None
    return [threads // streams + (i < threads % streams) for i in range(streams)]
