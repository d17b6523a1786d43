"""A device that hangs: its requests are answered, the engine says why it can run nothing more, and can be closed."""

from __future__ import annotations

import threading
from operator import itemgetter
from typing import Any

import pytest

from cenote.engine import engine as engines
from cenote.engine.blocks import ChunkedEngine
from cenote.engine.cache import CachedEngine
from cenote.engine.engine import LocalEngine
from cenote.engine.watchdog import Watchdog
from cenote.errors import EngineGone
from tests import PATIENCE
from tests.engine.test_engine import Model, Streamed, check, texts


def test_a_batch_is_late_after_the_timeout_and_not_before() -> None:
    now = 0.0
    watchdog = Watchdog(0, lambda _: None, clock=lambda: now)
    watchdog._timeout = 10
    first = watchdog.begin("first")
    now = 6.0
    watchdog.begin("second")
    assert watchdog.late() == []
    now = 10.5
    assert watchdog.late() == ["first"]
    watchdog.end(first)
    assert watchdog.late() == []


def test_the_late_batches_are_told_once() -> None:
    told: list[Any] = []
    done = threading.Event()

    def hung(late: list[Any]) -> None:
        told.append(late)
        done.set()

    watchdog = Watchdog(0.05, hung)
    watchdog.begin("stuck")
    assert done.wait(PATIENCE)
    watchdog.stop()
    assert told == [["stuck"]]


@pytest.mark.parametrize("wrap", [lambda engine: engine, ChunkedEngine, lambda engine: CachedEngine(engine, 1 << 20)])
def test_a_hung_forward_ends_the_engine_and_answers_all(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LAST_FORWARDS", 0.1)
    never = threading.Event()
    model = Model(lambda sequences: (len(sequences[0]) == 66 and never.wait(PATIENCE), None)[1])
    engine = wrap(LocalEngine(model, max_batch_tokens=66, streams=1, forward_timeout=0.3))
    assert engine.healthy()
    assert engine.fault == ""
    stuck, waiting = engine.submit(texts(66)), engine.submit(texts(5))
    for future in (stuck, waiting):
        with pytest.raises(EngineGone, match="has not come back within 0.3 seconds"):
            future.result(PATIENCE)
    with pytest.raises(EngineGone, match="the device hangs") as refusal:
        engine.submit(texts(3)).result(PATIENCE)
    assert refusal.value.retry_after >= 1
    assert "the device hangs" in engine.fault
    assert not engine.healthy()
    closer = threading.Thread(target=engine.close, daemon=True)
    closer.start()
    closer.join(PATIENCE)
    assert not closer.is_alive(), "a thread that hangs is not waited for"
    never.set()


def test_closing_ends_if_the_hang_is_noticed_after_it_began() -> None:
    begun, never = threading.Event(), threading.Event()
    model = Model(lambda _: (begun.set(), never.wait(2 * PATIENCE), None)[2])
    engine = LocalEngine(model, streams=1)
    stuck = engine.submit(texts(5))
    assert begun.wait(PATIENCE)
    closer = threading.Thread(target=engine.close, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "LAST_FORWARDS", 0.1)
        closer.start()
        closer.join(0.3)
        assert closer.is_alive(), "without a fault a forward may take its time"
        engine._hang([*map(itemgetter(1), engine._watchdog._under_way.values())])
        closer.join(PATIENCE)
        assert not closer.is_alive()
    with pytest.raises(EngineGone, match="the device hangs"):
        stuck.result(0)
    never.set()


def test_another_stream_ends_its_forward() -> None:
    begun, go, never = threading.Event(), threading.Event(), threading.Event()

    def before(sequences: Any) -> None:
        if len(sequences[0]) == 66:
            never.wait(PATIENCE)
        elif len(sequences[0]) == 65:
            begun.set()
            assert go.wait(PATIENCE)

    engine = LocalEngine(Streamed(before), threads=2, max_batch_tokens=66)
    with engine._lock:  # until both wait, so that neither has all threads
        stuck, well = engine.submit(texts(66)), engine.submit(texts(65))
    assert begun.wait(PATIENCE)
    (late,) = [batch for _, batch in engine._watchdog._under_way.values() if len(batch[0]) == 66]
    engine._hang([late])
    with pytest.raises(EngineGone):
        stuck.result(PATIENCE)
    go.set()
    check(well, texts(65))
    never.set()
    engine.close()


def test_a_forward_that_fails_is_watched_no_longer() -> None:
    def before(sequences: Any) -> None:
        if len(sequences[0]) == 13:
            raise IndexError

    engine = LocalEngine(Model(before), forward_timeout=60)
    engine.submit(texts(13)).exception(PATIENCE)
    check(engine.submit(texts(4)), texts(4))
    assert not engine._watchdog._under_way
    engine.close()
