"""A server whose device hangs or whose device thread dies: all are answered, and the process ends with an error."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import pytest
import requests

from cenote.server.serving import SHORT
from tests import PATIENCE, checkpoints
from tests.forked import Forked
from tests.trouble import LONG, STUCK

if TYPE_CHECKING:
    from pathlib import Path

TROUBLE = "word " * (LONG + 10)


class Server:
    """A `cenote` command, and its log."""

    def __init__(self, process: Forked | subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    @classmethod
    def of(cls, kind: str, *arguments: str) -> Self:
        """Start one whose model has trouble; see `tests.trouble`."""
        return cls(Forked("tests.trouble", kind, *arguments))

    def until(self, words: str) -> str:
        """Read the log until a line has these words; return the line."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if words in line:
                return line
        raise AssertionError(f"ended with {self.process.wait(PATIENCE)}: {''.join(self.lines)}")

    def address(self) -> str:
        """Wait until it serves; return its URL."""
        return self.until("serving http://").split("serving ")[1].split(",")[0]

    def rest(self) -> str:
        """Wait for the end; return the whole log."""
        assert self.process.stderr is not None
        with self.process.stderr as log:
            self.lines += log
        self.process.wait(PATIENCE)
        return "".join(self.lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT that takes the long inputs which mean trouble."""
    tokenizer = checkpoints.wordpiece(model_max_length=1024)
    return str(checkpoints.bert(tmp_path_factory.mktemp("tiny"), tokenizer=tokenizer, max_position_embeddings=1024))


def post(url: str, text: Any) -> requests.Response:
    return requests.post(f"{url}/v1/embeddings", json={"input": text}, timeout=PATIENCE)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "status"), [("hangs", 503), ("dies", 500)])
def test_a_lost_device_ends_the_server_with_an_error(kind: str, status: int, folder: str) -> None:
    server = Server.of(kind, "serve", folder, "--port", "0", "--forward-timeout", "2")
    url = server.address()
    assert post(url, "well").status_code == 200
    with ThreadPoolExecutor(4) as pool:
        lost = pool.submit(post, url, TROUBLE)
        time.sleep(0.3)
        answer = lost.result(PATIENCE)
    assert answer.status_code == status
    assert ("Retry-After" in answer.headers) == (status == 503)
    log = server.rest()
    assert server.process.returncode == 1, log
    assert ("the device hangs" if kind == "hangs" else "the device thread died") in log


@pytest.mark.full
def test_an_engine_that_is_lost_ends_its_process_and_its_server_goes_on(tmp_path: Path, folder: str) -> None:
    path = str(tmp_path / "socket")
    engine = Server.of("hangs", "engine", folder, "--listen", path, "--forward-timeout", "2")
    engine.until("listening on")
    command = [sys.executable, "-m", "cenote", "serve", "--engine", path, "--port", "0"]
    front = Server(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    url = front.address()
    try:
        assert post(url, TROUBLE).status_code == 503
        log = engine.rest()
        assert engine.process.returncode == 1, log
        assert post(url, "well").status_code == 503
        assert requests.get(f"{url}/health", timeout=PATIENCE).status_code == 503
    finally:
        front.process.terminate()
        front.rest()


@pytest.mark.full
def test_a_render_thread_that_hangs_does_not_keep_a_server_from_its_end() -> None:
    """Of requests that are long enough for such a thread; the other one goes on."""
    server = Server.of("renders", "serve", "--port", "0", "--auto-truncate", "--shutdown-timeout", "1")
    url = server.address()
    long = "word " * SHORT
    with ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(post, url, f"{STUCK} {long}")
        assert [post(url, long).status_code for _ in range(3)] == [200] * 3
        assert requests.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        assert not stuck.done()
        server.process.terminate()
        answer = stuck.result(PATIENCE)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the server is shutting down")
    log = server.rest()
    assert server.process.returncode == 1, log
    assert "a render thread hangs" in log
    assert "does not end by itself" not in log, "the last resort is not needed"


def test_a_text_that_fails_does_not_fail_others_or_show_internals(folder: str) -> None:
    server = Server.of("raises", "serve", folder, "--port", "0")
    url = server.address()
    texts = [TROUBLE if i % 4 == 0 else f"text number {i}" for i in range(64)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: post(url, text), texts))
    assert [answer.status_code for answer in answers] == [500 if i % 4 == 0 else 200 for i in range(64)]
    assert "neighbour" not in answers[0].text
    assert "srv" not in answers[0].text
    assert requests.get(f"{url}/health", timeout=PATIENCE).status_code == 200
    server.process.terminate()
    log = server.rest()
    assert server.process.returncode == 0
    assert log.count("Traceback") == 1
    lines = [line for line in log.splitlines() if "ERROR" in line or "failed" in line]
    assert len(lines) == 1, "16 of them failed, and all are counted with the first"
