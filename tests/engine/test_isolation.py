"""A forward that raises: the sequences that raise alone fail, their neighbours are answered, the log stays short."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq

import pytest

from cenote import metrics
from cenote.core import Output, Sequence
from cenote.engine.engine import LocalEngine
from cenote.engine.failures import PAUSE, Failures, is_fatal
from cenote.errors import BadRequest, CenoteError, EngineFailed
from tests import PATIENCE
from tests.engine.test_engine import Done, Model, check, texts

POISON = 13
"""Length of a sequence that a forward does not survive."""


class MemoryOfTorch(RuntimeError):
    """As torch's allocator on a CPU raises it."""


def poisoned(raised: Callable[[], BaseException]) -> Callable[[Seq[Sequence]], None]:
    def before(sequences: Seq[Sequence]) -> None:
        if any(len(sequence) == POISON for sequence in sequences):
            raise raised()

    return before


def behind_a_held_batch(model: Model, requests: list[list[Sequence]], **options: int) -> list[object]:
    """Submit requests while a forward runs, so that they share batches; return their outputs or errors."""
    begun, go = threading.Event(), threading.Event()
    before = model.before

    def hold(sequences: Seq[Sequence]) -> None:
        if len(sequences[0]) == 1:
            begun.set()
            assert go.wait(PATIENCE)
        before(sequences)

    model.before = hold
    engine = LocalEngine(model, max_batch_tokens=4000, **options)  # type: ignore[arg-type]
    first = engine.submit(texts(1))
    assert begun.wait(PATIENCE)
    futures = [engine.submit(request) for request in requests]
    go.set()
    first.result(PATIENCE)
    results: list[object] = [future.exception(PATIENCE) or future.result() for future in futures]
    engine.close()
    return results


