"""The seam between processes: what crosses, and what becomes of requests when either side leaves."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import cenote
from cenote.core import (
    Engine,
    LateChunk,
    LateChunkingMetadata,
    LateChunkingParams,
    Media,
    ModelInfo,
    Output,
    PoolingParams,
    Sequence,
    Similarity,
)
from cenote.engine import remote, wire
from cenote.engine.fake import FAKE_INFO, FakeEngine, fake_vector
from cenote.engine.host import Host, check_path
from cenote.engine.remote import RemoteEngine
from cenote.engine.wire import Answer, Card, Channel, Hello, Submit
from cenote.errors import BadRequest, CenoteError, Closed, ConfigError, EngineFailed, EngineGone, Overloaded, TooLong
from tests import PATIENCE


@dataclass
class Recording:
    """An engine that answers with `outputs` and keeps what it was given."""

    outputs: list[Output] = field(default_factory=list)
    info: ModelInfo = FAKE_INFO
    fault: str = ""
    given: list[Sequence] = field(default_factory=list)

    def submit(self, sequences: Any, *, progress: Callable[[int], None] | None = None) -> Future[list[Output]]:
        self.given += sequences
        future: Future[list[Output]] = Future()
        for _ in self.outputs:
            if progress is not None:
                progress(1)
        future.set_result(self.outputs)
        return future

    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        pass


@dataclass
class Seam:
    """Hosts and fronts that live until the test ends."""

    path: Path
    stack: ExitStack = field(default_factory=ExitStack)

    def host(self, engine: Engine | None = None, about: Any = None) -> Host:
        host = Host(engine or FakeEngine(), self.path, about)
        self.stack.callback(host.close)
        return host

    def front(self) -> RemoteEngine:
        front = RemoteEngine(self.path, patience=PATIENCE)
        self.stack.callback(front.close)
        return front

    def raw(self) -> socket.socket:
        """A front of one's own making."""
        connection = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(PATIENCE)
        connection.connect(str(self.path))
        return connection

    def listening(self) -> socket.socket:
        """A host of one's own making."""
        self.path.parent.mkdir(exist_ok=True)
        listener = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(self.path))
        listener.listen()
        return listener


def framed(message: Any) -> bytes:
    body = msgspec.msgpack.encode(message)
    return wire.LENGTH.pack(len(body)) + body


def introduced(listener: socket.socket, *messages: Any) -> socket.socket:
    """The connection of the next front, which was told `messages`."""
    connection, _ = listener.accept()
    for message in messages:
        connection.sendall(framed(message))
    return connection


@pytest.fixture
def seam(tmp_path: Path) -> Iterator[Seam]:
    made = Seam(tmp_path / "private" / "engine.sock")
    with made.stack:
        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def sever(host: Host) -> None:
    """What the fronts of a host see when it is killed: the sockets end, and nobody listens."""
    host._path.unlink()
    host._listener.shutdown(socket.SHUT_RDWR)
    for front in [*host._fronts]:
        front._channel._end()


FULL = Sequence(
    ids=[1, 2, 3],
    task="token_embed",
    params=PoolingParams(True, 4, 2, (5, 6), 7, LateChunkingParams(8), "token_embed"),
    type_ids=[0, 0, 1],
    skip=1,
    hidden=1,
    keep=(0, 2),
    also=("embed",),
    adapter="retrieval",
    looked_up=True,
    clusters=True,
    late_chunking=LateChunkingMetadata(8, 3, [LateChunk((0, 3), (0, 9)), LateChunk((3, 4), None)]),
    salt="s",
    priority=-3,
    media=(Media(b"key", 2, 8, (1, 2, 4), {"pixel_values": np.ones((8, 3), np.float32)}),),
    spans=((1, 3),),
    positions=np.array([[0, 1, 1], [0, 1, 1], [0, 1, 2]]),
)
"""A sequence with every field set."""


