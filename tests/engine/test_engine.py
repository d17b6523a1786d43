"""The local engine with a model made of a function: every accepted request is answered once, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cenote import metrics
from cenote.core import ModelInfo, Output, Sequence
from cenote.engine import engine as engine_module
from cenote.engine.engine import LocalEngine
from cenote.engine.fake import FAKE_INFO, FakeEngine, fake_vector
from cenote.errors import CenoteError, Closed, EngineFailed, EngineGone, Overloaded
from tests import PATIENCE


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which the engine knows by name."""


class Done:
    def __init__(self, outputs: list[Output | CenoteError], ready: Callable[[], bool] = lambda: True) -> None:
        self.outputs = outputs
        self.ready = ready

    def finish(self) -> list[Output | CenoteError]:
        return self.outputs


class Model:
    """Answers with `fake_vector`; `before` runs first in the device thread and may block or raise."""

    def __init__(self, before: Callable[[Seq[Sequence]], None] = lambda _: None) -> None:
        self.info: ModelInfo = replace(FAKE_INFO, max_model_len=10_000)
        self.before = before
        self.batches: list[list[int]] = []

    def launch(self, sequences: Seq[Sequence]) -> Done:
        self.before(sequences)
        self.batches.append([len(s) for s in sequences])
        return Done([Output(fake_vector(s, 8)) for s in sequences])


def texts(*lengths: int) -> list[Sequence]:
    """Return sequences of these lengths, all different."""
    return [Sequence([length + 1000 * place] * length) for place, length in enumerate(lengths)]


def check(future: Future[list[Output]], sequences: list[Sequence]) -> None:
    for output, sequence in zip(future.result(PATIENCE), sequences, strict=True):
        assert np.array_equal(output.data, fake_vector(sequence, 8))


def test_outputs_come_in_the_order_of_the_request() -> None:
    engine = LocalEngine(Model(), max_batch_tokens=50)
    many = texts(40, 3, 50, 7, 7, 1, 30)
    check(engine.submit(many), many)
    engine.close()


@pytest.mark.parametrize(("shares", "batches"), [(True, 1), (False, 4), (None, 4)])
def test_a_common_beginning_is_paid_once_by_a_model_that_shares_it(shares: bool | None, batches: int) -> None:
    model = Model()
    if shares is not None:
        model.shares_prefixes = shares  # type: ignore[attr-defined]
    engine = LocalEngine(model, max_batch_tokens=500)
    sequences = [Sequence([*range(100), *[number] * 20]) for number in range(16)]
    before = metrics.REGISTRY.get_sample_value("cenote_tokens_total")
    check(engine.submit(sequences), sequences)
    assert len(model.batches) == batches
    assert metrics.REGISTRY.get_sample_value("cenote_tokens_total") == before + 16 * 120, "all tokens are reported"
    engine.close()


def test_concurrent_requests_each_get_their_own() -> None:
    engine = LocalEngine(Model(), max_batch_tokens=64)
    requests = [texts(*(1 + (i * j) % 37 for j in range(1, 20))) for i in range(40)]
    futures: list[Future[list[Output]]] = [Future()] * 40

    def submit(i: int) -> None:
        futures[i] = engine.submit(requests[i])

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for future, request in zip(futures, requests, strict=True):
        check(future, request)
    engine.close()


def test_the_device_thread_has_threads_of_its_own_number() -> None:
    seen: list[int] = []
    mine = torch.get_num_threads()
    model = Model(lambda _: seen.append(torch.get_num_threads()))
    try:
        for threads in (3, 2):
            engine = LocalEngine(model, threads=threads)
            engine.submit(texts(1)).result(PATIENCE)
            assert torch.get_num_threads() == mine, "the caller keeps its own"
            torch.set_num_threads(mine + 4)
            engine.submit(texts(1)).result(PATIENCE)
            torch.set_num_threads(mine)
            engine.close()
    finally:
        torch.set_num_threads(mine)  # also what threads begin with that start later
    assert seen == [3, 3, 2, 2]


def test_empty_request_is_answered() -> None:
    engine = LocalEngine(Model())
    assert engine.submit([]).result(PATIENCE) == []
    engine.close()


