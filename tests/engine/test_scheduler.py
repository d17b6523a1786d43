"""The scheduler's promises: nothing lost, nothing twice, budgets held, order fair, cancelled work never run."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cenote.engine.scheduler import MOST_PASSED, Scheduler


@dataclass(eq=False)
class Request:
    shared: int = 0
    priority: int = 0


@dataclass(eq=False)
class Piece:
    request: Request
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


@given(workloads, st.integers(1, 300), st.integers(1, 20), st.integers(1, 64), st.lists(st.integers(0, 3), max_size=50))
def test_everything_runs_once_within_the_budgets(
    lengths: list[list[int]], max_tokens: int, max_sequences: int, look_ahead: int, order: list[int]
) -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens, max_sequences, look_ahead, streams=4)
    added = [pieces(Request(), one) for one in lengths]
    for items in added:
        scheduler.add(items[0].request, items)
    assert scheduler.depth == sum(map(len, lengths))
    assert scheduler.tokens == sum(map(sum, lengths))
    batches = [batch for stream in order if (batch := scheduler.next_batch(stream))]
    for stream in range(4):
        scheduler.done(stream)
    batches += drain(scheduler)
    ran = [id(item) for batch in batches for item in batch]
    assert sorted(ran) == sorted(id(item) for items in added for item in items)
    assert scheduler.depth == scheduler.tokens == 0
    for batch in batches:
        assert len(batch) <= max_sequences
        assert sum(map(len, batch)) <= max_tokens or len(batch) == 1


@given(workloads, st.integers(1, 300), st.integers(1, 20), st.data())
def test_a_common_beginning_counts_once_in_a_batch(
    lengths: list[list[int]], max_tokens: int, max_sequences: int, data: st.DataObject
) -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens, max_sequences)
    for one in lengths:
        request = Request(shared=data.draw(st.integers(0, min(one) - 1)))
        scheduler.add(request, pieces(request, one))
    assert scheduler.tokens == sum(map(sum, lengths)), "what waits is counted whole"
    batches = drain(scheduler)
    assert sorted(len(item) for batch in batches for item in batch) == sorted(n for one in lengths for n in one)
    assert scheduler.tokens == 0
    for batch in batches:
        requests = {item.request for item in batch}
        repeated = sum(item.request.shared for item in batch) - sum(request.shared for request in requests)
        assert sum(map(len, batch)) - repeated <= max_tokens or len(batch) == 1


def test_a_common_beginning_makes_room() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1000)
    for shared in (0, 200):
        request = Request(shared=shared)
        scheduler.add(request, pieces(request, [250] * 16))
        assert [len(batch) for batch in drain(scheduler)] == ([4] * 4 if not shared else [16])


def test_every_batch_pays_for_the_beginnings_in_it() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1000)
    request, other = Request(shared=200), Request(shared=300)
    scheduler.add(request, pieces(request, [250] * 20))
    scheduler.add(other, pieces(other, [400]))
    assert [len(batch) for batch in drain(scheduler)] == [9, 12], "250 + 400 + 7 * 50, then 250 + 11 * 50"
    first, long = Request(), Request(shared=200)
    scheduler.add(first, pieces(first, [100]))
    scheduler.add(long, pieces(long, [950, *[210] * 20]))
    assert [len(batch) for batch in drain(scheduler)] == [21, 1], "100 + 210 + 19 * 10; the head of 950 had no room"


@given(workloads, st.integers(50, 300))
def test_every_batch_takes_the_oldest_of_the_request_whose_turn_it_is(lengths: list[list[int]], budget: int) -> None:
    """So a sequence waits for at most the sequences before it in its request, times the requests beside it, twice."""
    scheduler: Scheduler[Piece] = Scheduler(budget)
    left = {}
    for one in lengths:
        items = pieces(Request(), one)
        scheduler.add(items[0].request, items)
        left[items[0].request] = items
    waits = dict.fromkeys(left, 0)
    while batch := scheduler.next_batch():
        served = {item.request for item in batch}
        assert batch[0] is left[batch[0].request][0]
        for request in [*left]:
            left[request] = [item for item in left[request] if item not in batch]
            waits[request] = 0 if request in served else waits[request] + 1
            assert waits[request] < 2 * len(lengths)
            if not left[request]:
                del left[request]


def test_a_bulk_request_does_not_delay_a_small_one() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1000)
    bulk = Request()
    scheduler.add(bulk, pieces(bulk, [200] * 2048))
    scheduler.next_batch()
    small = Request()
    scheduler.add(small, pieces(small, [12]))
    assert small in {item.request for item in scheduler.next_batch()}


def test_bulk_that_others_come_beside_runs_in_short_batches_and_lets_them_pass() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1600)
    bulk = Request()
    scheduler.add(bulk, pieces(bulk, [100] * 100_000))
    assert len(scheduler.next_batch()) == 16, "alone, it fills its batches"
    for _ in range(3):
        first, second = Request(), Request()
        scheduler.add(first, pieces(first, [12]))
        assert [item.request for item in scheduler.next_batch()] == [first], "nothing of the bulk beside it"
        scheduler.add(second, pieces(second, [12]))
        own, *rest = sorted(scheduler.next_batch(), key=len)
        assert own.request is second
        assert [item.request for item in rest] == [bulk], "but not twice without the bulk: 12 + 100 of 200 tokens"
    sizes = [len(scheduler.next_batch()) for _ in range(80)]
    assert sizes[:10] == [2] * 10, "somebody else may come again"
    assert sizes[-10:] == [16] * 10, "nobody came"
    assert sizes == sorted(sizes)


def test_requests_that_fill_no_batch_do_not_shorten_any() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1600)
    for _ in range(16):
        request = Request()
        scheduler.add(request, pieces(request, [100] * 16))
    assert [len(batch) for batch in drain(scheduler)] == [16] * 16


def test_short_batches_are_worth_what_they_begin_with() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1600)
    bulk, small = Request(shared=150), Request()
    scheduler.add(bulk, pieces(bulk, [160] * 2000))
    scheduler.add(small, pieces(small, [160]))
    assert len(scheduler.next_batch()) == 1
    assert len(scheduler.next_batch()) == 45, "160 + 44 * 10 of 600 tokens; 200 would have room for 5"


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
    gone = requests[cancelled % len(requests)]
    scheduler.cancel(gone)
    dropped = scheduler.drop_cancelled()
    assert [item.length for item in dropped] == lengths[cancelled % len(requests)]
    assert {item.request for item in dropped} == {gone}
    ran = [item for batch in drain(scheduler) for item in batch]
    assert not any(item.request is gone for item in ran)
    scheduler.cancel(gone)
    assert scheduler.drop_cancelled() == [], "it waits no more"
    assert len(ran) == sum(map(len, lengths)) - len(lengths[cancelled % len(requests)])
    assert scheduler.depth == scheduler.tokens == 0


@given(st.lists(st.integers(1, 60), min_size=2, max_size=12), st.integers(2, 4))
def test_what_waits_is_dealt_out_evenly_among_free_streams(lengths: list[int], streams: int) -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1000, streams=streams)
    request = Request()
    scheduler.add(request, pieces(request, lengths))
    batches = [scheduler.next_batch(stream) for stream in range(streams)]
    assert scheduler.depth == 0
    shares = [sum(map(len, batch)) for batch in batches]
    assert max(shares) < sum(lengths) / streams + streams * max(lengths), "each leaves less than one sequence too many"
    assert sum(map(bool, batches)) >= min(2, len(lengths))


def test_a_stream_beside_busy_ones_takes_all_that_there_is() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1000, streams=2)
    first, second = Request(), Request()
    scheduler.add(first, pieces(first, [10] * 8))
    assert len(scheduler.next_batch(0)) == 4
    assert len(scheduler.next_batch(1)) == 4
    scheduler.add(second, pieces(second, [10] * 8))
    assert len(scheduler.next_batch(1)) == 8, "the other is busy"
    assert scheduler.next_batch(1) == []
    scheduler.add(second, pieces(second, [10] * 8))
    assert len(scheduler.next_batch(0)) == 4, "and now nobody is"


def test_streams_share_a_common_beginning_only_if_it_pays() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1000, streams=2)
    request = Request(shared=100)
    scheduler.add(request, pieces(request, [110] * 40))
    assert [len(scheduler.next_batch(stream)) for stream in (0, 1)] == [30, 10], "at least 4 x 100 tokens in a batch"


def test_bulk_leaves_one_stream_to_those_who_come_beside_it() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=1600, streams=2)
    bulk = Request()
    scheduler.add(bulk, pieces(bulk, [100] * 100_000))
    assert [len(scheduler.next_batch(stream)) for stream in (0, 1)] == [16, 16], "alone, it fills all batches"
    query = Request()
    for stream in (1, 1, 0):
        scheduler.add(query, pieces(query, [12]))
        assert [item.request for item in scheduler.next_batch(stream)] == [query], (
            "at once, and nothing of the bulk beside it"
        )
        if stream == 1:
            assert scheduler.next_batch(1) == [], "then it waits for the next one"
            assert len(scheduler.next_batch(0)) == 16, "while the other goes on with long batches"
    assert len(scheduler.next_batch(1)) == 16, "whichever is not theirs"
    assert scheduler.next_batch(0) == []
    sizes = []
    for _ in range(60):
        sizes += [len(scheduler.next_batch(stream)) for stream in (1, 0)]
    assert sizes[:20] == [16, 0] * 10, "somebody else may come again"
    assert sizes[40:44] == [16, 2] * 2, "short ones in between, for a while"
    assert sizes[-4:] == [16] * 4, "nobody came"


def test_bulk_is_all_that_is_left_for_streams_when_it_ends() -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens=100, streams=2)
    bulk, query = Request(), Request()
    scheduler.add(bulk, pieces(bulk, [50] * 12))
    scheduler.add(query, pieces(query, [12]))
    ran = []
    for turn in range(20):
        ran += scheduler.next_batch(turn % 2)
    assert len(ran) == 13
    assert scheduler.depth == 0


def test_lower_priorities_run_first() -> None:
    scheduler: Scheduler[Piece] = Scheduler(100)
    requests = [Request(priority=p) for p in (5, -1, 0)]
    for request in requests:
        scheduler.add(request, pieces(request, [50, 50, 50]))
    order = [item.request.priority for batch in drain(scheduler) for item in batch]
    assert order == [-1, -1, -1, 0, 0, 0, 5, 5, 5]


def test_room_that_a_priority_leaves_is_the_next_one_s() -> None:
    scheduler: Scheduler[Piece] = Scheduler(100)
    urgent, patient = Request(priority=0), Request(priority=1)
    scheduler.add(patient, pieces(patient, [30] * 4))
    scheduler.add(urgent, pieces(urgent, [30]))
    assert [item.request for item in scheduler.next_batch()] == [urgent, patient, patient]


def test_a_patient_request_is_not_left_out_for_ever() -> None:
    scheduler: Scheduler[Piece] = Scheduler(100)
    patient = Request(priority=1)
    scheduler.add(patient, pieces(patient, [100, 100]))
    ran = []
    for _ in range(2 * MOST_PASSED + 3):
        urgent = Request(priority=0)
        scheduler.add(urgent, pieces(urgent, [100]))
        ran += [item.request is patient for item in scheduler.next_batch()]
    assert [i for i, is_patient in enumerate(ran) if is_patient] == [MOST_PASSED, 2 * MOST_PASSED + 1]


@given(workloads, st.integers(1, 300), st.integers(1, 20), st.data())
def test_priorities_lose_nothing_and_keep_the_budgets(
    lengths: list[list[int]], max_tokens: int, max_sequences: int, data: st.DataObject
) -> None:
    scheduler: Scheduler[Piece] = Scheduler(max_tokens, max_sequences)
    for one in lengths:
        request = Request(priority=data.draw(st.integers(-2, 2)))
        scheduler.add(request, pieces(request, one))
    batches = drain(scheduler)
    assert sorted(len(item) for batch in batches for item in batch) == sorted(n for one in lengths for n in one)
    assert scheduler.depth == scheduler.tokens == 0
    for batch in batches:
        assert len(batch) <= max_sequences
        assert sum(map(len, batch)) <= max_tokens or len(batch) == 1


def test_a_request_that_is_cancelled_twice_and_one_that_is_unknown_are_nothing() -> None:
    scheduler: Scheduler[Piece] = Scheduler(100)
    request, other = Request(), Request()
    scheduler.add(request, pieces(request, [5, 6]))
    for gone in (request, request, other):
        scheduler.cancel(gone)
    assert [item.length for item in scheduler.drop_cancelled()] == [5, 6]
    assert scheduler.depth == scheduler.tokens == 0
    assert scheduler.next_batch() == []


def test_all_that_waits_can_be_taken_at_once() -> None:
    scheduler: Scheduler[Piece] = Scheduler(10)
    small, bulk = Request(), Request()
    waiting = [*pieces(small, [3, 4]), *pieces(bulk, [5] * 40)]
    scheduler.add(small, waiting[:2])
    scheduler.add(bulk, waiting[2:])
    assert scheduler.drain() == waiting
    assert (scheduler.depth, scheduler.tokens, scheduler.next_batch()) == (0, 0, [])
