"""The harness that measures peers: processes that fail are reported and stopped, and figures are what they say."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import envs, figures, load, texts
from benchmarks.peers.__main__ import Bench
from benchmarks.peers.envs import PeerError
from benchmarks.peers.load import Clients
from benchmarks.peers.processes import Server, Worker
from benchmarks.peers.table import CENOTE, ENVS, FORMS, PEERS, Env, Peer
from cenote.models.hub import embedded
from tests import PATIENCE

ENGINE = """
import os, subprocess, sys, time
import numpy as np
def load(task, folder, variant, threads):
    print("words on stdout")
    def answer(order):
        if order == ["die"]:
            os._exit(3)
        if order == ["sleep"]:
            time.sleep(60)
        if order == ["child"]:
            subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.3: pass"])
        if order == ["fail"]:
            raise ValueError("in /some/where/file.py of https://a.registry/x")
        return np.full((len(order), 2), threads if variant == "threads" else len(os.environ["OMP_NUM_THREADS"]))
    return answer
"""


@contextmanager
def _worker(folder: Path, variant: str = "threads") -> Iterator[Worker]:
    (folder / "engine.py").write_text(ENGINE)
    worker = Worker(Path(sys.executable), folder / "engine.py", variant, 2, {}, folder / "log")
    try:
        worker.ask("load", task="embed", folder="")
        yield worker
    finally:
        worker.stop()


@pytest.mark.full
def test_a_worker_answers_with_arrays_and_counts_the_time_of_its_children(tmp_path: Path) -> None:
    with _worker(tmp_path) as worker:
        cpu, wall, (array,) = worker.run("embed", ["a", "b", "c"])
        np.testing.assert_array_equal(array, np.full((3, 2), 2, np.float32))
        assert (cpu, wall) < (0.3, 10)
        assert worker.run("embed", ["child"])[0] >= 0.3
    assert "words on stdout" in (tmp_path / "log").read_text()


def test_a_failed_order_is_one_line_without_paths_and_the_worker_goes_on(tmp_path: Path) -> None:
    with _worker(tmp_path) as worker:
        with pytest.raises(PeerError, match=r"^ValueError: in file.py of$"):
            worker.run("embed", ["fail"])
        assert worker.run("embed", ["a"])[2][0].shape == (1, 2)


@pytest.mark.full
def test_a_worker_that_dies_or_hangs_is_an_error(tmp_path: Path) -> None:
    with _worker(tmp_path) as worker:
        with pytest.raises(PeerError, match="ended .exit status 3"):
            worker.run("embed", ["die"])
        with pytest.raises(PeerError, match="ended .exit status 3"):
            worker.run("embed", ["a"])
    with _worker(tmp_path) as worker:
        with pytest.raises(PeerError, match="no answer to 'run' within 1 s"):
            worker.ask("run", task="embed", order=["sleep"], seconds=1)
        assert not worker.alive


@pytest.mark.full
def test_stopping_takes_the_children_too(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    server = Server(("{python}", "-c", code), Path(sys.executable), tmp_path, 1, {}, tmp_path / "log")
    group = server.popen.pid
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


@pytest.mark.full
def test_nothing_outlives_the_benchmark(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    server = Server(("{python}", "-c", code), Path(sys.executable), tmp_path, 1, {}, tmp_path / "log")
    with _worker(tmp_path) as worker:
        for process in (worker, server):
            assert process.popen.stdin is not None
            process.popen.stdin.close()  # what happens when the benchmark is killed
            assert process.popen.wait(PATIENCE) == -signal.SIGTERM
            with pytest.raises(ProcessLookupError):
                for _ in range(300):
                    os.killpg(process.popen.pid, 0)
                    time.sleep(0.1)
    server.stop()


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = ("{python}", "-c", "raise RuntimeError('no model')")
    server = Server(command, Path(sys.executable), tmp_path, 1, {}, tmp_path / "log")
    with pytest.raises(PeerError, match="exit status 1.: RuntimeError: no model"):
        server.wait("/", b"")
    server.stop()


def test_a_run_goes_on_without_the_peer_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine.py").write_text(ENGINE)
    peers = [Peer(name, None, "engine") for name in (CENOTE, "dies")]
    bench = Bench(tmp_path, peers)
    bench.folders = {("embed", "torch"): tmp_path}
    made = Worker

    def worker(peer: Peer, threads: int) -> Worker:
        return made(Path(sys.executable), tmp_path / "engine.py", "threads", threads, {}, tmp_path / peer.name)

    monkeypatch.setattr(bench, "_worker", worker)
    run = Worker.run

    def answer(self: Worker, task: str, order: list[str]) -> tuple[float, float, list[np.ndarray]]:
        dies = self.log.name == "dies" and len(order) > 32
        return run(self, task, ["die"] if dies else order)

    monkeypatch.setattr(Worker, "run", answer)
    bench.run_offline({"embed": {"mixed": ["text"] * 40}}, 1, 2)
    assert [(one["peer"], one["round"]) for one in bench.offline] == [(CENOTE, 0), (CENOTE, 1)]
    (missing,) = bench.missing
    assert (missing["peer"], missing["what"]) == ("dies", "embed, 1 thread, mixed")
    assert "exit status 3" in missing["reason"]


def test_what_is_not_installed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], log: Path) -> None:
        raise PeerError("its environment cannot be made: ERROR: No matching distribution")

    monkeypatch.setattr(envs, "_run", pip)
    monkeypatch.setattr(texts, "models", lambda root: {"embed": root})
    bench = Bench(tmp_path, [peer for peer in PEERS if peer.name in (CENOTE, "Infinity", "TEI", "fastembed")])
    bench.prepare(["embed"])
    assert [peer.name for peer in bench.peers] == [CENOTE]
    reasons = {one["peer"]: one["reason"] for one in bench.missing}
    assert "No matching distribution" in reasons["Infinity"]
    assert "No matching distribution" in reasons["fastembed"]
    assert "no package" in reasons["TEI"]


def test_an_environment_is_made_again_when_its_row_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(envs, "_run", lambda command, log: commands.append(command[1:]))
    for env in (Env("e", ("a==1",)), Env("e", ("a==1",)), Env("e", ("a==2",), torch=False)):
        (tmp_path / "e").mkdir(exist_ok=True)
        monkeypatch.setattr(envs.shutil, "rmtree", lambda *_, **__: None)
        envs.make(env, tmp_path)
    installed = [command[command.index("--quiet") + 1 :] for command in commands if "pip" in command]
    assert installed == [["torch==2.13.0"], ["torch==2.13.0", "a==1"], ["a==2"]]


def test_every_row_names_what_there_is() -> None:
    for peer in PEERS:
        assert peer.absent or (Path(envs.__file__).parent / "engines" / f"{peer.engine.replace('-', '_')}.py").is_file()
        assert peer.env is None or peer.env in ENVS
        assert peer.form == "torch" or peer.form in FORMS
    assert len({peer.name for peer in PEERS}) == len(PEERS)


@pytest.mark.full
def test_texts_have_the_lengths_that_they_promise() -> None:
    folder = embedded()
    made = texts.workloads(folder, 120)
    counts = {name: sorted(texts.tokens(folder, some)) for name, some in made.items()}
    assert {name: len(some) for name, some in made.items()} == {"short": 240, "mixed": 120, "long": 10}
    assert counts["short"][-1] <= 16
    assert (counts["mixed"][0], counts["mixed"][-1]) >= (17, 200)
    assert counts["mixed"][-1] <= 250
    assert counts["long"][0] >= 490
    assert counts["long"][-1] <= 512


def _offline(peer: str, turn: int, seconds: float, threads: int = 1) -> dict[str, object]:
    same = {"task": "embed", "workload": "mixed", "texts": 10}
    return same | {"peer": peer, "round": turn, "threads": threads, "cpu": seconds, "wall": seconds / 2}


def test_ratios_are_within_a_round() -> None:
    seconds = {CENOTE: (1.0, 2.0, 4.0), "other": (2.0, 6.0, 4.0)}
    measured = [_offline(peer, turn, s) for peer, every in seconds.items() for turn, s in enumerate(every)]
    table = figures.offline([*measured, _offline("other", 3, 100.0)], cores=4)["embed"]["mixed"]
    assert table["other"]["cpu_ratio"] == 2.0  # of 2, 3 and 1; the round without Cenote does not count
    assert table[CENOTE] == {"cpu_rate": 5.0, "cpu_ratio": 1.0, "wall_rate": None, "wall_ratio": None}
    (goal, *_) = figures.goals({"embed": {"mixed": {"sentence-transformers torch": {"cpu_ratio": 1.9}}}})
    assert (goal["goal"], goal["measured"]) == (1.85, 1.9)


def test_agreement_is_the_worst_row() -> None:
    wanted = [np.eye(2, dtype=np.float32)]
    got = [np.array([[1, 0], [0.6, 0.8]], np.float32)]
    found = figures.agreement(got, wanted)
    assert found["difference"] == pytest.approx(0.6)
    assert found["cosine"] == pytest.approx(0.8)
    assert figures.agreement([np.eye(3)], wanted)["difference"] is None
    assert figures.agreement([got[0] * np.nan], wanted)["difference"] is None
    assert figures.agreement([np.ones(2)], [np.zeros(2)]) == {"difference": 1.0, "cosine": None}


ANSWER = b'{"data": [{"id": "model"}]}'
"""An answer about models, and one without vectors."""


@contextmanager
def _slow_server(seconds: float, status: int = 200) -> Iterator[int]:
    """Answers each POST after `seconds` with `status`, and says at once that it serves "model"."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(seconds)
            self._answer(status)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(ANSWER)))
            self.end_headers()
            self.wfile.write(ANSWER)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def counted(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement with answers: on a machine that stands still for half a second there are none."""
    deadline = time.monotonic() + PATIENCE
    while not (found := measure())["latencies"]:
        assert time.monotonic() < deadline, "no answers at all"
    return found


@contextmanager
def _clients(port: int) -> Iterator[Clients]:
    clients = Clients(port, "model")
    try:
        yield clients
    finally:
        clients.stop()


@pytest.mark.full
def test_load_counts_answers_and_measures_from_the_arrival() -> None:
    with _slow_server(0.05) as port, _clients(port) as side:
        found = counted(lambda: side.closed(["text"], clients=4, seconds=0.5))
        assert 1 <= len(found["latencies"]) <= 4 * 11  # 0.5 s, in which each client waits 0.05 s for an answer
        assert found["rate"] == len(found["latencies"]) / 0.5
        assert min(found["latencies"]) >= 0.05
        found = side.opened(["text"], rate=200, seconds=0.5, seed=0)
        assert 60 <= len(found["latencies"]) <= 140  # 4 clients that wait could not send these
        assert found["rate"] == len(found["latencies"]) / 0.5
        assert min(found["latencies"]) >= 0.05


def test_load_reports_what_a_server_refuses() -> None:
    with _slow_server(0, 503) as port, _clients(port) as side:
        for measure in (partial(side.closed, clients=2), partial(side.opened, rate=100, seed=0)):
            began = time.monotonic()
            with pytest.raises(PeerError, match="was answered with 503"):
                measure(["text"], seconds=0.1)
            assert time.monotonic() - began < load.PATIENCE, "refused at once, not waited for"
        with pytest.raises(PeerError, match="does not serve 'another', but model"):
            Clients(port, "another")
    with pytest.raises(PeerError, match="Connection refused"):
        Clients(port, "model")


def test_an_answer_of_a_server_is_its_body_or_the_reason(tmp_path: Path) -> None:
    server = Server(("{python}", "-c", ""), Path(sys.executable), tmp_path, 1, {}, tmp_path / "log")
    server.stop()
    with pytest.raises(PeerError, match="refused"):
        server.post("/", b"{}")
    with _slow_server(0) as server.port:
        assert server.post("/", b"{}") == ANSWER
    with _slow_server(0, 503) as server.port, pytest.raises(PeerError, match="answered 503: .*model"):
        server.post("/", b"{}")