def test_a_failing_batch_fails_its_own_requests_only() -> None:
    def before(sequences: Seq[Sequence]) -> None:
        if any(len(s) == 13 for s in sequences):
            raise ValueError("13 is unlucky")

    engine = LocalEngine(Model(before), max_batch_tokens=20)
    bad, good = engine.submit(texts(13, 20, 20)), engine.submit(texts(20, 20))
    with pytest.raises(EngineFailed, match="ValueError") as failure:
        bad.result(PATIENCE)
    assert str(failure.value.__cause__) == "13 is unlucky"
    check(good, texts(20, 20))
    engine.close()


def test_health_is_true_again_after_a_forward_that_succeeds() -> None:
    trouble = threading.Event()
    trouble.set()

    def before(_: Seq[Sequence]) -> None:
        if trouble.is_set():
            raise RuntimeError("device lost")

    engine = LocalEngine(Model(before))
    assert engine.healthy(), "nothing has failed yet"
    with pytest.raises(EngineFailed):
        engine.submit(texts(3)).result(PATIENCE)
    assert not engine.healthy(), "its own forward fails too"
    trouble.clear()
    assert engine.healthy()
    engine.close()
    assert not engine.healthy()


def test_a_batch_out_of_memory_is_split() -> None:
    def before(sequences: Seq[Sequence]) -> None:
        if len(sequences) > 2:
            raise OutOfMemoryError("too much")

    model = Model(before)
    engine = LocalEngine(model, max_batch_tokens=1000)
    many = texts(*range(1, 8))
    check(engine.submit(many), many)
    assert max(map(len, model.batches)) <= 2
    assert engine.healthy()
    engine.close()


def test_a_single_sequence_out_of_memory_fails_alone() -> None:
    def before(sequences: Seq[Sequence]) -> None:
        if any(len(s) > 500 for s in sequences):
            raise OutOfMemoryError("too much")

    engine = LocalEngine(Model(before), max_batch_tokens=1000)
    huge, small = engine.submit(texts(600)), engine.submit(texts(4))
    with pytest.raises(EngineFailed, match="OutOfMemoryError"):
        huge.result(PATIENCE)
    check(small, texts(4))
    engine.close()


def test_an_output_that_is_an_error_fails_its_request_only() -> None:
    class Sick(Model):
        def launch(self, sequences: Seq[Sequence]) -> Done:
            outputs = super().launch(sequences).outputs
            return Done([EngineFailed("NaN") if len(s) == 2 else o for s, o in zip(sequences, outputs, strict=True)])

    engine = LocalEngine(Sick())
    with pytest.raises(EngineFailed, match="NaN"):
        engine.submit(texts(2, 3)).result(PATIENCE)
    check(engine.submit(texts(3)), texts(3))
    engine.close()


