"""The local engine: device threads that pull batches, and futures that are each resolved once.

Callers submit from any thread. A device thread asks the scheduler for a batch when it can take one; no request waits
for a timer. On a GPU there is one, and it launches the next batch while the last one runs. On a CPU there are several
*streams*, each with its part of the cores: two forwards side by side waste less of them than one on all does, between
its layers. Only what comes alone runs on all of them. A batch that runs out of memory is split and tried again; any
other failure fails the requests of that batch only.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, deque
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Protocol

from cenote import metrics
from cenote.core import ModelInfo, Output, Sequence
from cenote.engine.scheduler import Scheduler
from cenote.errors import CenoteError, Closed, EngineFailed, Overloaded
from cenote.tensors.packing import common_prefix
from cenote.tensors.process import release_freed_memory, release_threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

log = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = {"cpu": 768, "cuda": 16384}
DEFAULT_STREAMS = {"cpu": 2}
"""For models that bear it."""
HEALTH_PATIENCE = 30.0
"""Seconds that a health check waits for its own forward."""
REST, LONG_WORK = 2.0, 10.0
"""Seconds without work, and seconds of work with pauses, after which freed memory goes back to the system."""


_RUNNING: weakref.WeakSet[LocalEngine] = weakref.WeakSet()
metrics.queued_sequences.set_function(lambda: sum(engine._scheduler.depth for engine in [*_RUNNING]))
metrics.queued_tokens.set_function(lambda: sum(engine._scheduler.tokens for engine in [*_RUNNING]))
metrics.tokens_per_second.set_function(lambda: sum(engine._rate.value() for engine in [*_RUNNING]))


class Launched(Protocol):
    """A batch that the model has begun."""

    def ready(self) -> bool:
        """Whether `finish` would return at once."""

    def finish(self) -> list[Output | CenoteError]:
        """Wait for the results, one per sequence."""


class Model(Protocol):
    """What the engine asks of a model; `cenote.models.model.PoolingModel` is one.

    A model that runs once what sequences have in common at their beginning says so: `shares_prefixes = True`; and so
    does one that several threads may launch at a time: `is_reentrant = True`.
    """

    info: ModelInfo

    def launch(self, sequences: Seq[Sequence]) -> Launched:
        """Start a forward."""


class _Job:
    """One accepted request: where its outputs gather."""

    def __init__(self, size: int, progress: Callable[[int], None] | None, shared: int = 0, priority: int = 0) -> None:
        self.future: Future[list[Output]] = Future()
        self.progress = progress
        self.shared = shared
        self.priority = priority
        self.accepted = time.monotonic()
        self._outputs: list[Output | None] = [None] * size
        self._left = size
        self._lock = threading.Lock()  # several streams may have parts of it

    def cancelled(self) -> bool:
        """True once the caller gave up or a part failed: what still waits need not run."""
        return self.future.done()

    def advance(self, count: int) -> None:
        """Tell the caller that `count` more sequences are done; what its callback raises is its own affair."""
        if self.progress is not None:
            try:
                with self._lock:
                    self.progress(count)
            except Exception:  # a broken progress bar must not stop the device
                log.exception("the progress callback failed")

    def put(self, place: int, output: Output) -> None:
        """Store one output; the last one resolves the future."""
        with self._lock:
            self._outputs[place] = output
            self._left -= 1
            is_whole = not self._left
        if is_whole:
            self._settle(lambda: self.future.set_result([o for o in self._outputs if o is not None]))

    def fail(self, error: CenoteError) -> None:
        """Fail the whole request; later outputs and errors are ignored."""
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, action: Callable[[], None]) -> None:
        try:
            action()
        except InvalidStateError:
            log.debug("a request was answered already, or its caller gave up")


class _Entry:
    """One sequence on its way."""

    __slots__ = ("job", "place", "sequence")

    def __init__(self, job: _Job, place: int, sequence: Sequence) -> None:
        self.job = job
        self.place = place
        self.sequence = sequence

    def __len__(self) -> int:
        return len(self.sequence)


class _Stream:
    """A device thread, from the outside.

    Attributes:
        threads: CPU threads of its forwards; `None` = torch's.
        is_wide: it runs what comes alone, on all cores, and nothing runs beside it.
        woken: tells it that it may find work.
    """

    def __init__(self, number: int, threads: int | None, lock: threading.RLock, *, is_wide: bool = False) -> None:
        self.number = number
        self.threads = threads
        self.is_wide = is_wide
        self.woken = threading.Condition(lock)


class LocalEngine:
    """Runs one model on one device.

    Args:
        model: what runs the batches.
        max_batch_tokens: tokens of a batch; `None` = by device.
        max_batch_sequences: sequences of a batch.
        max_queued: sequences that may wait. A request is refused as a whole, unless nothing waits.
        threads: CPU threads in all; `None` = torch's. They are the device threads' own numbers: torch keeps one for
            each thread, and who sets it elsewhere does not change it here.
        streams: forwards that run at a time, each on its part of `threads`; `None` = by device. 1 where the model does
            not bear more.
        by_priority: requests of lower `Sequence.priority` run first.
    """

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
    ) -> None:
        self._model = model
        self._by_priority = by_priority
        device = model.info.report.device.partition(":")[0]
        self.max_batch_tokens = max_batch_tokens or DEFAULT_BATCH_TOKENS.get(device, 768)
        self._max_queued = max_queued
        self._lock = threading.RLock()
        self._streams = [
            _Stream(i, own, self._lock, is_wide=wide)
            for i, (own, wide) in enumerate(_shares(threads, self._bears(streams, device)))
        ]
        self.info = model.info.reported(streams=sum(not stream.is_wide for stream in self._streams))
        self._scheduler: Scheduler[_Entry] = Scheduler(
            self.max_batch_tokens, max_batch_sequences, streams=self.info.report.streams
        )
        self._busy: set[_Stream] = set()
        self._closing = False
        self._dead: BaseException | None = None
        self._last_failed = False
        self._untidy_since: float | None = None
        self._worked_until = 0.0
        self._rate: metrics.Rate = metrics.Rate()
        _RUNNING.add(self)
        began = threading.Barrier(len(self._streams) + 1)
        self._threads = [
            threading.Thread(target=self._work, args=(stream, began), name="cenote-device", daemon=True)
            for stream in self._streams
        ]
        for thread in self._threads:
            thread.start()
        began.wait()
        if any(stream.threads is not None for stream in self._streams):
            import torch

            torch.set_num_threads(torch.get_num_threads())  # what other new threads begin with is the last number set
        release_threads()  # those with which this thread has loaded the model

    def _bears(self, wanted: int | None, device: str) -> int:
        """How many forwards may run at a time."""
        if device != "cpu" or not getattr(self._model, "is_reentrant", False):
            return 1
        return DEFAULT_STREAMS[device] if wanted is None else wanted

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`."""
        shared = common_prefix(sequences) if getattr(self._model, "shares_prefixes", False) else 0
        priority = sequences[0].priority if sequences and self._by_priority else 0
        job = _Job(len(sequences), progress, shared, priority)
        entries = [_Entry(job, place, sequence) for place, sequence in enumerate(sequences)]
        with self._lock:
            if self._dead is not None:
                raise EngineFailed(f"the device thread died: {self._dead!r}")
            if self._closing:
                raise Closed("the engine is shutting down")
            if self._scheduler.depth and self._scheduler.depth + len(entries) > self._max_queued:
                self._scheduler.drop_cancelled()
                if self._scheduler.depth + len(entries) > self._max_queued:
                    raise self._overloaded(len(entries))
            if not entries:
                job.future.set_result([])
                return job.future
            self._scheduler.add(job, entries)
            self._wake()
        return job.future

    def healthy(self) -> bool:
        """True if the device threads live and the last forward succeeded, or a new one of one token does."""
        if self._dead is not None or not all(thread.is_alive() for thread in self._threads):
            return False
        if not self._last_failed:
            return True
        try:
            self.submit([Sequence([0], task=self.info.default_task)]).result(timeout=HEALTH_PATIENCE)
        except (CenoteError, TimeoutError):
            return False
        return True

    def close(self) -> None:
        """Refuse new work, finish what was accepted, and stop. May be called twice."""
        with self._lock:
            self._closing = True
            self._wake()
        _RUNNING.discard(self)
        for thread in self._threads:
            if thread is not threading.current_thread():  # an owner may be garbage-collected there
                thread.join()

    def _overloaded(self, more: int) -> Overloaded:
        rate = self._rate.value()
        seconds = self._scheduler.tokens / rate if rate else 1
        return Overloaded(
            f"the queue is full: {self._scheduler.depth} inputs wait, at most {self._max_queued} may, "
            f"and this request brings {more}; try again later",
            retry_after=min(60, max(1, round(seconds))),
        )

    def _work(self, stream: _Stream, began: threading.Barrier) -> None:
        """A device thread: take a batch, launch it, deliver the one before."""
        running: deque[tuple[list[_Entry], Launched, float]] = deque()
        batch: list[_Entry] = []
        try:
            if stream.threads is not None:
                import torch

                torch.set_num_threads(stream.threads)
                torch.get_num_threads()  # the first time, it begins with the last number that any thread has set
            began.wait()
            while True:
                batch = self._take(stream, wait=not running)
                if batch:
                    self._launch(batch, running)
                elif not running:
                    return
                while running and (not batch or len(running) > 1 or running[0][1].ready()):
                    self._deliver(*running.popleft())
        except BaseException as error:  # the thread is lost: nobody may wait for it
            began.abort()
            log.exception("the device thread died")
            self._die(error, [*batch, *(entry for run in running for entry in run[0])])

    def _take(self, stream: _Stream, *, wait: bool) -> list[_Entry]:
        """The next batch of `stream`. With `wait`, an empty one means that the engine closes."""
        if wait:
            with self._lock:
                self._worked_until = time.monotonic()
                self._busy.discard(stream)
                self._scheduler.done(stream.number)
        while True:
            with self._lock:
                if dropped := self._scheduler.drop_cancelled():
                    metrics.sequences_of("dropped").inc(dropped)
                batch = self._scheduler.next_batch(stream.number) if self._may_take(stream) else []
                if batch:
                    self._busy.add(stream)
                    self._untidy_since = self._untidy_since or time.monotonic()
                self._wake()  # for what is left
                if batch or not wait or (self._closing and not self._scheduler.depth):
                    return batch
                stream.woken.wait(None if self._untidy_since is None else REST)
                if is_pause := self._is_pause():
                    self._untidy_since = None
            if is_pause:
                release_freed_memory()

    def _may_take(self, stream: _Stream) -> bool:
        """Whether what waits is for `stream`: the wide one, if there is one, runs what is alone."""
        if any(other.is_wide for other in self._busy):
            return False
        is_alone = not self._busy and self._scheduler.depth == 1
        return stream.is_wide == (is_alone and self._streams[-1].is_wide)

    def _wake(self) -> None:
        """Tell a stream of work that it may take; when closing, all that they may have to end."""
        for stream in self._streams:
            if self._closing or (self._scheduler.depth and stream not in self._busy and self._may_take(stream)):
                stream.woken.notify()
                if not self._closing:
                    return

    def _is_pause(self) -> bool:
        """Whether to tidy up: nothing runs, after work, for a while or for the first time in long."""
        now = time.monotonic()
        return (
            self._untidy_since is not None
            and not self._busy
            and (now - self._worked_until >= REST or now - self._untidy_since > LONG_WORK)
        )

    def _launch(self, batch: list[_Entry], running: deque[tuple[list[_Entry], Launched, float]]) -> None:
        began = time.monotonic()
        for entry in {id(e.job): e for e in batch}.values():
            metrics.stage("queue").observe(began - entry.job.accepted)
        try:
            running.append((batch, self._model.launch([e.sequence for e in batch]), began))
        except Exception as error:  # whatever the model raises fails this batch, and only this one
            self._failed(batch, error)

    def _deliver(self, batch: list[_Entry], launched: Launched, began: float) -> None:
        try:
            outputs = launched.finish()
        except Exception as error:  # as in _launch: a GPU reports its failures here
            self._failed(batch, error)
            return
        tokens = sum(map(len, batch))
        with self._lock:
            self._last_failed = False
            self._rate.add(tokens)
        metrics.tokens.inc(tokens)
        metrics.batch_tokens.observe(tokens)
        metrics.batch_sequences.observe(len(batch))
        metrics.stage("forward").observe(time.monotonic() - began)
        finished = Counter(e.job for e, output in zip(batch, outputs, strict=True) if isinstance(output, Output))
        for job, count in finished.items():
            job.advance(count)
        for entry, output in zip(batch, outputs, strict=True):
            metrics.sequences_of("done" if isinstance(output, Output) else "failed").inc()
            if isinstance(output, Output):
                entry.job.put(entry.place, output)
            else:
                entry.job.fail(output)

    def _failed(self, batch: list[_Entry], error: Exception) -> None:
        """Split and retry a batch that ran out of memory; fail the requests of any other."""
        if type(error).__name__ == "OutOfMemoryError" and len(batch) > 1:
            log.warning("a batch of %d sequences ran out of memory and is split", len(batch))
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                retried: deque[tuple[list[_Entry], Launched, float]] = deque()
                self._launch(half, retried)
                for run in retried:
                    self._deliver(*run)
            return
        log.error("a batch of %d sequences failed", len(batch), exc_info=error)
        self._last_failed = True
        metrics.sequences_of("failed").inc(len(batch))
        for job in {id(e.job): e.job for e in batch}.values():
            job.fail(EngineFailed(f"the forward pass failed: {type(error).__name__}: {error}"))

    def _die(self, error: BaseException, lost: list[_Entry]) -> None:
        failure = EngineFailed(f"the device thread died: {error!r}")
        with self._lock:
            self._dead = error
            self._closing = True
            while batch := self._scheduler.next_batch():
                lost += batch
            self._wake()
        for entry in lost:
            entry.job.fail(failure)


def _shares(threads: int | None, streams: int) -> list[tuple[int | None, bool]]:
    """The CPU threads of each device thread, and whether it is the wide one; `None` = torch's."""
    if streams > 1:
        import torch

        threads = threads or torch.get_num_threads()
        streams = min(streams, threads)
    if streams < 2:
        return [(threads, False)]
    assert threads is not None
    narrow = [(threads // streams + (i < threads % streams), False) for i in range(streams)]
    return [*narrow, (threads, True)]
