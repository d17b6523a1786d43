"""The cache: every request is answered once and rightly, whoever computes it, gives up or fails beside it."""

from __future__ import annotations

import gc
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cenote import LLM, metrics
from cenote.config import EngineConfig, ModelConfig
from cenote.core import Output, PoolingParams, Sequence
from cenote.engine.cache import CachedEngine, copied, key_of, size_of
from cenote.engine.engine import LocalEngine
from cenote.engine.fake import FAKE_INFO, FakeEngine, fake_vector
from cenote.errors import Closed, EngineFailed, Overloaded
from cenote.pipeline.pipeline import Service
from tests import PATIENCE, checkpoints
from tests.checkpoints import SHORT
from tests.conftest import Serve
from tests.engine.test_engine import Held, Model

ROOM = 1 << 20


@dataclass
class Submission:
    """What reached the wrapped engine at once, to be answered by hand."""

    sequences: list[Sequence]
    progress: Callable[[int], None] | None
    future: Future[list[Output]] = field(default_factory=Future)

    @property
    def numbers(self) -> list[int]:
        return [next(iter(sequence.ids)) for sequence in self.sequences]

    def answer(self, *steps: int) -> None:
        for step in steps:
            assert self.progress is not None
            self.progress(step)
        self.future.set_result([Output(fake_vector(s, 8)) for s in self.sequences])

    def fail(self, message: str = "broken") -> None:
        self.future.set_exception(EngineFailed(message))


@dataclass
class Manual:
    """An engine that does as it is told; `before` runs inside `submit` and may raise."""

    info = FAKE_INFO
    submissions: list[Submission] = field(default_factory=list)
    before: Callable[[], None] = lambda: None

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        self.before()
        self.submissions.append(Submission(list(sequences), progress))
        return self.submissions[-1].future

    def healthy(self) -> bool:
        return True

    def close(self) -> None: ...

    @property
    def numbers(self) -> list[list[int]]:
        return [submission.numbers for submission in self.submissions]


def texts(*numbers: int) -> list[Sequence]:
    return [Sequence([number, number + 1]) for number in numbers]


def check(future: Future[list[Output]], sequences: Seq[Sequence]) -> None:
    for output, sequence in zip(future.result(PATIENCE), sequences, strict=True):
        assert np.array_equal(output.data, fake_vector(sequence, 8))


def kept() -> float:
    value = metrics.REGISTRY.get_sample_value("cenote_cache_bytes")
    assert value is not None
    return value


def counts() -> np.ndarray:
    """Hits, misses, joined."""
    names = [f"cenote_cache_{name}_total" for name in ("hits", "misses", "joined")]
    return np.array([metrics.REGISTRY.get_sample_value(name) for name in names])


@pytest.fixture
def manual() -> Manual:
    return Manual()


@pytest.fixture
def engine(manual: Manual) -> Iterator[CachedEngine]:
    made = CachedEngine(manual, ROOM)
    yield made
    made.close()


# --- hits, misses, order -------------------------------------------------------------------------------------------


def test_what_is_known_is_not_computed_again() -> None:
    fake = FakeEngine()
    engine = CachedEngine(fake, ROOM)
    check(engine.submit(texts(1, 2)), texts(1, 2))
    check(engine.submit(texts(5, 2, 4, 1, 3)), texts(5, 2, 4, 1, 3))
    assert [sequence.ids[0] for sequence in fake.submitted] == [1, 2, 5, 4, 3]
    check(engine.submit(texts(3, 1)), texts(3, 1))
    assert len(fake.submitted) == 5
    engine.close()


def test_an_empty_request_is_answered(engine: CachedEngine, manual: Manual) -> None:
    assert engine.submit([]).result(0) == []
    assert manual.submissions == []


def test_duplicates_in_a_request_are_computed_once(engine: CachedEngine, manual: Manual) -> None:
    before = counts()
    future = engine.submit(texts(7, 8, 7, 7, 8))
    assert manual.numbers == [[7, 8]]
    manual.submissions[0].answer()
    check(future, texts(7, 8, 7, 7, 8))
    first, *others = future.result(0)
    first.data[:] = 0
    assert all(output.data.any() for output in others), "each has an array of its own"
    assert (counts() - before).tolist() == [0, 2, 3]


