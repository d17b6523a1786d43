"""A flood on a simulated machine: the real scheduler and admission, a clock that jumps from event to event.

Requests come at several times the capacity and do not wait for each other. What was admitted is answered in time, the
machine has work all the while, and nobody is told to stay away for longer than the line is.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.engine.promise import Timed
from cenote.engine.scheduler import Scheduler
from cenote.errors import Overloaded
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.admission import BYTES_PER_TOKEN, Admission, EnginePlace
from tests.conftest import INFO

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

MEAN = 100
"""Tokens of a text."""
TIMES = 5
"""Arrivals, of the capacity."""
LIMIT = 10.0
"""Seconds that a request may wait."""


@dataclass(eq=False)
class Asked:
    """A request, as far as the scheduler and the line are concerned."""

    place: EnginePlace
    arrived: float
    left: int
    shared: int = 0
    priority: int = 0
    future: Timed[None] = field(default_factory=Timed)


@dataclass
class Text:
    """A sequence of a request."""

    request: Asked
    tokens: int

    def __len__(self) -> int:
        return self.tokens


class Machine:
    """An engine of two streams, and the admission before it.

    Attributes:
        now: seconds.
        latencies: of the answered requests, in seconds.
        retries: the seconds that refused requests were told.
        waits: estimates of those that a short request would have, at each refusal.
        idle: stream-seconds without work.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pace: float, size: int, streams: int = 2) -> None:
        report = replace(INFO.report, streams=streams, batch_tokens=768)
        info = replace(INFO, report=report)
        service = Service(FakeEngine(info), Renderer(tokenizer, info), ("fake",))
        self.now = 0.0
        self.latencies: list[float] = []
        self.retries: list[int] = []
        self.waits: list[float] = []
        self.idle = 0.0
        self.admission = Admission([service], ServerConfig(max_waiting_time=LIMIT), lambda: self.now)
        self._line = self.admission.line(service)
        self._pace, self._size = pace, size
        self._scheduler: Scheduler[Text] = Scheduler(768, streams=streams)
        self._free = dict.fromkeys(range(streams), 0.0)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._random = random.Random(0)

    def flood(self, seconds: float) -> None:
        """Let requests arrive for so long, and work until none is left."""
        arrival = 0.0
        while arrival < seconds:
            self._at(arrival, self._arrive)
            arrival += self._random.expovariate(TIMES * self._pace / MEAN / self._size)
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
            self._start()

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), event))

    def _arrive(self) -> None:
        size = self._size * MEAN * BYTES_PER_TOKEN
        try:
            self.admission.check(size)
        except Overloaded as refusal:
            self.retries.append(refusal.retry_after)
            self.waits.append(self.admission.seconds)
            return
        request = Asked(self._line.enter(size), self.now, self._size)
        lengths = [self._random.lognormvariate(math.log(MEAN) - 0.32, 0.8) for _ in range(self._size)]
        texts = [Text(request, min(256, math.ceil(length))) for length in lengths]
        request.place.__enter__()
        request.place.queue(sum(map(len, texts)), len(texts))
        request.place.begin(request.future)
        self._scheduler.add(request, texts)

    def _start(self) -> None:
        """Begin forwards on the streams that have none."""
        streams = len(self._free)
        for stream, since in self._free.items():
            batch = self._scheduler.next_batch(stream) if since <= self.now else []
            if not batch:
                continue
            self.idle += self.now - since
            end = self.now + sum(map(len, batch)) * streams / self._pace * self._random.uniform(0.9, 1.1)
            self._free[stream] = end
            self._at(end, lambda stream=stream, batch=batch, took=end - self.now: self._end(stream, batch, took))  # type: ignore[misc]

    def _end(self, stream: int, batch: list[Text], took: float) -> None:
        self._scheduler.done(stream)
        for request, count in Counter(text.request for text in batch).items():
            request.future.times.finished, request.future.times.took = self.now, took
            request.place.advance(count)
            request.left -= count
            if not request.left:
                request.future.set_result(None)
                request.place.__exit__(None, None, None)
                self.latencies.append(self.now - request.arrived)


@pytest.mark.parametrize(
    ("size", "pace", "seconds", "late"),
    [(1, 3000, 60, 1.05), (8, 6000, 60, 1.05), (32, 15_000, 60, 1.05), (1, 600, 120, 1.3), (8, 1500, 120, 1.3)],
)
def test_a_flood_is_admitted_as_far_as_it_can_be_answered_in_time(
    tokenizer: PreTrainedTokenizerBase, size: int, pace: float, seconds: float, late: float
) -> None:
    """Of the last two machines a forward takes one and two seconds, so that the line moves in steps of that."""
    machine = Machine(tokenizer, pace, size)
    machine.flood(seconds)
    latencies = sorted(machine.latencies)
    assert len(machine.retries) > 2 * len(latencies), "most are refused"
    assert latencies[-1] <= late * LIMIT
    assert latencies[len(latencies) // 2] >= 0.75 * LIMIT, "the time that they may wait is used"
    assert machine.idle < 0.1
    assert max(machine.waits) <= 1.5 * LIMIT, "no line is ever longer than what was let into it"
    assert max(machine.retries) <= LIMIT
    assert machine.admission.seconds == 0
