"""Times of a request in its engine, kept on its future, whatever engines lie around the one that runs it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cenote.core import Engine, Sequence
from cenote.engine.blocks import ChunkedEngine
from cenote.engine.cache import CachedEngine
from cenote.engine.engine import LocalEngine
from cenote.engine.fake import FAKE_INFO, FakeEngine
from cenote.engine.host import Host
from cenote.engine.promise import Times, times_of
from cenote.engine.remote import RemoteEngine
from tests import PATIENCE
from tests.engine.test_engine import Model

LONG = replace(FAKE_INFO, max_model_len=4)


def ran(future: Future[Any], began: float) -> bool:
    """Whether a request was accepted, launched and finished, in this order, since `began`."""
    future.result(PATIENCE)
    times = times_of(future)
    return began <= times.accepted <= times.launched <= times.finished <= time.monotonic()


def test_a_future_without_times_has_none_of_them() -> None:
    assert times_of(Future()) == Times(0, 0, 0)


def test_blocks_have_the_times_of_their_request() -> None:
    began = time.monotonic()
    assert ran(ChunkedEngine(FakeEngine(LONG)).submit([Sequence([5] * 9)]), began)


def test_a_result_that_was_kept_has_no_forward() -> None:
    engine = CachedEngine(FakeEngine(), 1 << 20)
    began = time.monotonic()
    assert ran(engine.submit([Sequence([5])]), began)
    again = engine.submit([Sequence([5])])
    again.result(PATIENCE)
    assert times_of(again) == Times(0, 0, 0)


def told(engine: Engine) -> list[Times]:
    """Times of a request of two forwards, each as its progress is told."""
    futures: list[Future[Any]] = []
    seen: list[Times] = []
    is_there = threading.Event()

    def note(_: int) -> None:
        is_there.wait(PATIENCE)
        seen.append(replace(times_of(futures[0])))

    futures.append(engine.submit([Sequence([5] * 3), Sequence([6] * 3)], progress=note))
    is_there.set()
    futures[0].result(PATIENCE)
    return seen


@pytest.mark.parametrize("kind", ["local", "cached", "remote"])
def test_progress_is_told_with_the_time_of_its_forward(kind: str, tmp_path: Path) -> None:
    """By these times the server measures its pace, while other requests of the same forward are told, too."""
    local = LocalEngine(Model(), max_batch_tokens=3, streams=1)
    with ExitStack() as stack:
        stack.callback(local.close)
        engine: Engine = local
        if kind == "cached":
            engine = CachedEngine(local, 1 << 20)
        if kind == "remote":
            stack.callback(Host(local, tmp_path / "engine.sock").close)
            engine = RemoteEngine(tmp_path / "engine.sock")
            stack.callback(engine.close)
        began = time.monotonic()
        first, second = told(engine)
        assert began <= first.finished - first.took <= first.finished <= second.finished - second.took
        assert second.took > 0
        assert second.finished <= time.monotonic()


def test_times_cross_between_processes(tmp_path: Path) -> None:
    host = Host(FakeEngine(), tmp_path / "engine.sock")
    engine = RemoteEngine(tmp_path / "engine.sock")
    try:
        began = time.monotonic()
        assert ran(engine.submit([Sequence([5])]), began)
    finally:
        engine.close()
        host.close()