def test_requests_in_flight_share_their_common_parts(engine: CachedEngine, manual: Manual) -> None:
    before = counts()
    first, second, third = (engine.submit(texts(*n)) for n in ((1, 2, 3), (3, 4, 1, 4), (4, 2)))
    assert manual.numbers == [[1, 2, 3], [4]]
    manual.submissions[0].answer()
    check(first, texts(1, 2, 3))
    assert not second.done()
    assert not third.done()
    manual.submissions[1].answer()
    check(second, texts(3, 4, 1, 4))
    check(third, texts(4, 2))
    assert (counts() - before).tolist() == [0, 4, 5]
    check(engine.submit(texts(1, 4)), texts(1, 4))
    assert (counts() - before).tolist() == [2, 4, 5]


def test_parts_may_arrive_in_any_order(engine: CachedEngine, manual: Manual) -> None:
    engine.submit(texts(1))
    future = engine.submit(texts(2, 1))
    manual.submissions[1].answer()
    assert not future.done()
    manual.submissions[0].answer()
    check(future, texts(2, 1))


def test_an_engine_may_answer_others_while_it_accepts() -> None:
    fake = FakeEngine(held=True)
    engine = CachedEngine(fake, ROOM)
    waiting, joined = engine.submit(texts(1, 2)), engine.submit(texts(2))
    fake.held = False  # the next submission releases all
    check(engine.submit(texts(3, 1)), texts(3, 1))
    check(waiting, texts(1, 2))
    check(joined, texts(2))
    assert len(fake.submitted) == 3
    engine.close()


# --- whose arrays --------------------------------------------------------------------------------------------------


def test_answers_may_be_written_to(engine: CachedEngine, manual: Manual) -> None:
    first, joined = engine.submit(texts(1)), engine.submit(texts(1))
    manual.submissions[0].answer()
    hit = engine.submit(texts(1))
    for future in (first, joined, hit):
        check(future, texts(1))
        future.result(0)[0].data[:] = 0
    check(engine.submit(texts(1)), texts(1))


def test_what_is_kept_holds_no_batch_and_cannot_be_written_to(engine: CachedEngine, manual: Manual) -> None:
    future = engine.submit(texts(1))
    batch = np.ones((1000, 8), np.float32)
    manual.submissions[0].future.set_result([Output(batch[3])])
    assert future.result(0)[0].data.base is batch
    output = engine._store.get(key_of(texts(1)[0]))
    assert output is not None
    assert output.data.base is None
    assert not output.data.flags.writeable
    assert kept() < batch.nbytes / 10


def test_answers_are_freed_without_the_garbage_collector(engine: CachedEngine, manual: Manual) -> None:
    gc.disable()
    try:
        futures = [engine.submit(texts(1, 2)), engine.submit(texts(2, 3))]
        for submission in manual.submissions:
            submission.answer()
        futures.append(engine.submit(texts(1)))
        manual.submissions.clear()
        arrays = [weakref.ref(output.data) for future in futures for output in future.result(0)]
        assert len(arrays) == 5
        del futures, submission
        assert [ref() for ref in arrays] == [None] * 5
    finally:
        gc.enable()


@dataclass
class Wide:
    """An output as it may become."""

    data: np.ndarray
    indices: np.ndarray | None = None
    others: dict[str, Any] = field(default_factory=dict)


def test_outputs_of_more_arrays() -> None:
    rows = np.arange(40, dtype=np.float32).reshape(4, 10)
    wide = Wide(rows[1], np.arange(10), {"tokens": rows[2:], "parts": [rows[0]], "name": "x"})
    same = copied(wide, writable=False)
    arrays = [same.data, same.indices, same.others["tokens"], same.others["parts"][0]]
    assert [a.tolist() for a in arrays] == [rows[1].tolist(), list(range(10)), rows[2:].tolist(), rows[0].tolist()]
    assert all(a.base is None and not a.flags.writeable for a in arrays)
    assert same.others["name"] == "x"
    assert rows.flags.writeable
    assert copied(same, writable=True).others["tokens"].flags.writeable
    assert sum(a.nbytes for a in arrays) == 240
    assert size_of(replace(wide, indices=np.arange(1010))) - size_of(wide) == 8000
    assert 4000 < size_of(replace(wide, others={**wide.others, "more": np.arange(500)})) - size_of(wide) < 4400


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f.name for f in fields(Sequence) if f.compare])
def test_every_field_of_a_sequence_is_part_of_the_key(name: str) -> None:
    one, same, other = texts(1, 1, 1)
    setattr(other, name, "another value")
    assert key_of(one) == key_of(same)
    assert key_of(one) != key_of(other)


