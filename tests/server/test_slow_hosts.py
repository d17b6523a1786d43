"""Hosts that are slow: requests without pictures are answered meanwhile, and what a request may wait for is bounded."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import ServerConfig
from cenote.server import arrivals
from cenote.server.admission import RENDER_THREADS
from cenote.server.app import build
from tests import PATIENCE, pictured
from tests.conftest import error
from tests.pictured import noise, saved, url

if TYPE_CHECKING:
    from collections.abc import Iterator

A, B = noise(90, 130), noise(64, 64)


class Pages(BaseHTTPRequestHandler):
    """A host of two pictures, the second of which arrives when the test says so."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith("/slow"):
            self.server.may_answer.wait(PATIENCE)  # type: ignore[attr-defined]
        content = saved(B if self.path.startswith("/slow") else A)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Host(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Pages)
        self.paths: list[str] = []
        self.may_answer = threading.Event()
        self.place = f"127.0.0.1:{self.server_port}"


@pytest.fixture(scope="module")
def running() -> Iterator[Host]:
    with Host() as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield host
        host.shutdown()


@pytest.fixture
def host(running: Host) -> Iterator[Host]:
    running.paths.clear()
    running.may_answer.clear()
    yield running
    running.may_answer.set()


@pytest.fixture(scope="module")
def client(running: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    options = ServerConfig(allowed_media_domains=(running.place,), allow_private_media=True)
    llm = LLM(str(pictured.clip(tmp_path_factory.mktemp("slow") / "clip")))
    with TestClient(build([llm._service], options), raise_server_exceptions=False) as client:
        yield client
    llm.close()


def vectors(client: TestClient, *sources: str) -> np.ndarray:
    answer = client.post("/v2/embed", json={"images": [*sources]})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["embeddings"]["float"])


def test_slow_hosts_hold_up_nobody_else(client: TestClient, host: Host) -> None:
    """More requests wait for hosts than there are render threads, and others are rendered, with pictures as well."""
    with ThreadPoolExecutor(2 * RENDER_THREADS) as pool:
        slow = [
            pool.submit(vectors, client, f"http://{host.place}/slow/{i}", f"http://{host.place}/a")
            for i in range(2 * RENDER_THREADS)
        ]
        deadline = time.monotonic() + PATIENCE
        while sum(path.startswith("/slow") for path in host.paths) < len(slow):
            assert time.monotonic() < deadline, host.paths
            time.sleep(0.01)
        plain = vectors(client, url(saved(A)))
        assert np.abs(vectors(client, f"http://{host.place}/a") - plain).max() < 1e-6
        answer = client.post("/tokenize", json={"prompt": "a page " * 100})
        assert answer.json()["count"] > 100
        assert not any(future.done() for future in slow)
        host.may_answer.set()
        expected = np.concatenate([vectors(client, url(saved(B))), plain])
        for future in slow:
            assert np.abs(future.result(PATIENCE) - expected).max() < 1e-6


def test_a_picture_is_fetched_once_for_a_request(client: TestClient, host: Host) -> None:
    vectors(client, *[f"http://{host.place}/a"] * 3, f"http://{host.place}/b")
    assert sorted(host.paths) == ["/a", "/b"]


def test_tokenize_fetches_pictures_too(client: TestClient, host: Host) -> None:
    part = {"type": "image_url", "image_url": {"url": f"http://{host.place}/a"}}
    answer = client.post("/tokenize", json={"messages": [{"role": "user", "content": [part]}]})
    assert answer.json()["count"] == pictured.CLIP_TOKENS


def test_a_request_waits_and_holds_so_much(client: TestClient, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"images": [f"http://{host.place}/slow/{i}" for i in range(20)]}
    monkeypatch.setattr(arrivals, "MOST_SECONDS", 0.5)
    found = error(client, body, "/v2/embed")
    assert (found["code"], "within 0.5 seconds" in found["message"]) == (422, True)
    assert len(host.paths) == arrivals.AT_ONCE
    host.may_answer.set()
    monkeypatch.setattr(arrivals, "MOST_SECONDS", PATIENCE)
    monkeypatch.setattr(arrivals, "MOST_BYTES", 3 * len(saved(B)))
    found = error(client, body, "/v2/embed")
    assert (found["code"], "more than" in found["message"]) == (400, True)
    assert error(client, {"images": ["http://elsewhere.test/a", *body["images"]]}, "/v2/embed")["code"] == 400
