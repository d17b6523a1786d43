"""A peer's process as the benchmark sees it: a worker that answers orders, or a server that answers requests."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.envs import PeerError
from benchmarks.peers.worker import read, write

HERE = Path(__file__).parent
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 600, 600, 20


class Process:
    """A peer's `worker.py` with everything that it starts: stopped together, its words in a log.

    Args:
        python: the Python that runs it.
        arguments: of `worker.py`.
        threads: what OpenMP, MKL and Rayon may use.
        environment: more variables.
        log: file that gets what is printed.
    """

    def __init__(
        self, python: Path, arguments: list[str], threads: int, environment: dict[str, str], log: Path
    ) -> None:
        self.log = log
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
            variables[name] = str(threads)
        if str(python) != sys.executable:
            variables.pop("PYTHONPATH", None)
        with log.open("wb") as words:
            self.popen = subprocess.Popen(
                [str(python), "-P", str(HERE / "worker.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env={**variables, **environment},
                start_new_session=True,  # a group of its own, which `stop` can end as a whole
            )

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.popen.poll() is None

    def died(self) -> PeerError:
        """The error that says how it ended."""
        code = self.popen.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if "Error" in line] or lines
        return PeerError(f"its process ended ({how}){': ' + said[-1] if said else ''}")

    def stop(self) -> None:
        """Ask the whole group to end, and end what is left of it."""
        for pipe in (self.popen.stdin, self.popen.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.popen.pid, kind)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + STOP_SECONDS
            while _group_lives(self.popen) and time.monotonic() < deadline:
                time.sleep(0.05)
        self.popen.wait()


def _group_lives(popen: subprocess.Popen[bytes]) -> bool:
    popen.poll()  # a child that has ended and is not waited for still counts as one of its group
    try:
        os.killpg(popen.pid, 0)
    except ProcessLookupError:
        return False
    return True


class Worker(Process):
    """An engine in its own Python, answering one order after the other.

    Args:
        python: the Python of the peer's environment.
        engine: path of the engine's file.
    """

    def __init__(
        self, python: Path, engine: Path, variant: str, threads: int, environment: dict[str, str], log: Path
    ) -> None:
        super().__init__(python, [str(engine), variant, str(threads)], threads, environment, log)

    def ask(self, do: str, *, seconds: float = ANSWER_SECONDS, **details: Any) -> dict[str, Any]:
        """Give an order and wait for the answer.

        Raises:
            PeerError: the order failed, took longer than `seconds`, or the process ended; a late process is stopped.
        """
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        try:
            write(self.popen.stdin, {"do": do, **details})
        except BrokenPipeError:
            raise self.died() from None
        deadline = time.monotonic() + seconds
        while not select.select([self.popen.stdout], [], [], 0.5)[0]:
            if not self.alive:
                raise self.died()
            if time.monotonic() > deadline:
                self.stop()
                raise PeerError(f"no answer to {do!r} within {seconds:.0f} s")
        try:
            answer = read(self.popen.stdout)
        except EOFError:
            raise self.died() from None
        if "error" in answer:
            raise PeerError(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result

    def run(self, task: str, order: Any) -> tuple[float, float, list[np.ndarray]]:
        """CPU seconds, wall seconds and the arrays that answer `order`."""
        answer = self.ask("run", task=task, order=order)
        arrays = [np.frombuffer(content, "<f4").reshape(shape) for shape, content in answer["arrays"]]
        return answer["cpu"], answer["wall"], arrays


class Server(Process):
    """A peer's HTTP server on a free port of this machine.

    Args:
        command: with {python}, {folder} and {port}.
    """

    def __init__(
        self, command: tuple[str, ...], python: Path, folder: Path, threads: int, environment: dict[str, str], log: Path
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        known = {"python": str(python), "folder": str(folder), "port": str(self.port)}
        parts = [part.format(**known) for part in command]
        super().__init__(python, ["--serve", *parts], threads, environment, log)

    def post(self, path: str, body: bytes, seconds: float = ANSWER_SECONDS) -> bytes:
        """Return the answer to `body`.

        Raises:
            PeerError: there is none within `seconds`, or its status is not 200.
        """
        connection = HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, HTTPException) as error:
            raise PeerError(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise PeerError(f"it answered {answer.status}: {content[:200].decode(errors='replace')}")
        return content

    def wait(self, path: str, body: bytes, seconds: float = START_SECONDS) -> None:
        """Wait until it answers `body` with 200.

        Raises:
            PeerError: it ended, refused the request, or took longer than `seconds`.
        """
        deadline, last = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            if not self.alive:
                raise self.died()
            try:
                self.post(path, body, seconds)
            except PeerError as error:  # perhaps it does not listen yet
                last = str(error)
                time.sleep(0.25)
            else:
                return
        raise PeerError(f"its server was not ready within {seconds:.0f} s: {last}")