class Held:
    """A model whose first batch waits until it is let go, so that a queue builds up behind it."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.model = Model(self._before)

    def _before(self, _: Seq[Sequence]) -> None:
        self.begun.set()
        assert self.go.wait(PATIENCE)


def test_a_cancelled_request_never_runs() -> None:
    held = Held()
    engine = LocalEngine(held.model, max_batch_tokens=10)
    first = engine.submit(texts(10))
    assert held.begun.wait(PATIENCE)
    dropped, kept = engine.submit(texts(9, 9, 9)), engine.submit(texts(8))
    assert dropped.cancel()
    held.go.set()
    check(first, texts(10))
    check(kept, texts(8))
    with pytest.raises(CancelledError):
        dropped.result(PATIENCE)
    assert [9] not in held.model.batches
    engine.close()


def test_a_full_queue_refuses_the_whole_request() -> None:
    held = Held()
    engine = LocalEngine(held.model, max_batch_tokens=10, max_queued=3)
    first = engine.submit(texts(10))
    assert held.begun.wait(PATIENCE)
    waiting = engine.submit(texts(5, 5))
    with pytest.raises(Overloaded, match="2 inputs wait, at most 3 may, and this request brings 2") as refusal:
        engine.submit(texts(5, 5))
    assert 1 <= refusal.value.retry_after <= 60
    last = engine.submit(texts(5))
    waiting.cancel()
    admitted = engine.submit(texts(5, 5))  # a cancelled request makes room
    held.go.set()
    for future in (first, last, admitted):
        future.result(PATIENCE)
    big = engine.submit(texts(*[1] * 50))  # more than the queue holds, but nothing waits
    assert len(big.result(PATIENCE)) == 50
    engine.close()


def outcomes() -> Counter[str]:
    """Return how many sequences have ended in which way."""
    values = {
        name: metrics.REGISTRY.get_sample_value("cenote_sequences_total", {"outcome": name})
        for name in ("done", "failed", "dropped")
    }
    return Counter({name: int(value or 0) for name, value in values.items()})


def unlucky(sequences: Seq[Sequence]) -> None:
    if any(len(s) == 13 for s in sequences):
        raise ValueError("13 is unlucky")


@pytest.mark.parametrize(("length", "outcome"), [(5, "done"), (13, "failed")])
def test_equal_sequences_are_counted_each(length: int, outcome: str) -> None:
    before = outcomes()
    engine = LocalEngine(Model(unlucky))
    engine.submit(texts(length) * 10).exception(PATIENCE)
    engine.close()
    assert outcomes() - before == {outcome: 10}


def test_an_output_that_is_an_error_is_counted_for_all_equal_sequences() -> None:
    class Sick(Model):
        def launch(self, sequences: Seq[Sequence]) -> Done:
            return Done([EngineFailed("NaN") for _ in sequences])

    before = outcomes()
    engine = LocalEngine(Sick())
    engine.submit(texts(5) * 10).exception(PATIENCE)
    engine.close()
    assert outcomes() - before == {"failed": 10}


def test_sequences_that_make_room_are_counted() -> None:
    before = outcomes()
    held = Held()
    engine = LocalEngine(held.model, max_batch_tokens=10, max_queued=3)
    first = engine.submit(texts(10))
    assert held.begun.wait(PATIENCE)
    engine.submit(texts(5, 5) + texts(5, 5)).cancel()  # two entries, in two places each
    second = engine.submit(texts(4, 4))
    assert outcomes() - before == {"dropped": 4}
    held.go.set()
    wait([first, second], PATIENCE)
    engine.close()
    assert outcomes() - before == {"dropped": 4, "done": 3}


def test_the_rest_of_a_failed_request_is_counted() -> None:
    before = outcomes()
    engine = LocalEngine(Model(unlucky), max_batch_tokens=4000)
    engine.submit([*texts(13), *texts(*range(20, 83)), *texts(13)]).exception(PATIENCE)
    engine.close()
    assert outcomes() - before == {"failed": 2, "dropped": 63}, "the first one is in two places"


def test_sequences_of_an_engine_that_is_lost_are_counted() -> None:
    before = outcomes()
    held = Held()
    engine = LocalEngine(held.model, max_batch_tokens=10)
    lost = engine.submit(texts(10) * 3)
    assert held.begun.wait(PATIENCE)
    waiting = engine.submit(texts(9, 9))
    engine.submit(texts(8, 8)).cancel()
    engine._die(SystemExit(), [entry for _, batch in engine._watchdog._under_way.values() for entry in batch])
    for future in (lost, waiting):
        assert isinstance(future.exception(PATIENCE), CenoteError)
    assert outcomes() - before == {"failed": 3 + 2, "dropped": 2}
    held.go.set()
    engine.close()


def test_each_accepted_sequence_is_counted_once() -> None:
    before = outcomes()
    engine = LocalEngine(Streamed(unlucky), threads=2, streams=2, max_batch_tokens=40)
    requests = [texts(*(1 + (i * j) % 29 for j in range(1, 2 + i % 9))) * (1 + i % 2) for i in range(200)]
    for i, request in enumerate(requests):
        future = engine.submit(request)
        if i % 3 == 0:
            future.cancel()
    engine.close()
    counts = outcomes() - before
    assert counts.total() == sum(map(len, requests))
    assert min(counts[name] for name in ("done", "failed", "dropped")) > 0


def test_close_finishes_what_was_accepted() -> None:
    held = Held()
    engine = LocalEngine(held.model, max_batch_tokens=10)
    futures = [engine.submit(texts(10, 10)) for _ in range(5)]
    assert held.begun.wait(PATIENCE)
    closer = threading.Thread(target=engine.close)
    closer.start()
    held.go.set()
    closer.join(PATIENCE)
    assert all(future.done() for future in futures)
    for future in futures:
        check(future, texts(10, 10))
    with pytest.raises(Closed):
        engine.submit(texts(1))
    engine.close()


class Streamed(Model):
    """A model that several threads may launch at a time; `seen` has each batch with its thread's number of threads."""

    is_reentrant = True

    def __init__(self, before: Callable[[Seq[Sequence]], None] = lambda _: None) -> None:
        super().__init__(before)
        self.seen: list[tuple[int, list[int]]] = []

    def launch(self, sequences: Seq[Sequence]) -> Done:
        self.seen.append((torch.get_num_threads(), sorted(len(s) for s in sequences)))
        return super().launch(sequences)


