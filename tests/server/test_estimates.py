"""The estimate of a wait, and so `Retry-After`, while requests of several texts take turns in an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from cenote.core import Output, Sequence
from cenote.engine.fake import FakeEngine
from cenote.engine.promise import Timed
from tests import PATIENCE
from tests.conftest import INFO

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from tests.conftest import Serve

TOKENS = 60
"""Of each text."""


@dataclass
class Turn:
    """A request, and how many of its sequences have run."""

    future: Timed[list[Output]]
    outputs: list[Output]
    progress: Callable[[int], None] | None
    done: int = 0


@dataclass
class TakingTurns(FakeEngine):
    """Runs a sequence of every request in turn, a second for all of them, when it is told to."""

    now: float = 1000.0
    requests: list[Turn] = field(default_factory=list)

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        future: Timed[list[Output]] = Timed()
        future.times.accepted = future.times.launched = self.now
        self.requests.append(Turn(future, [self._output(sequence) for sequence in sequences], progress))
        return future

    @property
    def tokens(self) -> int:
        """Tokens of the requests that are not finished."""
        return TOKENS * sum(len(request.outputs) for request in self.requests)

    def turn(self) -> None:
        self.now += 1
        for request in self.requests:
            request.done += 1
            if request.progress is not None:
                request.progress(1)
        for request in self.requests:
            if request.done == len(request.outputs):
                request.future.times.finished = self.now
                request.future.set_result(request.outputs)
        self.requests = [request for request in self.requests if request.done < len(request.outputs)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(
    "counts",
    [[1, 2, *[10] * 20], [2, 9, *[10] * 20], [10] * 22, [1] * 22],
    ids=["few at first", "few at the end", "all alike", "single"],
)
def test_an_estimate_is_no_longer_than_what_waits_takes(serve: Serve, counts: list[int]) -> None:
    """All of these end at about the same time, after turns in which few of them or none did."""
    engine = TakingTurns(INFO)
    client = serve(engine, max_waiting_time=3600)
    admission = client.app._serving.admission  # type: ignore[attr-defined]
    (line,) = admission._lines.values()
    line._clock = lambda: engine.now
    estimates: list[float] = []
    bodies = [{"input": [[5] * TOKENS] * count} for count in counts]
    with ThreadPoolExecutor(len(counts)) as pool:
        answers = [pool.submit(client.post, "/v1/embeddings", json=body) for body in bodies]
        wait_until(lambda: len(engine.requests) == len(counts))
        while engine.requests:
            engine.turn()
            wait_until(lambda: line.tokens == engine.tokens)
            estimates.append(admission.seconds)
        assert {answer.result(PATIENCE).status_code for answer in answers} == {200}
    assert max(estimates) <= max(counts)
    assert admission.seconds == 0