def test_every_field_of_a_sequence_crosses(seam: Seam) -> None:
    plain = Sequence(ids=[0])
    assert all(np.any(getattr(FULL, f.name) != getattr(plain, f.name)) for f in fields(Sequence)), "FULL lacks a field"
    engine = Recording()
    seam.host(engine)
    seam.front().submit([FULL, plain]).result(PATIENCE)
    assert len(engine.given) == 2
    for got, sent in zip(engine.given, (FULL, plain), strict=True):
        for f in fields(Sequence):
            assert np.all(getattr(got, f.name) == getattr(sent, f.name)), f.name
    (here,), (there,) = FULL.media, engine.given[0].media
    assert there.arrays["pixel_values"].dtype == np.float32
    assert there.arrays["pixel_values"].tolist() == here.arrays["pixel_values"].tolist()


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64", "bool"])
def test_arrays_of_pictures_cross_in_their_type(seam: Seam, dtype: str) -> None:
    engine = Recording()
    seam.host(engine)
    array = np.arange(6).reshape(2, 3).astype(dtype)
    sequence = Sequence([1], media=(Media(b"k", 1, 1, arrays={"x": array}),), spans=((0, 1),))
    seam.front().submit([sequence]).result(PATIENCE)
    got = engine.given[0].media[0].arrays["x"]
    assert (got.dtype, got.tolist()) == (array.dtype, array.tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        {"spans": ()},
        {"spans": ((0, 3),)},
        {"spans": ((3, 5),)},
        {"spans": ((2, 0),)},
        {"positions": np.zeros((3, 2), np.int64)},
    ],
)
def test_pictures_that_do_not_fill_their_places_are_refused(seam: Seam, wrong: dict[str, Any]) -> None:
    seam.host()
    front = seam.front()
    good = Sequence([1, 2, 3, 4], media=(Media(b"k", 2, 8),), spans=((1, 3),))
    assert len(front.submit([good]).result(PATIENCE)) == 1
    with pytest.raises(BadRequest):
        front.submit([replace(good, **wrong)]).result(PATIENCE)


def test_arrays_of_other_things_do_not_cross(seam: Seam) -> None:
    engine = Recording()
    seam.host(engine)
    sequence = Sequence([1], media=(Media(b"k", 1, 1, arrays={"x": np.array([1 + 2j])}),), spans=((0, 1),))
    with pytest.raises(CenoteError):
        seam.front().submit([sequence]).result(PATIENCE)


def test_arrays_and_numpy_integers_are_ids(seam: Seam) -> None:
    engine = Recording()
    seam.host(engine)
    ids, types = np.array([4, 5], np.int32), np.array([0, 1])
    seam.front().submit([Sequence(ids, type_ids=types), Sequence([*ids])]).result(PATIENCE)
    assert [s.ids for s in engine.given] == [[4, 5], [4, 5]]
    assert engine.given[0].type_ids == [0, 1]


def test_outputs_cross_bit_by_bit(seam: Seam) -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 2**32, (5, 6), dtype=np.uint32).view(np.float32)[:, ::2]
    outputs = [
        Output(rows),
        Output(np.float32([0.5, -0.0, 1e-45]), np.array([3, 9, 2**40])),
        Output(np.zeros((0, 8), np.float32), None, {"sparse": Output(np.ones(1, np.float32), np.array([1]))}),
    ]
    seam.host(Recording(outputs))
    got = seam.front().submit([Sequence([1])] * 3).result(PATIENCE)

    def same(a: Output, b: Output) -> None:
        assert a.data.dtype == np.float32
        assert a.data.shape == b.data.shape
        assert a.data.tobytes() == b.data.tobytes()
        assert a.data.flags.writeable
        assert a.data.flags.aligned
        assert (a.indices is None) == (b.indices is None)
        if a.indices is not None and b.indices is not None:
            assert a.indices.dtype == np.int64
            assert a.indices.tolist() == b.indices.tolist()
        assert a.others.keys() == b.others.keys()
        for name in a.others:
            same(a.others[name], b.others[name])

    for mine, theirs in zip(got, outputs, strict=True):
        same(mine, theirs)


def test_an_output_of_another_dtype_is_not_taken(seam: Seam) -> None:
    engine = Recording([Output(np.zeros(2))])  # float64
    seam.host(engine)
    front = seam.front()
    with pytest.raises(EngineGone):
        front.submit([Sequence([1])]).result(PATIENCE)
    engine.outputs = []
    until(front.healthy)
    assert front.submit([Sequence([1])]).result(PATIENCE) == []