def test_streams_run_side_by_side_each_on_its_part_of_the_threads() -> None:
    together = threading.Barrier(2)
    model = Streamed(lambda _: (together.wait(PATIENCE), None)[1])
    engine = LocalEngine(model, threads=5, streams=2)
    many = texts(30, 10, 20, 40)
    check(engine.submit(many), many)
    assert engine.info.report.streams == 2
    assert sorted(threads for threads, _ in model.seen) == [2, 3]
    assert sorted(lengths for _, lengths in model.seen) == [[10, 40], [20, 30]]
    engine.close()


def test_what_comes_alone_runs_on_all_threads_and_nothing_beside_it() -> None:
    begun, go, together = threading.Event(), threading.Event(), threading.Barrier(2)

    def before(sequences: Seq[Sequence]) -> None:
        if len(sequences[0]) == 7:
            begun.set()
            assert go.wait(PATIENCE)
        elif len(sequences[0]) > 7:
            together.wait(PATIENCE)

    model = Streamed(before)
    engine = LocalEngine(model, threads=4)
    alone = engine.submit(texts(7))
    assert begun.wait(PATIENCE)
    later = [engine.submit(texts(length)) for length in (8, 9)]
    time.sleep(0.05)
    assert model.seen == [(4, [7])]
    go.set()
    for future, length in zip([alone, *later], (7, 8, 9), strict=True):
        check(future, texts(length))
    assert sorted(model.seen[1:]) == [(2, [8]), (2, [9])]
    check(engine.submit(texts(1)), texts(1))
    assert model.seen[-1] == (4, [1])
    engine.close()


def test_what_comes_alone_runs_on_a_part_of_the_threads_where_that_is_faster() -> None:
    slow = threading.Event()  # never set: waiting for it takes its time whatever else the machine does

    def before(_: Seq[Sequence]) -> None:
        if torch.get_num_threads() == 4:
            slow.wait(1)  # longer than a thread waits for the processor where others have it

    model = Streamed(before)
    engine = LocalEngine(model, threads=4)
    for _ in range(12):
        check(engine.submit(texts(5)), texts(5))
        while engine._busy:  # else the next one does not come alone
            time.sleep(0.001)
    engine.close()
    assert [threads for threads, _ in model.seen[:2]] == [4, 2], "both ways are tried"
    assert [threads for threads, _ in model.seen[2:]] == [2] * 10


def test_one_stream_goes_on_while_another_is_busy() -> None:
    go = threading.Event()
    model = Streamed(lambda sequences: (len(sequences[0]) > 90 and go.wait(PATIENCE), None)[1])
    engine = LocalEngine(model, threads=2, max_batch_tokens=100)
    slow = engine.submit(texts(95, 3))
    while not any(95 in lengths for _, lengths in model.seen):
        time.sleep(0.001)
    for length in range(10, 20):
        check(engine.submit(texts(length)), texts(length))
    assert not slow.done()
    go.set()
    check(slow, texts(95, 3))
    engine.close()


