"""The scheduler's work for a request and for a batch does not grow with what waits, but for its logarithm.

Counted are comparisons and look-ups of priorities, and questions for the length of a sequence.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import pytest

from cenote.engine.scheduler import Scheduler

FEW, MANY = 1_000, 30_000
BATCHES = 8
LOOKED_AT = 1_100
"""Requests from which on a batch looks at no more of them."""


class Priority(int):
    """A priority that counts how often it is compared or looked up."""

    steps = 0

    def __lt__(self, other: int) -> bool:
        Priority.steps += 1
        return int(self) < int(other)

    def __eq__(self, other: object) -> bool:
        Priority.steps += 1
        return isinstance(other, int) and int(self) == int(other)

    def __hash__(self) -> int:
        Priority.steps += 1
        return hash(int(self))


@dataclass(eq=False)
class Request:
    priority: int = 0
    shared: int = 0


@dataclass(eq=False)
class Item:
    """A sequence that counts how often its length is asked for."""

    request: Request
    length: int
    looks: list[int] = field(default_factory=lambda: LOOKS)

    def __len__(self) -> int:
        self.looks[0] += 1
        return self.length


LOOKS = [0]

BULK = 50
"""One of so many requests is bulk, where there is bulk."""
KINDS: dict[str, tuple[int, int, int, int]] = {
    "alike": (1, 1, 30, 1),
    "each its own priority": (1 << 30, 1, 30, 1),
    "long ones, each its own priority": (1 << 30, 1, 300, 1),
    "several sequences, each its own priority": (1 << 30, 20, 300, 20),
    "bulk beside, three priorities": (3, 1, 100, 100),
}
"""Priorities, sequences of a request, their tokens, and sequences of a bulk request."""


@cache
def work(waiting: int, priorities: int, count: int, length: int, bulk: int) -> Counter[str]:
    """Return steps of one more request, of some batches and of a cancelled request while so many sequences wait."""
    scheduler: Scheduler[Item] = Scheduler(max_tokens=768)
    requests = [Request(Priority(number * 7919 % priorities)) for number in range(max(LOOKED_AT, waiting // count))]
    for number, request in enumerate(requests):
        scheduler.add(request, [Item(request, length) for _ in range(count if number % BULK else bulk)])
    steps: Counter[str] = Counter()

    def counted(name: str) -> None:
        steps[f"{name}: priorities"] = Priority.steps
        steps[f"{name}: lengths"] = LOOKS[0]
        Priority.steps = LOOKS[0] = 0

    Priority.steps = LOOKS[0] = 0
    late = Request(Priority(priorities // 2))
    scheduler.add(late, [Item(late, length)])
    counted("a request")
    for _ in range(BATCHES):
        assert scheduler.next_batch()
    counted("batches")
    scheduler.cancel(requests[-1])
    assert len(scheduler.drop_cancelled()) <= bulk
    counted("a cancelled request")
    return steps


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.full if "long" in kind or kind == "alike" else ()) for kind in KINDS]
)
def test_work_grows_with_the_logarithm_at_most(kind: str) -> None:
    few, many = work(FEW, *KINDS[kind]), work(MANY, *KINDS[kind])
    for name in few:
        assert many[name] <= math.log(MANY, FEW) * few[name] + 16, (name, few, many)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_looks_at_no_more_than_its_look_ahead(kind: str) -> None:
    steps = work(FEW, *KINDS[kind])
    look_ahead = Scheduler[Item](1).look_ahead
    assert steps["batches: lengths"] <= BATCHES * 8 * look_ahead
    assert steps["batches: priorities"] <= BATCHES * 12 * look_ahead
    assert steps["a request: lengths"] == 1