@dataclass(slots=True, eq=False)
class Newer(Sequence):
    image: Seq[float] | None = None


def test_a_new_field_of_sequence_is_part_of_the_key() -> None:
    keys = {key_of(Newer([1], image=image)) for image in (None, [], [0.5], [0.5, 1.5], (0.5, 2.5))}
    assert len(keys) == 5
    assert key_of(Newer([1], image=[0.5])) == key_of(Newer([1], image=np.array([0.5])))
    assert key_of(Newer([1])) != key_of(Sequence([1]))


def test_ids_are_equal_whatever_holds_them() -> None:
    ids = [5, 70_000, 0]
    held = (ids, tuple(ids), np.array(ids), np.array(ids, np.int32), np.array(ids, np.uint32))
    assert len({key_of(Sequence(one)) for one in held}) == 1
    assert len({key_of(Sequence([5, large])) for large in (0, 1, 2**32, 2**32 + 1, -1)}) == 5
    assert key_of(Sequence([1, 2])) != key_of(Sequence([1], type_ids=[2]))
    assert size_of(key_of(Sequence(range(1000)))) < 5000, "four bytes an id"


def test_parameters_and_task_are_part_of_the_key() -> None:
    fake = FakeEngine()
    engine = CachedEngine(fake, ROOM)
    asked = [
        Sequence([1, 2]),
        Sequence([1, 2], params=PoolingParams(use_activation=False)),
        Sequence([1, 2], params=PoolingParams(use_activation=True)),
        Sequence([1, 2], params=PoolingParams(dimensions=3)),
        Sequence([1, 2], task="token_embed"),
        Sequence([1, 2], type_ids=[0, 1]),
        Sequence([1, 2], skip=1),
    ]
    first = engine.submit(asked).result(PATIENCE)
    assert len(fake.submitted) == len(asked)
    second = engine.submit([replace(sequence) for sequence in asked]).result(PATIENCE)
    assert len(fake.submitted) == len(asked)
    assert [o.data.tolist() for o in first] == [o.data.tolist() for o in second]
    assert first[3].data.shape == (3,)
    assert first[4].data.shape == (2, 8)
    extra = PoolingParams(dimensions=3, extra_kwargs={"instruction": ["unhashable"]})
    assert engine.submit([Sequence([1, 2], params=extra)]).result(0)[0].data.tolist() == first[3].data.tolist()
    assert len(fake.submitted) == len(asked), "what only scoring reads makes no difference"
    engine.close()


# --- callers that give up ------------------------------------------------------------------------------------------


def test_the_first_caller_gives_up_and_the_others_are_answered(engine: CachedEngine, manual: Manual) -> None:
    first, second = engine.submit(texts(1, 2)), engine.submit(texts(2))
    assert first.cancel()
    third = engine.submit(texts(1))
    (submission,) = manual.submissions
    assert not submission.future.cancelled()
    submission.answer()
    check(second, texts(2))
    check(third, texts(1))
    with pytest.raises(CancelledError):
        first.result(0)


def test_work_that_nobody_waits_for_is_cancelled(engine: CachedEngine, manual: Manual) -> None:
    first, second = engine.submit(texts(1, 2)), engine.submit(texts(2, 3))
    assert second.cancel()
    assert [s.future.cancelled() for s in manual.submissions] == [False, True]
    assert first.cancel()
    assert [s.future.cancelled() for s in manual.submissions] == [True, True]
    again = engine.submit(texts(1, 2, 3))
    assert manual.numbers == [[1, 2], [3], [1, 2, 3]], "nothing is left that could be joined"
    manual.submissions[2].answer()
    check(again, texts(1, 2, 3))


