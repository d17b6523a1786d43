"""Connections over real sockets: how many there are, how large heads are, and how long one waits for clients."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from cenote import metrics
from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server import connections
from cenote.server.app import build
from tests import PATIENCE
from tests.conftest import INFO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

BODY = json.dumps({"input": "a"}).encode()


class Running:
    """A server on a thread, over an engine that answers when it is told to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, descriptors: int, **options: Any) -> None:
        self.engine = FakeEngine(INFO)
        config = ServerConfig(**options)
        app = build([Service(self.engine, Renderer(tokenizer, INFO), ("fake",))], config)
        self.limits = connections.Limits.of(config, descriptors)
        self.server = connections.Server(connections.configured(app, self.limits, access_log=False))
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self._thread.start()
        self._open = ExitStack()

    def connect(self, *parts: bytes) -> socket.socket:
        client = self._open.enter_context(socket.create_connection(self.listener.getsockname(), timeout=PATIENCE))
        for part in parts:
            client.sendall(part)
        return client

    @property
    def count(self) -> int:
        return len(self.server.server_state.connections)

    def stop(self) -> None:
        self.engine.release()
        self._open.close()
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., Running]]:
    with ExitStack() as stack:

        @contextmanager
        def running(descriptors: int, **options: Any) -> Iterator[Running]:
            server = Running(tokenizer, descriptors, **options)
            yield server
            server.stop()

        yield lambda descriptors=100_000, **options: stack.enter_context(running(descriptors, **options))


def head(*headers: str, length: int = len(BODY), path: str = "/v1/embeddings") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


REQUEST = head() + BODY


