"""Signals that end a server, and the exit status, over an application without a model."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests import PATIENCE

pytestmark = pytest.mark.full  # interpreters of their own
SCRIPT = """
import logging, signal, socket, sys
for number in map(int, sys.argv[1:]):
    signal.signal(number, signal.SIG_DFL)
import uvicorn
from cenote.config import ServerConfig
from cenote.server import connections, ending
from cenote.server.app import Application
from cenote.server.dialects import operations

logging.basicConfig(level="INFO")
config = ServerConfig()
app = Application([], config, [operations.DIALECT])
protocol = connections.limited(connections.Limits.of(config, 1000))
listener = socket.create_server(("127.0.0.1", 0))
server = ending.Server(uvicorn.Config(app, http=protocol, log_config=None), app, 3600)
server.take_signals()
print(listener.getsockname()[1], flush=True)
server.run([listener])
ending.ignore_signals()
print("ended", flush=True)
sys.stdin.read()
sys.exit(server.status)
"""
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HALF = b"POST /unknown HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab"


class Process:
    """The script, and a connection to its server.

    Args:
        command: before that of the script.
        heard: signals that the script does not ignore, even if the tests run where they are ignored.
    """

    def __init__(self, command: list[str], heard: tuple[signal.Signals, ...]) -> None:
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", SCRIPT, *(str(int(number)) for number in heard)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def connect(self, content: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall(content)
        return connection

    def is_well(self) -> bool:
        with self.connect(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n") as connection:
            return connection.recv(100).startswith(b"HTTP/1.1 200")

    def wait_for(self, text: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text in line:
                return
        raise AssertionError(f"never said {text}")

    def end(self) -> tuple[int, str]:
        """Exit status and the rest of the log. A signal that comes late changes nothing."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ended\n"
        for number in ALL:
            self.process.send_signal(number)
        _, log = self.process.communicate("", timeout=PATIENCE)
        return self.process.returncode, log


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def begin(*command: str, heard: tuple[signal.Signals, ...] = ALL) -> Process:
        processes.append(Process([*command], heard))
        return processes[-1]

    yield begin
    for process in processes:
        process.process.kill()
        process.process.communicate()


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGHUP, 0),
        (signal.SIGINT, 130),
    ],
    ids=str,
)
def test_one_signal_lets_requests_finish_and_a_second_ends_them(
    start: Callable[..., Process], number: signal.Signals, status: int
) -> None:
    process = start()
    assert process.is_well()
    half = process.connect(HALF)
    assert process.is_well()
    process.process.send_signal(number)
    process.wait_for("Waiting for connections to close")
    assert process.process.poll() is None, "a request is under way"
    process.process.send_signal(number)
    assert half.recv(100).startswith(b"HTTP/1.1 503")
    half.close()
    found, log = process.end()
    assert found == status
    assert "Traceback" not in log


def test_a_signal_that_the_parent_ignores_stays_ignored(start: Callable[..., Process]) -> None:
    process = start("nohup", heard=(signal.SIGINT, signal.SIGTERM))
    process.process.send_signal(signal.SIGHUP)
    assert process.is_well()
    process.process.send_signal(signal.SIGTERM)
    assert process.end()[0] == 0
