"""A server in a process that may have few open files, and clients that want more connections."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests import PATIENCE

pytestmark = pytest.mark.full  # interpreters of their own
SCRIPT = """
import logging, resource, socket, sys
limit, honest = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
from cenote.config import ServerConfig
from cenote.server import connections
from cenote.server.app import Application
from cenote.server.dialects import operations

logging.basicConfig(level="INFO")
config = ServerConfig()
limits = connections.Limits.of(config, limit if honest else 100_000)
app = Application([], config, [operations.DIALECT])
listener = socket.create_server(("127.0.0.1", 0), backlog=512)
server = connections.Server(connections.configured(app, limits, access_log=False))
print(listener.getsockname()[1], limits.connections, limits.spare, flush=True)
server.run([listener])
"""
LIMIT, CLIENTS = 100, 300
HEALTH = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


def status(client: socket.socket) -> bytes:
    """Return the status of an answer, or nothing if the connection ends without."""
    with suppress(ConnectionResetError):
        return client.recv(4096)[9:12]
    return b""


def health(port: int) -> bytes:
    """Return the status of a health check on a connection of its own; see `status`."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        with suppress(ConnectionError):
            client.sendall(HEALTH)
        return status(client)


def cpu(process: int) -> float:
    """Return the CPU seconds of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.parametrize("honest", [True, False], ids=["limited", "exhausted"])
def test_a_server_outlives_more_clients_than_it_may_have_files(honest: bool) -> None:
    """Of its own limit, which leaves descriptors; and where others took them, so that accepting fails."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(LIMIT), str(int(honest))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port, served, spare = map(int, process.stdout.readline().split())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft >= CLIENTS + 100, hard
        with ExitStack() as opened:
            clients = [
                opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
                for _ in range(CLIENTS)
            ]
            open_files = Path(f"/proc/{process.pid}/fd")
            if honest:
                for client in clients:
                    with suppress(ConnectionError):
                        client.sendall(HEALTH)
                statuses = [status(client) for client in clients]
                assert statuses.count(b"200") == served + spare, "health is told to all that are answered"
                assert statuses.count(b"") == CLIENTS - served - spare
                assert len([*open_files.iterdir()]) < LIMIT
            else:
                while len([*open_files.iterdir()]) < LIMIT - 1:
                    time.sleep(0.01)
                clients[0].sendall(HEALTH)
                assert status(clients[0]) == b"200"
            before = cpu(process.pid)
            time.sleep(1)
            assert cpu(process.pid) - before < 0.5, "it does not spin"
        deadline = time.monotonic() + PATIENCE
        while health(port) != b"200":  # it has to notice that the clients are gone
            assert time.monotonic() < deadline
        assert process.poll() is None
    finally:
        process.terminate()
        _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode in (0, -15), log
    assert len(log.splitlines()) < 40, log