def answer(client: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and body of one answer."""
    with client.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
        return status, headers, json.loads(stream.read(int(headers["content-length"])))


def is_closed(client: socket.socket) -> bool:
    """Wait until the server closes a connection, in good order or not."""
    try:
        while client.recv(65_536):
            pass
    except ConnectionResetError:
        pass
    return True


def refused(reason: str) -> float:
    return float(metrics.refusals_of(reason)._value.get())


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_another_protocol_is_not_spoken_and_not_logged(
    run: Callable[..., Running], caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    wish = [
        "Host: a",
        "Connection: Upgrade",
        f"Upgrade: {protocol}",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: eA==",
    ]
    client = run().connect("\r\n".join(["GET /version HTTP/1.1", *wish, "", ""]).encode())
    status, _, body = answer(client)
    assert (status, list(body)) == (200, ["version"])
    assert not [entry for entry in caplog.records if entry.levelname == "WARNING"]


OFFER = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
"""Headers of Java's HttpClient, unless it is told to speak HTTP/1.1."""


def chunked(*headers: str, size: int = 7, end: bytes = b"0\r\n\r\n") -> bytes:
    """A request whose body comes in chunks."""
    text = "\r\n".join(["POST /v1/embeddings HTTP/1.1", "Host: a", "Transfer-Encoding: chunked", *headers, "", ""])
    chunks = [BODY[at : at + size] for at in range(0, len(BODY), size)]
    return b"".join([text.encode(), *(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks), end])


@pytest.mark.parametrize("request_bytes", [head(*OFFER) + BODY, chunked(*OFFER)], ids=["length", "chunks"])
@pytest.mark.parametrize("pause", [False, True])
def test_the_body_of_a_request_that_offers_another_protocol_is_read(
    run: Callable[..., Running], request_bytes: bytes, pause: bool
) -> None:
    server = run()
    at = request_bytes.index(b"\r\n\r\n") + 4
    for _ in range(2):
        client = server.connect(*([request_bytes[:at]] if pause else [request_bytes]))
        if pause:
            assert answer(server.connect(REQUEST))[0] == 200, "the server has seen the head alone"
            client.sendall(request_bytes[at:])
        status, headers, body = answer(client)
        assert (status, len(body["data"])) == (200, 1)
        assert "upgrade" not in headers
        client.sendall(request_bytes)
        assert answer(client)[0] == 200, "the connection goes on"


def test_requests_that_offer_another_protocol_are_answered_in_order(run: Callable[..., Running]) -> None:
    server = run()
    probe = "\r\n".join(["GET /version HTTP/1.1", "Host: a", *OFFER, "", ""]).encode()
    client = server.connect((head(*OFFER) + BODY + probe) * 20 + REQUEST)
    with client.makefile("rb") as stream:
        for expected in [200] * 41:
            assert int(stream.readline().split()[1]) == expected
            headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
            stream.read(int(headers["content-length"]))
    assert len(server.engine.submitted) == 21


def test_a_head_that_offers_another_protocol_has_the_same_limits(run: Callable[..., Running]) -> None:
    server = run(max_header_count=20, max_header_bytes=2048)
    for headers, option in (
        ([f"X-{i}: {i}" for i in range(18)], "more than 20 headers (--max-header-count)"),
        ([f"X-Long: {'x' * 3000}"], "more than 2048 bytes (--max-header-bytes)"),
    ):
        client = server.connect(head(*headers, *OFFER) + BODY)
        status, found, body = answer(client)
        assert (status, found["connection"]) == (431, "close")
        assert option in body["error"]["message"]
        assert is_closed(client)
    assert not server.engine.submitted


@pytest.mark.parametrize(
    "end",
    [b"0\r\nT: " + b"a" * 400_000, b"0;" + b"x" * 400_000, b"0\r\n" + b"T: a\r\n" * 50_000],
    ids=["value", "extension", "many"],
)
def test_headers_behind_a_body_have_the_limit_of_those_before_it(run: Callable[..., Running], end: bytes) -> None:
    server = run(max_header_bytes=2048, max_header_count=100_000)
    client = server.connect(chunked(end=end))
    status, found, body = answer(client)
    assert (status, found["connection"]) == (431, "close")
    assert "headers behind the body have more than 2048 bytes (--max-header-bytes)" in body["error"]["message"]
    assert is_closed(client)
    assert not server.engine.submitted


def test_headers_behind_a_body_are_read_and_so_are_small_chunks(run: Callable[..., Running]) -> None:
    server = run(max_header_bytes=1024)
    client = server.connect()
    for _ in range(20):
        for part in chunked(size=1, end=b"0\r\nT: a\r\n\r\n").splitlines(keepends=True):
            client.sendall(part)
        assert answer(client)[0] == 200


@pytest.mark.parametrize("request_line", [b"GET", b"NONE / HTTP/1.1", b"GET / HTTP/9.9", b"\x16\x03\x01"], ids=repr)
def test_what_is_no_request_is_answered_and_not_logged(
    run: Callable[..., Running], caplog: pytest.LogCaptureFixture, request_line: bytes
) -> None:
    client = run().connect(request_line + b"\r\n\r\n")
    assert client.recv(65_536).startswith(b"HTTP/1.1 400 ")
    assert is_closed(client)
    assert not [entry for entry in caplog.records if entry.levelname == "WARNING"]


def test_connections_beyond_the_limit_are_answered_503(run: Callable[..., Running]) -> None:
    server = run(max_connections=3)
    before = refused("connections")
    served = [server.connect(REQUEST) for _ in range(3)]
    assert [answer(client)[0] for client in served] == [200] * 3
    for _ in range(5):
        status, headers, body = answer(server.connect(REQUEST))
        assert status == 503
        assert headers["connection"] == "close"
        assert int(headers["retry-after"]) >= 1
        assert "at most 3 are served (--max-connections)" in body["error"]["message"]
    assert refused("connections") == before + 5
    probe = server.connect(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert probe.recv(100).startswith(b"HTTP/1.1 200"), "who asks for its health is told"
    for client in served[1:]:
        client.sendall(REQUEST)
        assert answer(client)[0] == 200, "those that are served go on"
    assert len(server.engine.submitted) == 5


def test_the_refusal_of_a_connection_has_the_shape_of_its_dialect(run: Callable[..., Running]) -> None:
    server = run(max_connections=1)
    server.connect(REQUEST)
    status, _, body = answer(server.connect(head(path="/v2/embed") + BODY))
    assert status == 503
    assert "--max-connections" in str(body)


def test_more_connections_still_are_closed_at_once(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "SPARE", 2)
    server = run(max_connections=2)
    held = [server.connect(REQUEST[:20]) for _ in range(4)]
    held[0].sendall(REQUEST[20:])
    assert answer(held[0])[0] == 200, "the server has seen the others before"
    before = refused("connections")
    assert is_closed(server.connect(REQUEST))
    assert server.count == 4
    assert refused("connections") == before + 1
    assert "connections closed at once: 1" in caplog.text


def test_connections_leave_descriptors_for_others() -> None:
    config = ServerConfig(max_connections=5000)
    for descriptors, expected in ((100_000, 5000), (1024, 512), (600, 172), (128, 32), (10, 3)):
        assert connections.Limits.of(config, descriptors).connections == expected
    assert connections.descriptors() >= 1024


@pytest.mark.parametrize("sent", [b"", REQUEST[:30], REQUEST[:-40]], ids=["nothing", "half a line", "half a head"])
def test_a_head_that_does_not_come_is_not_waited_for(run: Callable[..., Running], sent: bytes) -> None:
    server = run(header_timeout=0.2)
    clients = [server.connect(sent) for _ in range(20)]
    if sent:
        status, headers, body = answer(clients[0])
        assert (status, headers["connection"]) == (408, "close")
        assert "took more than 0.2 s (--header-timeout)" in body["error"]["message"]
    assert all(map(is_closed, clients))
    assert answer(server.connect(REQUEST))[0] == 200


def test_a_connection_between_requests_may_be_idle_for_longer(run: Callable[..., Running]) -> None:
    server = run(header_timeout=0.2)
    client = server.connect(REQUEST)
    assert answer(client)[0] == 200
    assert is_closed(server.connect()), "more than a look at the clock later"
    client.sendall(REQUEST)
    assert answer(client)[0] == 200
    client.sendall(b"\r\n")
    assert is_closed(client), "a line feed begins a head"


def test_a_body_that_does_not_come_is_not_waited_for(run: Callable[..., Running]) -> None:
    server = run(body_timeout=0.2)
    for part in (b"", BODY[:5]):
        status, _, body = answer(server.connect(head() + part))
        assert status == 408
        assert f"of the body, {len(part)} bytes came in" in body["error"]["message"]
        assert "--body-timeout" in body["error"]["message"]
    assert answer(server.connect(REQUEST))[0] == 200
    assert len(server.engine.submitted) == 1


def test_a_request_that_runs_is_not_slow(run: Callable[..., Running]) -> None:
    server = run(body_timeout=0.2, header_timeout=0.2)
    server.engine.held = True
    client = server.connect(REQUEST + REQUEST[:40])
    assert is_closed(server.connect()), "more than a look at the clock later"
    server.engine.held = False
    server.engine.release()
    assert answer(client)[0] == 200


@pytest.mark.parametrize(
    ("request_line", "headers"),
    [
        ("/v1/embeddings", [f"X-Long: {'x' * 3000}"]),
        ("/v1/embeddings?" + "x" * 3000, []),
        ("/v1/embeddings", [f"X-{i}: {i}" for i in range(200)]),
    ],
    ids=["header", "address", "many headers"],
)
@pytest.mark.parametrize("pause", [False, True])
def test_a_head_that_is_too_large_is_refused(
    run: Callable[..., Running], request_line: str, headers: list[str], pause: bool
) -> None:
    server = run(max_header_bytes=2048)
    request = head(*headers, path=request_line) + BODY
    client = server.connect(*([request[:1000], request[1000:]] if pause else [request]))
    status, found, body = answer(client)
    assert (status, found["connection"]) == (431, "close")
    assert "more than 2048 bytes (--max-header-bytes)" in body["error"]["message"]
    client.sendall(b"x" * 200_000)
    assert not server.engine.submitted


def test_too_many_headers_are_refused(run: Callable[..., Running]) -> None:
    server = run(max_header_count=20)
    assert answer(server.connect(head(*[f"X-{i}: {i}" for i in range(17)]) + BODY))[0] == 200
    status, _, body = answer(server.connect(head(*[f"X-{i}: {i}" for i in range(18)]) + BODY))
    assert status == 431
    assert "more than 20 headers (--max-header-count)" in body["error"]["message"]


def test_the_limit_of_heads_is_not_one_of_bodies(run: Callable[..., Running]) -> None:
    server = run(max_header_bytes=2048)
    body = json.dumps({"input": "a", "user": "x" * 200_000}).encode()
    client = server.connect(head(length=len(body)) + body + REQUEST * 3)
    assert answer(client)[0] == 200


def test_requests_that_are_sent_at_once_are_answered_in_order(run: Callable[..., Running]) -> None:
    server = run(max_header_bytes=1024)
    client = server.connect(REQUEST * 50)
    with client.makefile("rb") as stream:
        for _ in range(50):
            assert b" 200 " in stream.readline()
            headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
            stream.read(int(headers["content-length"]))


@pytest.mark.parametrize("others", [b"", REQUEST, REQUEST * 3, REQUEST[:40]], ids=["none", "one", "many", "half"])
def test_a_client_that_leaves_is_noticed_whatever_it_has_sent_besides(
    run: Callable[..., Running], caplog: pytest.LogCaptureFixture, others: bytes
) -> None:
    server = run()
    server.engine.held = True
    client = server.connect(REQUEST + others)
    deadline = threading.Event()
    while not server.engine.submitted:
        deadline.wait(0.01)
    client.close()
    end = time.monotonic() + PATIENCE
    while metrics.running_requests._value.get() and time.monotonic() < end:
        deadline.wait(0.05)
    server.engine.held = False
    server.engine.release()
    assert answer(server.connect(REQUEST))[0] == 200
    assert len(server.engine.submitted) == 2, "the request that ran, and the one of the other client"
    assert metrics.running_requests._value.get() == 0
    assert metrics.requests_of("/v1/embeddings", 499)._value.get() >= 1
    assert not [entry for entry in caplog.records if entry.levelname == "ERROR"]


def test_a_refusal_of_a_body_that_is_sent_at_once_can_be_read(run: Callable[..., Running]) -> None:
    server = run(max_body_bytes=1000)
    client = server.connect(head(length=3_000_000))
    sender = threading.Thread(target=client.sendall, args=(b"x" * 3_000_000,))
    sender.start()
    assert answer(client)[0] == 413
    sender.join(PATIENCE)


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [("POST /ping", 200), ("GET /version", 200), ("PUT /v1/embeddings", 405), ("POST /none", 404)],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_no_route_reads_is_no_reset(
    run: Callable[..., Running], request_line: str, expected: int, is_chunked: bool
) -> None:
    server = run()
    size = 3_000_000
    frame = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {size}"
    content = b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"x" * size) if is_chunked else b"x" * size
    client = server.connect(f"{request_line} HTTP/1.1\r\nHost: a\r\n{frame}\r\n\r\n".encode())
    sender = threading.Thread(target=client.sendall, args=(content,))
    sender.start()
    with client.makefile("rb") as stream:
        assert int(stream.readline().split()[1]) == expected
        headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
        stream.read(int(headers["content-length"]))
    sender.join(PATIENCE)
    client.sendall(REQUEST)
    assert answer(client)[0] == 200, "the connection goes on"


def test_a_body_that_no_route_reads_is_not_waited_for(run: Callable[..., Running]) -> None:
    client = run().connect(b"POST /ping HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")
    assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert is_closed(client)


def test_a_client_that_does_not_read_is_not_waited_for(run: Callable[..., Running]) -> None:
    server = run(idle_timeout=0.5)
    client = server.connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    many = json.dumps({"input": ["one two three"] * 2000}).encode()
    client.sendall((head(length=len(many)) + many) * 40)
    other = server.connect(REQUEST)
    assert answer(other)[0] == 200
    deadline = threading.Event()
    while server.count > 1 and not deadline.wait(0.1):
        pass
    assert server.count <= 1
