"""The local engine: one device thread that pulls batches, and futures that are each resolved once.

Callers submit from any thread. The device thread asks the scheduler for a batch when it can take one; no request waits
for a timer. On a GPU the next batch is launched while the last one runs. A batch that runs out of memory is split and
tried again; any other failure fails the requests of that batch only.
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
from cenote.engine.scheduler import Scheduler
from cenote.errors import CenoteError, Closed, EngineFailed, Overloaded
from cenote.tensors.native import release_freed_memory
from cenote.tensors.packing import common_prefix
from cenote.types import ModelInfo, Output, Sequence

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

log = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
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
    """What the engine asks of a model; `cenote.models.runner.PoolingModel` is one.

    A model that runs once what sequences have in common at their beginning says so: `shares_prefixes = True`.
    """

    info: ModelInfo

    def launch(self, sequences: Seq[Sequence]) -> Launched:
        """Start a forward."""


class _Job:
    """One accepted request: where its outputs gather."""

    def __init__(self, size: int, progress: Callable[[int], None] | None, shared: int = 0) -> None:
        self.future: Future[list[Output]] = Future()
        self.progress = progress
        self.shared = shared
        self.accepted = time.monotonic()
        self._outputs: list[Output | None] = [None] * size
        self._left = size

    def cancelled(self) -> bool:
        """True once the caller gave up or a part failed: what still waits need not run."""
        return self.future.done()

    def advance(self, count: int) -> None:
        """Tell the caller that `count` more sequences are done; what its callback raises is its own affair."""
        if self.progress is not None:
            try:
                self.progress(count)
            except Exception:  # a broken progress bar must not stop the device
                log.exception("the progress callback failed")

    def put(self, place: int, output: Output) -> None:
        """Store one output; the last one resolves the future."""
        self._outputs[place] = output
        self._left -= 1
        if not self._left:
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


class LocalEngine:
    """Runs one model on one device.

    Args:
        model: what runs the batches.
        max_batch_tokens: tokens of a batch; `None` = by device.
        max_batch_sequences: sequences of a batch.
        max_queued: sequences that may wait. A request is refused as a whole, unless nothing waits.
        threads: CPU threads of a forward; `None` = torch's. It is the device thread's own number: torch keeps one for
            each thread, and who sets it elsewhere does not change it here.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch_tokens: int | None = None,
        max_batch_sequences: int = 256,
        max_queued: int = 16384,
        threads: int | None = None,
    ) -> None:
        self.info = model.info
        self._model = model
        device = model.info.device.partition(":")[0]
        self.max_batch_tokens = max_batch_tokens or DEFAULT_BATCH_TOKENS.get(device, 1024)
        self._scheduler: Scheduler[_Entry] = Scheduler(self.max_batch_tokens, max_batch_sequences)
        self._max_queued = max_queued
        self._threads = threads
        self._changed = threading.Condition()
        self._closing = False
        self._dead: BaseException | None = None
        self._last_failed = False
        self._untidy_since: float | None = None
        self._rate: metrics.Rate = metrics.Rate()
        _RUNNING.add(self)
        self._thread = threading.Thread(target=self._work, name="cenote-device", daemon=True)
        self._thread.start()

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.types.Engine.submit`."""
        shared = common_prefix(sequences) if getattr(self._model, "shares_prefixes", False) else 0
        job = _Job(len(sequences), progress, shared)
        entries = [_Entry(job, place, sequence) for place, sequence in enumerate(sequences)]
        with self._changed:
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
            self._changed.notify()
        return job.future

    def healthy(self) -> bool:
        """True if the device thread lives and its last forward succeeded, or a new one of one token does."""
        if self._dead is not None or not self._thread.is_alive():
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
        with self._changed:
            self._closing = True
            self._changed.notify()
        _RUNNING.discard(self)
        if threading.current_thread() is not self._thread:  # an owner may be garbage-collected there
            self._thread.join()

    def _overloaded(self, more: int) -> Overloaded:
        rate = self._rate.value()
        seconds = self._scheduler.tokens / rate if rate else 1
        return Overloaded(
            f"the queue is full: {self._scheduler.depth} inputs wait, at most {self._max_queued} may, "
            f"and this request brings {more}; try again later",
            retry_after=min(60, max(1, round(seconds))),
        )

    def _work(self) -> None:
        """The device thread: take a batch, launch it, deliver the one before."""
        running: deque[tuple[list[_Entry], Launched, float]] = deque()
        batch: list[_Entry] = []
        try:
            if self._threads is not None:
                import torch

                torch.set_num_threads(self._threads)
            while True:
                batch = self._take(wait=not running)
                if batch:
                    self._launch(batch, running)
                elif not running:
                    return
                while running and (not batch or len(running) > 1 or running[0][1].ready()):
                    self._deliver(*running.popleft())
        except BaseException as error:  # the thread is lost: nobody may wait for it
            log.exception("the device thread died")
            self._die(error, [*batch, *(entry for run in running for entry in run[0])])

    def _take(self, *, wait: bool) -> list[_Entry]:
        """The next batch. With `wait`, an empty one means that the engine closes."""
        while True:
            with self._changed:
                if dropped := self._scheduler.drop_cancelled():
                    metrics.sequences_of("dropped").inc(dropped)
                batch = self._scheduler.next_batch()
                if batch and self._untidy_since is None:
                    self._untidy_since = time.monotonic()
                if batch or not wait or self._closing:
                    return batch
                is_resting = not self._changed.wait(None if self._untidy_since is None else REST)
            since = self._untidy_since
            if since is not None and (is_resting or time.monotonic() - since > LONG_WORK):
                release_freed_memory()
                self._untidy_since = None

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
        self._last_failed = False
        tokens = sum(map(len, batch))
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
        with self._changed:
            self._dead = error
            while batch := self._scheduler.next_batch():
                lost += batch
        for entry in lost:
            entry.job.fail(failure)