def test_the_card_crosses(seam: Seam) -> None:
    info = replace(
        FAKE_INFO,
        matryoshka=(2, 4),
        labels=("a", "b"),
        similarity=Similarity("dot"),
        columns=range(3),
    ).reported(revision="abc", warnings=("slow",))
    seam.host(FakeEngine(info), {"names": ["a"], "none": None})
    front = seam.front()
    assert front.info == replace(info, columns=[0, 1, 2])
    assert front.about == {"names": ["a"], "none": None}


ERRORS = [
    BadRequest("wrong", param="input"),
    TooLong("too long", param="input_tokens"),
    Overloaded("full", retry_after=7),
    EngineFailed("the forward failed"),
    Closed("over"),
    EngineGone("gone", retry_after=3),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross_as_themselves(seam: Seam, error: CenoteError) -> None:
    seam.host(FakeEngine(failures=[error]))
    caught = seam.front().submit([Sequence([1])]).exception(PATIENCE)
    assert type(caught) is type(error)
    assert vars(caught) == vars(error)
    assert str(caught) == str(error)


def test_an_error_that_is_none_of_ours_is_a_failure_of_the_engine(seam: Seam) -> None:
    seam.host(FakeEngine(failures=[ZeroDivisionError("by zero")]))  # type: ignore[list-item]
    caught = seam.front().submit([Sequence([1])]).exception(PATIENCE)
    assert type(caught) is EngineFailed
    assert str(caught) == "the engine failed: ZeroDivisionError: by zero"


def chunked(*ends: int) -> Sequence:
    return Sequence([1, 2, 3, 4], "token_embed", PoolingParams(late_chunking_params=LateChunkingParams(4, ends)))


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (Sequence([1], task="sparse"), "fake does not offer 'sparse', but embed, token_embed"),
        (Sequence([1], also=("classify",)), "fake does not offer 'classify', but embed, token_embed"),
        (Sequence([]), "got 0 tokens, expected 1 to 64"),
        (Sequence([1] * 65), "got 65 tokens, expected 1 to 64"),
        (Sequence([1, 1000]), "got a token id out of 0 to 999"),
        (Sequence([-1]), "got a token id out of 0 to 999"),
        (Sequence([1, 2], type_ids=[0]), "got 1 type ids for 2 tokens"),
        (Sequence([1, 2], skip=-1), "got -1 skipped and 0 hidden of 2 tokens"),
        (Sequence([1, 2], hidden=2), "got 0 skipped and 2 hidden of 2 tokens"),
        (Sequence([1, 2], hidden=-1), "got 0 skipped and -1 hidden of 2 tokens"),
        (Sequence([1, 2], keep=(0, 2)), "got a kept place out of 0 to 1"),
        (Sequence([1, 2], keep=(-1,)), "got a kept place out of 0 to 1"),
        *(
            (chunked(*ends), "got chunks that end at .*, expected rising ends up to 4")
            for ends in ((2, 10**6), (2, 3), (3, 2, 4), (2, 2, 4), (0, 4), (-1, 4), (5,))
        ),
    ],
)
def test_what_no_renderer_makes_is_refused(seam: Seam, sequence: Sequence, message: str) -> None:
    engine = FakeEngine()
    seam.host(engine)
    with pytest.raises(BadRequest, match=message):
        seam.front().submit([Sequence([1]), sequence]).result(PATIENCE)
    assert engine.submitted == []


@pytest.mark.parametrize(
    "sequence",
    [
        Sequence([1, 2], skip=3),  # a prompt of which an explicit side has cut a part
        Sequence([1, 2], hidden=1),
        Sequence([1, 2], task="token_embed", keep=()),
        Sequence([1, 2], task="token_embed", keep=(1, 0)),
        chunked(),
        chunked(4),
        chunked(1, 2, 4),
    ],
)
def test_what_a_renderer_makes_is_run(seam: Seam, sequence: Sequence) -> None:
    engine = FakeEngine()
    seam.host(engine)
    seam.front().submit([sequence]).result(PATIENCE)
    assert len(engine.submitted) == 1