def test_cancelled_work_of_the_local_engine_never_runs() -> None:
    held = Held()
    local = LocalEngine(held.model, max_batch_tokens=2)
    engine = CachedEngine(local, ROOM)
    first = engine.submit(texts(1))
    assert held.begun.wait(PATIENCE)
    dropped, shared, kept_on = engine.submit(texts(2, 3)), engine.submit(texts(4)), engine.submit(texts(4))
    assert dropped.cancel()
    assert shared.cancel()
    held.go.set()
    check(first, texts(1))
    check(kept_on, texts(4))
    assert held.model.batches == [[2], [2]]
    engine.close()


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_failure_fails_those_who_depend_on_it_and_is_not_kept(engine: CachedEngine, manual: Manual) -> None:
    before = kept()
    bad, joined, good = engine.submit(texts(1)), engine.submit(texts(1, 2)), engine.submit(texts(3))
    manual.submissions[0].fail()
    for future in (bad, joined):
        with pytest.raises(EngineFailed, match="broken"):
            future.result(0)
    assert manual.submissions[1].future.cancelled(), "the rest of a failed request need not run"
    assert not good.done()
    manual.submissions[2].answer()
    check(good, texts(3))
    assert kept() - before == size_of(key_of(texts(3)[0])) + size_of(good.result(0)[0])
    again = engine.submit(texts(1))
    assert manual.numbers[3:] == [[1]]
    manual.submissions[3].answer()
    check(again, texts(1))


def test_a_request_is_not_failed_by_what_it_did_not_ask_for(engine: CachedEngine, manual: Manual) -> None:
    """One of two sequences failed, nobody knows which: who wanted only one tries it alone, once."""
    owner, one, two = engine.submit(texts(1, 2)), engine.submit(texts(2, 2)), engine.submit(texts(2, 1))
    manual.submissions[0].fail("1 is bad")
    with pytest.raises(EngineFailed, match="1 is bad"):
        owner.result(0)
    assert [sorted(numbers) for numbers in manual.numbers] == [[1, 2], [2], [1, 2]]
    assert not one.done()
    manual.submissions[1].answer()
    check(one, texts(2, 2))
    manual.submissions[2].fail("still bad")
    with pytest.raises(EngineFailed, match="still bad"):
        two.result(0)
    assert len(manual.submissions) == 3
    check(engine.submit(texts(2)), texts(2))


def test_a_second_try_is_its_requests_alone(engine: CachedEngine, manual: Manual) -> None:
    engine.submit(texts(1, 2))
    first = engine.submit(texts(2))
    manual.submissions[0].fail()
    second = engine.submit(texts(2))
    manual.submissions[1].answer()
    check(first, texts(2))
    engine._store = type(engine._store)(ROOM)  # as if it were evicted
    third = engine.submit(texts(2))
    assert manual.numbers == [[1, 2], [2], [2]], "the third joins the second"
    manual.submissions[2].answer()
    check(second, texts(2))
    check(third, texts(2))


def test_work_is_cancelled_if_its_request_fails_while_it_starts(engine: CachedEngine, manual: Manual) -> None:
    engine.submit(texts(1))

    def fail() -> None:
        manual.submissions[0].fail()

    manual.before = fail
    future = engine.submit(texts(1, 2))
    with pytest.raises(EngineFailed, match="broken"):
        future.result(0)
    assert manual.submissions[1].future.cancelled()


def test_what_is_computed_twice_is_counted_once(engine: CachedEngine, manual: Manual) -> None:
    engine.submit(texts(1, 2))
    engine.submit(texts(2))
    manual.submissions[0].fail()
    engine.submit(texts(2))
    for submission in manual.submissions[1:]:
        submission.answer()
    assert manual.numbers == [[1, 2], [2], [2]]
    assert engine._store.bytes == size_of(key_of(texts(2)[0])) + size_of(Output(np.zeros(8, np.float32)))


def test_a_second_try_can_be_given_up(engine: CachedEngine, manual: Manual) -> None:
    engine.submit(texts(1, 2))
    joined, gone = engine.submit(texts(2)), engine.submit(texts(1))
    assert gone.cancel()
    manual.submissions[0].fail()
    assert manual.numbers == [[1, 2], [2]]
    assert joined.cancel()
    assert manual.submissions[1].future.cancelled()


def test_there_is_no_second_try_for_who_gave_up(engine: CachedEngine, manual: Manual) -> None:
    owner, joined = engine.submit(texts(1, 2)), engine.submit(texts(2))
    owner.add_done_callback(lambda _: joined.cancel())
    manual.submissions[0].fail()
    assert joined.cancelled()
    assert manual.numbers == [[1, 2]]


def test_a_second_try_may_be_refused(engine: CachedEngine, manual: Manual) -> None:
    engine.submit(texts(1, 2))
    joined = engine.submit(texts(2))

    def full() -> None:
        raise Overloaded("full", retry_after=3)

    manual.before = full
    manual.submissions[0].fail()
    with pytest.raises(Overloaded, match="full"):
        joined.result(0)