@pytest.mark.parametrize(("reentrant", "threads", "streams"), [(False, 4, 2), (True, 1, 2), (True, 4, 1)])
def test_one_stream_has_all_threads(reentrant: bool, threads: int, streams: int) -> None:
    model = Streamed()
    model.is_reentrant = reentrant
    engine = LocalEngine(model, threads=threads, streams=streams)
    assert engine.info.report.streams == 1
    check(engine.submit(texts(3, 4, 5)), texts(3, 4, 5))
    check(engine.submit(texts(3)), texts(3))
    assert model.seen == [(threads, [3, 4, 5]), (threads, [3])]
    engine.close()


def test_threads_of_others_do_not_get_the_number_of_a_stream() -> None:
    engine = LocalEngine(Streamed(), threads=torch.get_num_threads() + 3, streams=2)
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [torch.get_num_threads()]
    engine.close()


def test_streams_answer_everything_once_whoever_gives_up() -> None:
    """Requests from several threads, some of which are cancelled, some fail; at the end nothing waits."""

    def before(sequences: Seq[Sequence]) -> None:
        if any(len(s) == 13 for s in sequences):
            raise ValueError("13 is unlucky")

    engine = LocalEngine(Streamed(before), threads=3, streams=3, max_batch_tokens=40)
    requests = [texts(*(1 + (i * j) % 29 for j in range(1, 2 + i % 9))) for i in range(300)]
    futures: list[Future[list[Output]]] = [Future()] * len(requests)
    counts = [0] * len(requests)

    def submit(start: int) -> None:
        for i in range(start, len(requests), 4):

            def count(n: int, i: int = i) -> None:
                counts[i] += n

            futures[i] = engine.submit(requests[i], progress=count)
            if i % 11 == 0:
                futures[i].cancel()

    threads = [threading.Thread(target=submit, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    done = 0
    for i, (future, request) in enumerate(zip(futures, requests, strict=True)):
        assert future.done()
        if future.cancelled():
            assert i % 11 == 0
        elif future.exception() is None:
            check(future, request)
            assert counts[i] == len(request)
            done += 1
        else:
            assert str(future.exception().__cause__) == "13 is unlucky"  # type: ignore[union-attr]
    assert done > 100
    with pytest.raises(Closed):
        engine.submit(texts(1))


class Mortal(Streamed):
    """A model that ends the device thread of a batch with a sequence of 66 tokens: its batch cannot be asked."""

    def launch(self, sequences: Seq[Sequence]) -> Done:
        done = super().launch(sequences)
        if any(len(s) == 66 for s in sequences):
            done.ready = self._ended
        return done

    def _ended(self) -> bool:
        raise SystemExit("the interpreter is going down")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_that_dies_takes_the_others_along() -> None:
    begun, go = threading.Event(), threading.Event()

    def before(sequences: Seq[Sequence]) -> None:
        if any(len(s) == 66 for s in sequences):
            return
        begun.set()
        assert go.wait(PATIENCE)

    engine = LocalEngine(Mortal(before), threads=2, max_batch_tokens=66)
    kept = engine.submit(texts(40, 41))
    assert begun.wait(PATIENCE)
    lost = engine.submit([Sequence([1] * 66), Sequence([2] * 66)])
    go.set()
    check(kept, texts(40, 41))
    with pytest.raises(EngineFailed, match="device thread died"):
        lost.result(PATIENCE)
    with pytest.raises(EngineGone, match="device thread died"):
        engine.submit(texts(1))
    assert "SystemExit" in engine.fault
    assert not engine.healthy()
    for thread in engine._threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_device_thread_answers_everybody() -> None:
    held = Held()
    engine = LocalEngine(Mortal(held._before), max_batch_tokens=10, streams=1)
    first = engine.submit(texts(66))
    assert held.begun.wait(PATIENCE)
    second = engine.submit(texts(10))
    held.go.set()
    wait([first, second], PATIENCE)
    with pytest.raises(EngineFailed, match="device thread died"):
        first.result(0)
    for refused in (lambda: second.result(0), lambda: engine.submit(texts(1))):
        with pytest.raises(EngineGone, match="device thread died"):
            refused()
    assert not engine.healthy()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_batch_of_a_dead_device_thread_is_counted_once() -> None:
    before = outcomes()
    engine = LocalEngine(Mortal(), streams=1)
    with pytest.raises(EngineFailed, match="device thread died"):
        engine.submit(texts(66) * 2).result(PATIENCE)
    assert outcomes() - before == {"failed": 2}


class Uncopied(np.ndarray):
    """A vector for whose copy there is no memory."""

    def copy(self, order: object = "C") -> np.ndarray:
        raise MemoryError


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_batch_that_a_device_thread_dies_of_is_answered() -> None:
    class Full(Model):
        def launch(self, sequences: Seq[Sequence]) -> Done:
            return Done([Output(fake_vector(s, 8).view(Uncopied)) for s in sequences], ready=lambda: False)

    engine = LocalEngine(Full(), streams=1)
    with pytest.raises(EngineFailed, match="device thread died: MemoryError"):
        engine.submit(texts(5) * 2).result(PATIENCE)


def test_progress_counts_every_sequence() -> None:
    engine = LocalEngine(Model(), max_batch_tokens=20)
    counts: list[int] = []
    engine.submit(texts(*range(1, 15)), progress=counts.append).result(PATIENCE)
    assert sum(counts) == 14
    engine.close()


def test_the_fake_keeps_the_contract() -> None:
    engine = FakeEngine(held=True)
    future, cancelled = engine.submit(texts(2, 3)), engine.submit(texts(4))
    cancelled.cancel()
    assert not future.done()
    engine.release()
    check(future, texts(2, 3))
    engine.failures.append(EngineFailed("scripted"))
    with pytest.raises(EngineFailed, match="scripted"):
        engine.submit(texts(1)).result(PATIENCE)
    engine.close()
    with pytest.raises(Closed):
        engine.submit(texts(1))


LOADED = """
import os, torch
from cenote.tensors.process import release_threads
from tests.engine.test_engine import LocalEngine, Model, check, texts

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
x = torch.arange(1 << 20, dtype=torch.float32)
release_threads()
before = count()
x + x
loaded = count()
engine = LocalEngine(Model(), threads=2)
print(loaded - before, count() - loaded, len(engine._threads))
check(engine.submit(texts(3)), texts(3))
engine.close()
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="this torch has no OpenMP")
def test_threads_that_have_loaded_a_model_are_given_back() -> None:
    """With them, OpenMP would count more threads than cores, and let them all sleep between the parts of a layer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    begun, more, device = map(int, done.stdout.split())
    assert begun >= 1
    assert more == device - begun


@contextmanager
def tidied(monkeypatch: pytest.MonkeyPatch, rest: float, long_work: float) -> Iterator[tuple[LocalEngine, list[float]]]:
    """An engine, and when it gave freed memory back."""
    released: list[float] = []
    monkeypatch.setattr(engine_module, "REST", rest)
    monkeypatch.setattr(engine_module, "LONG_WORK", long_work)
    monkeypatch.setattr(engine_module, "release_freed_memory", lambda: released.append(time.monotonic()))
    engine = LocalEngine(Model(), max_batch_tokens=64)
    try:
        yield engine, released
    finally:
        engine.close()


def test_freed_memory_goes_back_once_when_nothing_came_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with tidied(monkeypatch, rest=0.1, long_work=1e9) as (engine, released):
        for times in (1, 2):
            check(engine.submit(texts(2)), texts(2))
            deadline = time.monotonic() + PATIENCE
            while len(released) < times:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.3)
            assert len(released) == times, "once, until there was more work"


def test_freed_memory_goes_back_at_a_pause_of_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with tidied(monkeypatch, rest=1e9, long_work=0.0) as (engine, released):
        deadline, sent = time.monotonic() + PATIENCE, 0
        while len(released) < 2:
            assert time.monotonic() < deadline
            check(engine.submit(texts(2)), texts(2))
            sent += 1
            time.sleep(0.01)
            assert len(released) < sent, "once a pause, when work ends it"


def test_freed_memory_is_kept_while_work_is_short_and_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    with tidied(monkeypatch, rest=1e9, long_work=1e9) as (engine, released):
        for _ in range(3):
            check(engine.submit(texts(2)), texts(2))
            time.sleep(0.01)
        time.sleep(0.3)
        assert not released