def test_progress_crosses_as_counts(seam: Seam) -> None:
    seam.host(Recording([Output(np.zeros(1, np.float32))] * 3))
    front = seam.front()
    counts: list[int] = []
    front.submit([Sequence([1])] * 3, progress=counts.append).result(PATIENCE)
    assert counts == [1, 1, 1]

    def broken(_: int) -> None:
        raise RuntimeError("a broken progress bar")

    assert len(front.submit([Sequence([1])] * 3, progress=broken).result(PATIENCE)) == 3


def test_a_cancelled_request_is_cancelled_in_the_host(seam: Seam) -> None:
    engine = FakeEngine(held=True)
    seam.host(engine)
    front = seam.front()
    kept, dropped = front.submit([Sequence([1])]), front.submit([Sequence([2])])
    until(lambda: len(engine._open) == 2)
    assert dropped.cancel()
    until(lambda: engine._open[1][0].cancelled())
    engine.release()
    (output,) = kept.result(PATIENCE)
    assert output.data.tolist() == fake_vector(Sequence([1]), 8).tolist()
    assert front._pending == {}


def test_a_front_that_leaves_takes_its_work_and_no_other(seam: Seam) -> None:
    engine = FakeEngine(held=True)
    host = seam.host(engine)
    stays, leaves = seam.front(), seam.front()
    kept = stays.submit([Sequence([1])])
    until(lambda: len(engine._open) == 1)
    lost = leaves.submit([Sequence([2])])
    until(lambda: len(engine._open) == 2)
    assert leaves._channel is not None
    leaves._closing.set()
    leaves._channel._end()
    until(lambda: engine._open[1][0].cancelled())
    assert isinstance(lost.exception(PATIENCE), EngineGone)
    until(lambda: host.fronts == 1)
    engine.release()
    assert len(kept.result(PATIENCE)) == 1


def test_a_lost_host_fails_what_is_under_way_and_is_taken_up_again(seam: Seam) -> None:
    engine = FakeEngine(held=True)
    host = seam.host(engine)
    front = seam.front()
    answers = [front.submit([Sequence([i])]) for i in range(5)]
    until(lambda: len(engine._open) == 5)
    sever(host)
    for answer in answers:
        error = answer.exception(PATIENCE)
        assert isinstance(error, EngineGone)
        assert (error.status, error.retry_after) == (503, 1)
    with pytest.raises(EngineGone, match=remote.GONE):
        front.submit([Sequence([1])])
    assert not front.healthy()
    seam.host()
    until(front.healthy)
    assert len(front.submit([Sequence([1])]).result(PATIENCE)) == 1


def test_a_host_of_another_model_is_not_taken(seam: Seam, caplog: pytest.LogCaptureFixture) -> None:
    host = seam.host()
    front = seam.front()
    sever(host)
    other = seam.host(FakeEngine(replace(FAKE_INFO, name="other", dimension=4)))
    until(lambda: "restart this server" in front._why_not)
    with pytest.raises(EngineGone, match="is another one's now, of other"):
        front.submit([Sequence([1])])
    sever(other)
    until(lambda: front._why_not == remote.GONE)
    with seam.listening() as listener, introduced(listener, Hello("0.0.1")):
        until(lambda: "is of Cenote 0.0.1" in front._why_not)
    seam.host(FakeEngine(FAKE_INFO.reported(streams=2, layout="padded", warnings=("slow",))))
    until(front.healthy)  # how it runs is no matter
    assert sum("restart this server" in record.message for record in caplog.records) == 1


def test_a_host_that_runs_the_same_model_in_another_way_is_taken(seam: Seam) -> None:
    host = seam.host(about={"names": ["a"], "ranges": [[-0.25], [0.25]]})
    front = seam.front()
    sever(host)
    info = FAKE_INFO.reported(
        device="cuda:0",
        layout="padded",
        linears="int8",
        shares_prefixes=True,
        company="forwards are apart",
        streams=3,
        batch_tokens=2048,
        warnings=("slow",),
    )
    seam.host(FakeEngine(info), {"names": ["a"], "ranges": [[-0.25], [0.2500001]]})
    until(lambda: front.healthy() or "restart this server" in front._why_not)
    assert front._why_not == remote.GONE
    assert front.info.report == info.report, "its report is of the engine that runs"
    assert front.about == {"names": ["a"], "ranges": [[-0.25], [0.25]]}, "codes of int8 stay the same"