def test_a_wrong_number_of_outputs_is_an_error(engine: CachedEngine, manual: Manual) -> None:
    future = engine.submit(texts(1, 2))
    manual.submissions[0].future.set_result([Output(np.zeros(8, np.float32))])
    with pytest.raises(ValueError, match="zip"):
        future.result(0)
    assert engine._store.bytes == 0


def test_failures_of_the_local_engine() -> None:
    trouble = threading.Event()

    def before(sequences: Seq[Sequence]) -> None:
        if trouble.is_set() and any(s.ids[0] == 13 for s in sequences):
            raise ValueError("13 is unlucky")

    engine = CachedEngine(LocalEngine(Model(before), max_batch_tokens=2), ROOM)
    trouble.set()
    bad, good = engine.submit(texts(12, 13)), engine.submit(texts(14))
    with pytest.raises(EngineFailed, match="ValueError"):
        bad.result(PATIENCE)
    check(good, texts(14))
    trouble.clear()
    check(engine.submit(texts(13, 14)), texts(13, 14))
    assert engine.healthy()
    engine.close()


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_refused_request_leaves_no_trace(engine: CachedEngine, manual: Manual) -> None:
    joined = engine.submit(texts(1))

    def full() -> None:
        raise Overloaded("full", retry_after=3)

    before = counts()
    manual.before = full
    told: list[int] = []
    with pytest.raises(Overloaded, match="full") as refusal:
        engine.submit(texts(1, 2), progress=told.append)
    assert refusal.value.retry_after == 3
    assert (told, (counts() - before).tolist()) == ([], [0, 0, 0])
    assert joined.cancel()
    assert manual.submissions[0].future.cancelled(), "the refused request does not wait for it"
    manual.before = Manual.before
    again = engine.submit(texts(2))
    assert manual.numbers == [[1], [2]]
    manual.submissions[1].answer()
    check(again, texts(2))


def test_who_joined_a_request_that_is_refused_goes_alone(engine: CachedEngine, manual: Manual) -> None:
    """Another thread joins between the look-up and the wrapped engine's refusal."""
    joined: list[Future[list[Output]]] = []

    def full() -> None:
        manual.before = Manual.before
        joined.append(engine.submit(texts(2)))
        raise Overloaded("full")

    manual.before = full
    with pytest.raises(Overloaded):
        engine.submit(texts(1, 2, 3))
    assert manual.numbers == [[2]]
    manual.submissions[0].answer()
    check(joined[0], texts(2))


def test_a_full_queue_of_the_local_engine_does_not_hinder_hits() -> None:
    held = Held()
    held.go.set()
    engine = CachedEngine(LocalEngine(held.model, max_batch_tokens=2, max_queued=1), ROOM)
    engine.submit(texts(1)).result(PATIENCE)
    held.go.clear()
    held.begun.clear()
    futures = [engine.submit(texts(2))]
    assert held.begun.wait(PATIENCE)
    futures.append(engine.submit(texts(3)))
    with pytest.raises(Overloaded):
        engine.submit(texts(1, 4))
    check(engine.submit(texts(1)), texts(1))
    futures.append(engine.submit(texts(3, 2)))
    held.go.set()
    for future, numbers in zip(futures, ((2,), (3,), (3, 2)), strict=True):
        check(future, texts(*numbers))
    engine.close()


def test_a_closed_engine_answers_nothing_new() -> None:
    fake = FakeEngine(held=True)
    engine = CachedEngine(fake, ROOM)
    accepted = engine.submit(texts(1))
    engine.close()
    engine.close()
    check(accepted, texts(1))
    for request in (texts(1), texts(2), []):
        with pytest.raises(Closed, match="shutting down"):
            engine.submit(request)


def test_health_is_the_engines() -> None:
    fake = FakeEngine()
    engine = CachedEngine(fake, ROOM)
    assert engine.info is fake.info
    assert engine.healthy()
    fake.is_healthy = False
    assert not engine.healthy()
    engine.close()


