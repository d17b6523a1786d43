"""The scheduler's promises: nothing lost, nothing twice, budgets held, order fair, cancelled work never run."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cenote.engine.scheduler import Scheduler


@dataclass(eq=False)
class Request:
    gone: bool = False

    def cancelled(self) -> bool:
        return self.gone


@dataclass(eq=False)
class Piece:
    job: Request
    length: int
    number: int = field(default=0)

    def __len__(self) -> int:
        return self.length


def pieces(request: Request, lengths: list[int]) -> list[Piece]:
    return [Piece(request, length, number) for number, length in enumerate(lengths)]


def drain(scheduler: Scheduler[Piece]) -> list[list[Piece]]:
    batches = []
    while batch := scheduler.next_batch():
        batches.append(batch)
    return batches


workloads = st.lists(st.lists(st.integers(1, 120), min_size=1, max_size=40), min_size=1, max_size=8)


@given(workloads, st.integers(1, 300), st.integers(1, 20), st.integers(1, 64))
def test_everything_runs_once_within_the_budgets(
    lengths: list[list[int]], max_tokens: int, max_sequences: int, look_ahead: int
) -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens, max_sequences, look_ahead)
    added = [pieces(Request(), one) for one in lengths]
    for items in added:
        scheduler.add(items[0].job, items)
    assert scheduler.depth == sum(map(len, lengths))
    assert scheduler.tokens == sum(map(sum, lengths))
    batches = drain(scheduler)
    ran = [id(item) for batch in batches for item in batch]
    assert sorted(ran) == sorted(id(item) for items in added for item in items)
    assert scheduler.depth == scheduler.tokens == 0
    for batch in batches:
        assert len(batch) <= max_sequences
        assert sum(map(len, batch)) <= max_tokens or len(batch) == 1


@given(workloads, st.integers(50, 300))
def test_every_batch_takes_the_oldest_of_the_request_whose_turn_it_is(lengths: list[list[int]], budget: int) -> None:
    """So a sequence waits for at most the sequences before it in its request, times the requests beside it."""
    scheduler: Scheduler[Piece] = Scheduler(budget)
    left = {}
    for one in lengths:
        items = pieces(Request(), one)
        scheduler.add(items[0].job, items)
        left[items[0].job] = items
    waits = dict.fromkeys(left, 0)
    while batch := scheduler.next_batch():
        served = {item.job for item in batch}
        assert batch[0] is left[batch[0].job][0]
        for job in [*left]:
            left[job] = [item for item in left[job] if item not in batch]
            waits[job] = 0 if job in served else waits[job] + 1
            assert waits[job] < len(lengths)
            if not left[job]:
                del left[job]


def test_a_bulk_request_does_not_delay_a_small_one() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1000)
    bulk = Request()
    scheduler.add(bulk, pieces(bulk, [200] * 2048))
    scheduler.next_batch()
    small = Request()
    scheduler.add(small, pieces(small, [12]))
    assert small in {item.job for item in scheduler.next_batch()}


def test_room_goes_to_the_nearest_lengths() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=300)
    request = Request()
    scheduler.add(request, pieces(request, [100, 5, 98, 7, 101, 6]))
    assert sorted(map(len, scheduler.next_batch())) == [98, 100, 101]
    assert sorted(map(len, scheduler.next_batch())) == [5, 6, 7]


def test_look_ahead_bounds_the_comparison() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=200, look_ahead=2)
    request = Request()
    scheduler.add(request, pieces(request, [100, 5, 7, 100]))
    assert sorted(map(len, scheduler.next_batch())) == [5, 7, 100]


@given(workloads, st.integers(0, 7))
def test_cancelled_requests_cost_nothing(lengths: list[list[int]], cancelled: int) -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=100)
    requests = [Request() for _ in lengths]
    for request, one in zip(requests, lengths, strict=True):
        scheduler.add(request, pieces(request, one))
    requests[cancelled % len(requests)].gone = True
    ran = [item for batch in drain(scheduler) for item in batch]
    assert not any(item.job.gone for item in ran)
    assert len(ran) == sum(map(len, lengths)) - len(lengths[cancelled % len(requests)])
    assert scheduler.depth == scheduler.tokens == 0