@pytest.mark.parametrize(
    "changed",
    [
        {"info": FAKE_INFO.reported(dtype="bfloat16")},
        {"info": FAKE_INFO.reported(revision="abc")},
        {"about": {"names": ["b"]}},
        {"about": None},
    ],
    ids=["dtype", "revision", "names", "nothing"],
)
def test_a_host_that_answers_otherwise_is_not_taken(seam: Seam, changed: dict[str, Any]) -> None:
    card = {"info": FAKE_INFO, "about": {"names": ["a"]}}
    host = seam.host(about=card["about"])
    front = seam.front()
    sever(host)
    card |= changed
    seam.host(FakeEngine(card["info"]), card["about"])
    until(lambda: front.healthy() or "restart this server" in front._why_not)
    assert not front.healthy()


def test_many_requests_of_many_fronts_get_each_their_own_answer(seam: Seam) -> None:
    seam.host()
    fronts = [seam.front() for _ in range(4)]

    def ask(i: int) -> bool:
        sequences = [Sequence([i % 1000, j]) for j in range(i % 7)]
        outputs = fronts[i % 4].submit(sequences).result(PATIENCE)
        return [o.data.tolist() for o in outputs] == [fake_vector(s, 8).tolist() for s in sequences]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(400)))


def test_large_requests_and_answers_do_not_wait_for_each_other(seam: Seam) -> None:
    """More than the buffers of a socket hold, both ways at once."""
    seam.host(FakeEngine(replace(FAKE_INFO, dimension=20_000)))
    front = seam.front()
    answers = [front.submit([Sequence([*range(64)])] * 100) for _ in range(5)]
    assert [len(answer.result(PATIENCE)) for answer in answers] == [100] * 5


def test_sending_to_a_front_that_does_not_read_does_not_block(seam: Seam) -> None:
    engine = FakeEngine(replace(FAKE_INFO, dimension=100_000), held=True)
    seam.host(engine)
    stuck = seam.raw()
    channel: Channel[Any] = Channel(stuck, wire.HOST_DECODER, wire.LARGEST_ANSWER)
    channel.send(Submit(0, [Sequence([1])] * 50))
    until(lambda: len(engine._open) == 1)
    engine.release()  # 20 MB, by the thread of the engine
    other = seam.front().submit([Sequence([2])])
    until(lambda: len(engine._open) == 1)
    engine.release()
    assert len(other.result(PATIENCE)) == 1
    frames = channel.frames()
    assert [type(next(frames)) for _ in range(3)] == [Hello, Card, Answer]
    frames.close()


class Ended:
    """A socket that takes nothing at once; the connection ends as soon as the rest was sent."""

    channel: Channel[Any]

    def send(self, _: memoryview, __: int) -> int:
        raise BlockingIOError

    def sendall(self, _: memoryview) -> None:
        self.channel._end()

    def shutdown(self, _: int) -> None:
        pass


def test_a_connection_may_end_while_the_last_bytes_go_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    connection = Ended()
    connection.channel = Channel(connection, wire.HOST_DECODER, wire.LARGEST_ANSWER)  # type: ignore[arg-type]
    connection.channel.send(Hello("1"))
    connection.channel._writer.join(PATIENCE)
    assert not connection.channel._writer.is_alive()
    assert raised == []


def test_each_request_is_answered_once_however_it_ends(seam: Seam) -> None:
    """Hosts come and go under a load; each future ends, with an output or with `EngineGone`."""
    answered: Counter[int] = Counter()
    futures = []
    front = None
    for turn in range(6):
        engine = FakeEngine(held=turn % 2 == 1)
        host = seam.host(engine)
        front = front or seam.front()
        until(front.healthy)
        for i in range(50):
            number = turn * 50 + i
            future = front.submit([Sequence([number])])
            future.add_done_callback(lambda _, number=number: answered.update([number]))
            futures.append(future)
        sever(host)
        until(lambda front=front: front._channel is None)
    outcomes = [future.exception(PATIENCE) for future in futures]
    assert answered == Counter(range(300))
    assert {type(outcome) for outcome in outcomes} <= {type(None), EngineGone}
    assert sum(isinstance(outcome, EngineGone) for outcome in outcomes) >= 150