@pytest.mark.parametrize(
    "raised",
    [
        lambda: IndexError("index out of range in self"),
        lambda: RuntimeError("shapes cannot be multiplied"),
        lambda: MemoryError(),
        lambda: MemoryOfTorch("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        lambda: OSError(12, "Cannot allocate memory"),
        lambda: SystemExit("a library wants to end the process"),
    ],
    ids=lambda raised: type(raised()).__name__,
)
def test_a_text_that_makes_the_forward_raise_fails_alone(raised: Callable[[], BaseException]) -> None:
    model = Model(poisoned(raised))
    requests = [texts(POISON) if i in (20, 45) else texts(2 + i % 9) for i in range(64)]
    results = behind_a_held_batch(model, requests)
    for i, (request, result) in enumerate(zip(requests, results, strict=True)):
        if i in (20, 45):
            assert isinstance(result, EngineFailed)
            assert type(raised()).__name__ in result.message
            assert isinstance(result.__cause__, type(raised()))
        else:
            assert not isinstance(result, BaseException), f"neighbour {i} failed: {result}"
            assert len(result) == len(request)  # type: ignore[arg-type]


def test_the_client_does_not_see_the_text_of_an_exception() -> None:
    engine = LocalEngine(Model(poisoned(lambda: RuntimeError("/srv/secret/model.py: text of a neighbour"))))
    with pytest.raises(EngineFailed, match="the forward pass failed: RuntimeError") as failure:
        engine.submit(texts(POISON)).result(PATIENCE)
    assert "secret" not in failure.value.message
    assert "neighbour" not in failure.value.message
    engine.close()


@pytest.mark.parametrize(("poison", "most"), [(1, 2 * 6), (2, 2 * 2 * 6), (64, 2 * 64)])
def test_the_forwards_of_a_failed_batch_are_bounded(poison: int, most: int) -> None:
    forwards = 0

    def before(sequences: Seq[Sequence]) -> None:
        nonlocal forwards
        forwards += 1
        poisoned(lambda: IndexError())(sequences)

    requests = [texts(POISON if i < poison else 2 + i % 9) for i in range(64)]
    results = behind_a_held_batch(Model(before), requests)
    assert sum(isinstance(result, EngineFailed) for result in results) == poison
    assert forwards - 2 <= most, "the held batch and the whole one do not count"


def test_what_is_left_of_a_failed_request_is_not_run_again() -> None:
    forwards: list[int] = []

    def before(sequences: Seq[Sequence]) -> None:
        forwards.append(len(sequences))
        poisoned(lambda: IndexError())(sequences)

    engine = LocalEngine(Model(before), max_batch_tokens=4000)
    with pytest.raises(EngineFailed):
        engine.submit([*texts(POISON), *texts(*range(20, 83))]).result(PATIENCE)
    engine.close()
    assert forwards == [64, 32, 16, 8, 4, 2, 1], "the culprit is the first, and its neighbours belong to its request"


def test_an_error_of_the_device_fails_the_batch_at_once() -> None:
    forwards = 0

    def before(sequences: Seq[Sequence]) -> None:
        nonlocal forwards
        forwards += 1
        if len(sequences) > 1:
            raise RuntimeError("CUDA error: device-side assert triggered")

    results = behind_a_held_batch(Model(before), [texts(4), texts(5), texts(6)])
    assert all(isinstance(result, EngineFailed) for result in results)
    assert forwards == 2
    assert not is_fatal(type("OutOfMemoryError", (RuntimeError,), {})("CUDA error: out of memory"))


def test_an_error_of_the_device_in_a_part_fails_the_rest_of_the_batch() -> None:
    forwards: list[list[int]] = []

    def before(sequences: Seq[Sequence]) -> None:
        forwards.append(list(map(len, sequences)))
        if len(sequences) == 4:
            raise IndexError("index out of range in self")
        if len(sequences) == 2:
            raise RuntimeError("CUDA error: device-side assert triggered")

    results = behind_a_held_batch(Model(before), [texts(4), texts(5), texts(6), texts(7)])
    assert all(isinstance(result, EngineFailed) for result in results)
    assert [len(lengths) for lengths in forwards] == [1, 4, 2]


def test_an_error_of_cenote_is_the_answer_itself() -> None:
    results = behind_a_held_batch(Model(poisoned(lambda: BadRequest("no end token"))), [texts(3), texts(POISON)])
    assert not isinstance(results[0], BaseException)
    assert isinstance(results[1], BadRequest)


def test_a_wrong_number_of_outputs_fails_the_batch_and_not_the_engine() -> None:
    class Short(Model):
        def launch(self, sequences: Seq[Sequence]) -> Done:
            outputs: list[Output | CenoteError] = super().launch(sequences).outputs
            return Done(outputs[:-1] if len(sequences[0]) == POISON else outputs)

    engine = LocalEngine(Short())
    with pytest.raises(EngineFailed, match="ValueError"):
        engine.submit(texts(POISON)).result(PATIENCE)
    check(engine.submit(texts(4)), texts(4))
    assert engine.healthy()
    engine.close()


def test_health_does_not_suffer_from_a_text_that_fails_beside_others() -> None:
    seen: list[int] = []
    model = Model(lambda sequences: seen.extend(map(len, sequences)))
    before = poisoned(lambda: IndexError())
    model.before = lambda sequences: (seen.extend(map(len, sequences)), before(sequences))[1]
    engine = LocalEngine(model, max_batch_tokens=4000)
    with pytest.raises(EngineFailed):
        engine.submit(texts(5, POISON)).result(PATIENCE)
    count = len(seen)
    assert engine.healthy()
    assert len(seen) == count, "a part of the batch has succeeded, so no forward of health's own is needed"
    engine.close()


def test_forwards_over_parts_are_counted() -> None:
    before = metrics.REGISTRY.get_sample_value("cenote_forwards_again_total")
    assert before is not None
    behind_a_held_batch(Model(poisoned(lambda: IndexError())), [texts(3), texts(POISON)])
    assert metrics.REGISTRY.get_sample_value("cenote_forwards_again_total") == before + 2


def raise_in_a_line_of_its_own() -> IndexError:
    try:
        [].pop()
    except IndexError as error:
        return error
    raise AssertionError


def test_the_log_tells_of_a_kind_once_and_then_counts(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    failures = Failures(lambda: now)
    with caplog.at_level(logging.ERROR):
        for _ in range(500):
            failures.note(raise_in_a_line_of_its_own(), 1)
        assert len(caplog.records) == 1
        assert caplog.records[0].exc_info is not None
        now = PAUSE + 1
        failures.note(raise_in_a_line_of_its_own(), 1)
        failures.note(ValueError("another kind"), 1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[1].startswith("sequences failed: 500 more (IndexError at test_isolation.py:")
    assert caplog.records[1].exc_info is None
    assert "ValueError" in lines[2]


def test_values_that_are_not_finite_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class NotFinite(Model):
        def launch(self, sequences: Seq[Sequence]) -> Done:
            done = super().launch(sequences)
            return done if len(sequences[0]) == 1 else Done([EngineFailed("NaN") for _ in sequences])

    with caplog.at_level(logging.ERROR):
        results = behind_a_held_batch(NotFinite(), [texts(2) for _ in range(20)])
    assert [type(result) for result in results] == [EngineFailed] * 20
    assert [record.getMessage() for record in caplog.records] == [
        "sequences failed: 1 (EngineFailed); further ones are counted"
    ]


def test_a_failure_keeps_no_tensors_of_its_frames() -> None:
    failure = raise_in_a_line_of_its_own()
    Failures().note(failure, 1)
    assert failure.__traceback__ is None
