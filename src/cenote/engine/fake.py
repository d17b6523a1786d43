"""An engine without a model: deterministic vectors and scripted failures, for tests of the layers above the engine."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from cenote.core import ModelInfo, Output, Report, Sequence
from cenote.engine.promise import Timed
from cenote.errors import CenoteError, Closed
from cenote.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq
    from concurrent.futures import Future

    Row = np.ndarray[tuple[int], np.dtype[np.float32]]

FAKE_INFO = ModelInfo(
    name="fake",
    architecture="FakeModel",
    tasks=("embed", "token_embed"),
    default_task="embed",
    dimension=8,
    max_model_len=64,
    vocab_size=1000,
    use_activation=True,
    report=Report(source="fake", pooling="mean"),
)


def fake_vector(sequence: Sequence, width: int) -> Row:
    """Return the vector of a sequence: random numbers seeded by its content, cut and normalised by its parameters."""
    content = b"".join(map(attrgetter("key"), sequence.media))
    vector = np.random.default_rng([*sequence.ids, *content]).standard_normal(width).astype(np.float32)
    vector = vector[: sequence.params.dimensions]
    return vector if sequence.params.use_activation is False else vector / np.linalg.norm(vector)


def fake_classes(sequence: Sequence, info: ModelInfo) -> Row:
    """Return the class values of a sequence: random numbers seeded by its ids, under the activation of `info`."""
    logits = np.random.default_rng([1, *sequence.ids]).standard_normal(info.num_labels).astype(np.float32)
    if sequence.params.use_activation is False or info.activation == "none":
        return logits
    odds = np.exp(logits)
    total = odds.sum() if info.activation == "softmax" else 1 + odds
    values: Row = odds / total
    return values


@dataclass
class FakeEngine:
    """Answers at once, or when `release` is called.

    Attributes:
        info: the information of a model; its tasks, sizes and activation decide the outputs.
        failures: errors for the next submissions, first in first out; each fails one request.
        held: while true, futures stay open until `release` is called.
    """

    info: ModelInfo = FAKE_INFO
    failures: list[CenoteError] = field(default_factory=list)
    held: bool = False
    is_healthy: bool = True
    fault: str = ""
    closed: bool = False
    submitted: list[Sequence] = field(default_factory=list)
    _open: list[tuple[Timed[list[Output]], list[Output], Callable[[int], None] | None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`."""
        if self.closed:
            raise Closed("the engine is shutting down")
        self.submitted += sequences
        future: Timed[list[Output]] = Timed()
        future.times.accepted = time.monotonic()
        if self.failures:
            future.set_exception(self.failures.pop(0))
            return future
        outputs = [self._output(sequence) for sequence in sequences]
        with self._lock:
            self._open.append((future, outputs, progress))
        if not self.held:
            self.release()
        return future

    def release(self) -> None:
        """Answer every open request that was not cancelled."""
        with self._lock:
            waiting, self._open = self._open, []
        for future, outputs, progress in waiting:
            future.times.launched = future.times.finished = time.monotonic()
            if not future.set_running_or_notify_cancel():
                continue
            if progress is not None:
                progress(len(outputs))
            future.set_result(outputs)

    def healthy(self) -> bool:
        """See `cenote.core.Engine.healthy`."""
        return self.is_healthy

    def close(self) -> None:
        """See `cenote.core.Engine.close`."""
        self.closed = True
        self.release()

    def _output(self, sequence: Sequence) -> Output:
        if TASKS[sequence.task].granularity == "sequence":
            return Output(self._row(sequence))
        return Output(np.stack([self._row(replace(sequence, ids=[token])) for token in sequence.ids]))

    def _row(self, sequence: Sequence) -> Row:
        if "classify" in sequence.task:
            return fake_classes(sequence, self.info)
        return fake_vector(sequence, self.info.dimension)