def test_a_host_that_closes_answers_what_it_accepted(seam: Seam) -> None:
    engine = FakeEngine(held=True)
    host = seam.host(engine)
    front = seam.front()
    answer = front.submit([Sequence([1])])
    until(lambda: len(engine._open) == 1)
    host.close()
    assert len(answer.result(PATIENCE)) == 1
    assert engine.closed
    assert not seam.path.exists()
    until(lambda: front._channel is None)


def test_a_host_that_closes_has_a_bound(seam: Seam) -> None:
    engine = FakeEngine(held=True)
    engine.close = lambda: until(lambda: all(future.done() for future, *_ in engine._open))  # type: ignore[method-assign]
    host = seam.host(engine)
    answer = seam.front().submit([Sequence([1])])
    until(lambda: len(engine._open) == 1)
    assert host.close(timeout=0.05)
    error = answer.exception(PATIENCE)
    assert isinstance(error, Closed)
    assert str(error) == "the engine dropped the request"


SCARCE = """
import contextlib, json, logging, os, resource, socket, sys, time
from cenote.engine.fake import FakeEngine
from cenote.engine.host import TICK, Host
from cenote.engine.remote import RemoteEngine

class Log(logging.Handler):
    lines = []
    def emit(self, record):
        self.lines.append(record.getMessage())

logging.getLogger("cenote.engine.host").addHandler(Log())
host = Host(FakeEngine(), sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
taken = []
with contextlib.suppress(OSError):
    while True:
        taken.append(os.dup(0))
os.close(taken.pop())
late = socket.socket(socket.AF_UNIX)
late.settimeout(float(sys.argv[2]))
late.connect(sys.argv[1])
while not Log.lines:
    time.sleep(TICK / 10)
time.sleep(5 * TICK)
for number in taken:
    os.close(number)
greeted = bool(late.recv(1))
front = RemoteEngine(sys.argv[1])
print(json.dumps([greeted, front.healthy(), host.fronts, Log.lines]))
front.close()
host.close()
"""
"""A host whose process has no descriptor left for a front, until others are given back."""


