"""The benchmark of overload counts what becomes of each request; it is not timed here."""

from __future__ import annotations

import asyncio
import itertools

from benchmarks.overload import Flood, Load, contents

ANSWERS = {
    "good": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "refused": b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 6\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
}
"""Answers; to anything else the connection is closed."""


async def flood(kinds: tuple[str, ...]) -> tuple[Flood, int]:
    """Send requests to a server that answers each as its path says; return also its number of connections."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while kind := (await reader.readline()).decode().strip():
            if kind not in ANSWERS:
                break
            writer.write(ANSWERS[kind])
            if kind == "refused":
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        requests = (f"{kind}\n".encode() for kind in itertools.cycle(kinds))
        return await Load(port, requests, 400, 0.25).run(), connections


def test_every_request_is_counted_once() -> None:
    counted, connections = asyncio.run(flood(("good", "good", "refused", "gone")))
    good, refused = len(counted.latencies[200]), len(counted.latencies[429])
    assert counted.sent > 8
    assert [good, refused, counted.lost["closed"]] == [
        len(range(0, counted.sent, 4)) + len(range(1, counted.sent, 4)),
        len(range(2, counted.sent, 4)),
        len(range(3, counted.sent, 4)),
    ]
    assert counted.unanswered == counted.lost.total()
    assert counted.waits == {"6": refused}
    assert counted.quantiles(200)["count"] == good
    assert connections >= refused + counted.lost.total()
    assert connections <= counted.sent


def test_requests_have_the_texts_in_turn() -> None:
    first, second, *_ = itertools.islice(contents(("a", "b", "c"), 2), 2)
    assert first.endswith(b'\r\n\r\n{"input":["a","b"],"encoding_format":"base64"}')
    assert second.endswith(b'\r\n\r\n{"input":["c","a"],"encoding_format":"base64"}')
    head, _, body = first.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
