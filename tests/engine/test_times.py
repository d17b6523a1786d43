"""Times of a request in its engine, kept on its future, whatever engines lie around the one that runs it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from cenote.core import Sequence
from cenote.engine.blocks import ChunkedEngine
from cenote.engine.cache import CachedEngine
from cenote.engine.fake import FAKE_INFO, FakeEngine
from cenote.engine.host import Host
from cenote.engine.promise import Times, times_of
from cenote.engine.remote import RemoteEngine
from tests import PATIENCE

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


def test_times_cross_between_processes(tmp_path: Path) -> None:
    host = Host(FakeEngine(), tmp_path / "engine.sock")
    engine = RemoteEngine(tmp_path / "engine.sock")
    try:
        began = time.monotonic()
        assert ran(engine.submit([Sequence([5])]), began)
    finally:
        engine.close()
        host.close()