def test_a_lack_of_descriptors_passes(seam: Seam) -> None:
    command = [sys.executable, "-c", SCARCE, str(seam.path), str(PATIENCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    greeted, is_healthy, fronts, lines = json.loads(done.stdout)
    assert greeted, "who connected meanwhile has waited in the queue of the socket"
    assert is_healthy
    assert fronts == 2
    assert lines == ["fronts cannot connect for now: [Errno 24] Too many open files"]


def test_closing_twice_says_twice_how_it_ended(seam: Seam) -> None:
    engine = FakeEngine()
    host = seam.host(engine)
    assert host.close()
    assert host.close()
    hung = seam.host(FakeEngine(fault="the device hangs"))
    assert not hung.close()
    assert not hung.close()


def test_a_closed_front_refuses_and_leaves_the_engine_alone(seam: Seam) -> None:
    engine = FakeEngine(held=True)
    host = seam.host(engine)
    front = RemoteEngine(seam.path)
    answer = front.submit([Sequence([1])])
    until(lambda: len(engine._open) == 1)
    closing = threading.Thread(target=front.close)
    closing.start()
    until(front._closing.is_set)
    with pytest.raises(Closed):
        front.submit([Sequence([1])])
    engine.release()
    closing.join(PATIENCE)
    assert len(answer.result(0)) == 1
    assert not engine.closed
    until(lambda: host.fronts == 0)
    front.close()


def test_health_is_the_engines(seam: Seam) -> None:
    engine = FakeEngine()
    seam.host(engine)
    front = seam.front()
    assert front.healthy()
    engine.is_healthy = False
    assert not front.healthy()


def test_only_the_user_may_open_the_socket(seam: Seam) -> None:
    seam.host()
    assert stat.S_IMODE(seam.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(seam.path.parent.stat().st_mode) == 0o700


def test_a_socket_that_a_killed_host_left_is_replaced(seam: Seam) -> None:
    seam.path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(seam.path))
    seam.host()
    assert seam.front().healthy()


def test_a_path_that_is_taken(seam: Seam, tmp_path: Path) -> None:
    seam.host()
    with pytest.raises(ConfigError, match=f"cannot listen on {seam.path}: another process does"):
        Host(FakeEngine(), seam.path)
    assert seam.front().healthy()
    (tmp_path / "file").write_text("a")
    with pytest.raises(ConfigError, match="it is a file, not a socket; name another path, or remove it"):
        Host(FakeEngine(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "a"
    with pytest.raises(ConfigError, match="cannot listen on .*AF_UNIX path too long"):
        Host(FakeEngine(), tmp_path / ("x" * 200))


def test_a_path_can_be_tried(seam: Seam) -> None:
    check_path(seam.path)
    assert not seam.path.exists()
    seam.host()
    with pytest.raises(ConfigError, match="another process does"):
        check_path(seam.path)
    assert seam.front().healthy()


def test_no_host(seam: Seam) -> None:
    with pytest.raises(ConfigError, match=f"cannot reach an engine at {seam.path}: No such file or directory; start"):
        RemoteEngine(seam.path, patience=0.1)


def test_a_host_may_come_later(seam: Seam) -> None:
    with ThreadPoolExecutor(1) as pool:
        front = pool.submit(seam.front)
        time.sleep(0.2)
        seam.host()
        assert front.result(PATIENCE).healthy()


def test_a_host_of_another_version(seam: Seam) -> None:
    with seam.listening() as listener, ThreadPoolExecutor(1) as pool:
        front = pool.submit(seam.front)
        with (
            introduced(listener, Hello("0.0.1")),
            pytest.raises(ConfigError, match=rf"is of Cenote 0\.0\.1, and this is {cenote.__version__}"),
        ):
            front.result(PATIENCE)


MALFORMED = {
    "no MessagePack": wire.LENGTH.pack(3) + b"abc",
    "a pickle": wire.LENGTH.pack(4) + b"\x80\x04N.",
    "too large": wire.LENGTH.pack(1 << 40),
    "text for ids": framed({"type": "submit", "number": 1, "sequences": [{"ids": "abc"}]}),
    "a chunk of no tokens": framed(
        {
            "type": "submit",
            "number": 1,
            "sequences": [{"ids": [1], "params": {"late_chunking_params": {"chunk_size": 0}}}],
        }
    ),
    "a frame of hosts": framed({"type": "hello", "version": "1"}),
}
"""Bytes that no front sends."""


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_front_that_is_not_understood_is_disconnected(seam: Seam, data: bytes) -> None:
    engine = FakeEngine()
    host = seam.host(engine)
    front = seam.front()
    broken = seam.raw()
    until(lambda: host.fronts == 2)
    broken.sendall(data)
    while broken.recv(1 << 16):  # what the host says first, then the end
        pass
    until(lambda: host.fronts == 1)
    assert engine.submitted == []
    assert front.healthy()


def test_a_front_that_dies_within_a_frame(seam: Seam) -> None:
    host = seam.host()
    half = seam.raw()
    until(lambda: host.fronts == 1)
    half.sendall(wire.LENGTH.pack(100) + b"x")
    half.close()
    until(lambda: host.fronts == 0)
    assert seam.front().healthy()


def test_a_host_that_says_nothing(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "INTRODUCTION", 0.05)
    with seam.listening(), pytest.raises(ConfigError, match="the host is gone before it said its version"):
        RemoteEngine(seam.path, patience=0.2)


@pytest.mark.parametrize("data", [wire.LENGTH.pack(1) + b"\xc1", framed({"type": "card", "info": {}, "about": None})])
def test_a_host_that_talks_nonsense(seam: Seam, data: bytes) -> None:
    """The front drops the connection, and with it what was under way."""
    with seam.listening() as listener, ThreadPoolExecutor(1) as pool:
        front = pool.submit(seam.front)
        connection = introduced(listener, Hello(cenote.__version__), Card(FAKE_INFO, None))
        answer = front.result(PATIENCE).submit([Sequence([1])])
        connection.sendall(data)
        assert isinstance(answer.exception(PATIENCE), EngineGone)
        connection.close()