# --- memory --------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first() -> None:
    fake = FakeEngine()
    entry = size_of(key_of(texts(1)[0])) + size_of(Output(np.zeros(8, np.float32)))
    engine = CachedEngine(fake, 3 * entry + entry // 2)
    before = kept()

    def computed(*numbers: int) -> list[int]:
        fake.submitted.clear()
        check(engine.submit(texts(*numbers)), texts(*numbers))
        return [sequence.ids[0] for sequence in fake.submitted]

    assert computed(1, 2, 3) == [1, 2, 3]
    assert kept() - before == 3 * entry
    assert computed(1) == []  # now 2 is the oldest
    assert computed(4) == [4]
    assert kept() - before == 3 * entry
    assert computed(3, 1, 4) == []
    assert computed(2) == [2]  # 3 goes
    assert computed(1, 4, 2) == []
    assert computed(3) == [3]
    assert kept() - before == 3 * entry
    engine.close()
    assert kept() == before, "a closed engine is not counted"


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    fake = FakeEngine()
    engine = CachedEngine(fake, 3000)
    large = Sequence(list(range(100)), task="token_embed")
    engine.submit(texts(1)).result(0)
    small = engine._store.bytes
    assert engine.submit([large, large]).result(0)[1].data.shape == (100, 8)
    assert engine._store.bytes == small > 0
    engine.submit([large, *texts(1)]).result(0)
    assert [len(s) for s in fake.submitted] == [2, 100, 100]
    engine.close()


# --- progress ------------------------------------------------------------------------------------------------------


def test_progress_reaches_the_total_of_every_request(engine: CachedEngine, manual: Manual) -> None:
    engine.submit(texts(1))
    manual.submissions[0].answer()
    first: list[int] = []
    second: list[int] = []
    hits: list[int] = []
    futures = [engine.submit(texts(1, 2, 3, 4, 3), progress=first.append)]
    assert first == [1], "what is known is told at once"
    futures.append(engine.submit(texts(4, 1, 5), progress=second.append))
    manual.submissions[1].progress(2)  # type: ignore[misc]
    assert first == [1, 2], "what the engine tells is passed on"
    manual.submissions[1].answer(1)
    assert first == [1, 2, 1, 1]
    assert futures[0].done()
    assert second == [1, 1]
    manual.submissions[2].answer()  # tells nothing by itself
    assert sum(second) == 3
    engine.submit(texts(5, 4), progress=hits.append).result(0)
    assert hits == [2]
    engine.submit(texts(6), progress=hits.append)
    manual.submissions[3].answer(1)
    assert hits == [2, 1], "what the engine told is not told again"


def test_progress_stops_for_who_gave_up(engine: CachedEngine, manual: Manual) -> None:
    told: list[int] = []
    first, second = engine.submit(texts(1, 2), progress=told.append), engine.submit(texts(2))
    first.cancel()
    manual.submissions[0].answer(1, 1)
    check(second, texts(2))
    assert told == []


def test_a_broken_progress_bar_stops_nothing(
    engine: CachedEngine, manual: Manual, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: int) -> None:
        raise RuntimeError("no terminal")

    future = engine.submit(texts(1), progress=broken)
    manual.submissions[0].answer()
    check(future, texts(1))
    check(engine.submit(texts(1), progress=broken), texts(1))
    assert caplog.text.count("the progress callback failed") == 2


def test_a_progress_callback_may_not_wait_for_what_is_under_way() -> None:
    """It would join the flight that its own thread is to finish, and the wrapped engine would never hear of it."""
    engine = CachedEngine(LocalEngine(Model(), max_batch_tokens=2), ROOM)
    refused: list[str] = []

    def progress(_: int) -> None:
        try:
            engine.submit(texts(2))
        except EngineFailed as error:
            refused.append(str(error))

    check(engine.submit(texts(1, 2), progress=progress), texts(1, 2))
    assert ["progress callback" in message for message in refused] == [True, True]
    engine.close()


# --- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [ROOM, 4000], ids=["all fits", "evicts"])
def test_many_threads_with_overlapping_requests(room: int) -> None:
    model = Model()
    engine = CachedEngine(LocalEngine(model, max_batch_tokens=16, max_queued=100_000), room)
    kinds = 60
    answered: list[tuple[list[int], Future[list[Output]], list[int]]] = []
    cancelled: list[Future[list[Output]]] = []

    def caller(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            numbers = [draw.randrange(kinds) for _ in range(draw.randrange(1, 12))]
            told: list[int] = []
            future = engine.submit(texts(*numbers), progress=told.append)
            if draw.random() < 0.3 and future.cancel():
                cancelled.append(future)
            else:
                answered.append((numbers, future, told))
                if draw.random() < 0.5:
                    future.result(PATIENCE)

    before = counts()
    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wait([future for _, future, _ in answered], 60).not_done
    for numbers, future, told in answered:
        check(future, texts(*numbers))
        assert sum(told) == len(numbers)
    assert all(future.cancelled() for future in cancelled)
    assert len(answered) + len(cancelled) == 8 * 60
    assert len(answered) > 100
    engine.close()
    assert engine._running == {}
    assert engine._store.bytes <= room
    hits, misses, joined = counts() - before
    assert hits + misses + joined >= sum(len(numbers) for numbers, _, _ in answered)
    if room == ROOM:
        assert kinds <= misses
        assert hits > misses
        assert engine._store.bytes == sum(size for _, size in engine._store._entries.values())


def test_threads_with_failures_are_all_answered() -> None:
    draw = random.Random(0)

    def before(_: Seq[Sequence]) -> None:
        if draw.random() < 0.3:
            raise ValueError("now and then")

    engine = CachedEngine(LocalEngine(Model(before), max_batch_tokens=8, max_queued=100_000), 4000)
    outcomes: list[str] = []

    def caller(seed: int) -> None:
        mine = random.Random(seed)
        for _ in range(50):
            numbers = [mine.randrange(40) for _ in range(mine.randrange(1, 6))]
            try:
                check(engine.submit(texts(*numbers)), texts(*numbers))
                outcomes.append("done")
            except EngineFailed:
                outcomes.append("failed")

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 8 * 50
    assert {"done", "failed"} == set(outcomes)
    assert engine._running == {}
    engine.close()


# --- over a model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize(("size", "kind"), [(0, LocalEngine), (1, CachedEngine)])
def test_the_option_switches_it_on(folder: Path, size: int, kind: type) -> None:
    assert EngineConfig().cache_size == 0
    service = Service.open(ModelConfig(model=str(folder)), EngineConfig(cache_size=size))
    assert type(service.engine) is kind
    if isinstance(service.engine, CachedEngine):
        assert service.engine._store.capacity == size << 20
    service.engine.close()


def test_a_cached_llm_gives_the_same(folder: Path) -> None:
    before = counts()
    with LLM(model=str(folder)) as plain, LLM(model=str(folder), cache_size=1) as cached, warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in ("embed", "token_embed"):
            expected = plain.encode(SHORT, pooling_task=task, use_tqdm=False)
            for _ in range(3):
                outputs = cached.encode([*SHORT, SHORT[0]], pooling_task=task, use_tqdm=False)
                for output, right in zip(outputs, [*expected, expected[0]], strict=True):
                    np.testing.assert_allclose(output.outputs.data.numpy(), right.outputs.data.numpy(), atol=1e-6)
                    assert output.prompt_token_ids == right.prompt_token_ids
                    output.outputs.data.zero_()
    unique = len(set(SHORT))
    assert (counts() - before).tolist() == [4 * (unique + 1), 2 * unique, 2]


def test_a_forgotten_llm_stops_its_thread(folder: Path) -> None:
    made = LLM(model=str(folder), cache_size=1)
    made.embed(["a", "a"], use_tqdm=False)
    engine = made._service.engine
    assert isinstance(engine, CachedEngine)
    assert isinstance(engine._engine, LocalEngine)
    thread, gone = engine._engine._threads[0], weakref.ref(made)
    assert thread.is_alive()
    del made
    gc.collect()
    thread.join(PATIENCE)
    assert gone() is None
    assert not thread.is_alive()
    with pytest.raises(Closed):
        engine.submit(texts(1))


def test_a_server_sends_hits_in_every_encoding(serve: Serve) -> None:
    fake = FakeEngine(replace(FAKE_INFO, vocab_size=30_522))
    client = serve(CachedEngine(fake, ROOM))
    plain = serve(FakeEngine(fake.info))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for embed_dtype in ("float32", "bfloat16", "fp8_e4m3"):
            for task in ("embed", "token_embed"):
                body = {
                    "input": ["water", "stone"],
                    "task": task,
                    "encoding_format": "base64",
                    "embed_dtype": embed_dtype,
                }
                answers = [c.post("/pooling", json=body).json()["data"] for c in (client, client, plain)]
                assert answers[0] == answers[1] == answers[2]
    assert len(fake.submitted) == 4
    text = client.get("/metrics").text
    assert "cenote_cache_hits_total" in text
    assert "cenote_cache_bytes" in text
