"""Load on a server: clients that wait for their answers, and clients that do not. One thread, little work a request."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Coroutine, Iterator
from typing import Any

from benchmarks.peers.envs import PeerError

SETTLE = 0.5
"""Seconds at the start of a closed loop that do not count."""

PATIENCE = 60.0
"""Seconds that the last answers may take."""


def request(path: str, body: bytes) -> bytes:
    """An HTTP request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """A kept connection: one request at a time."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._waiting: asyncio.Future[bytes] | None = None
        self._received = b""
        self._needed: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("its server closed the connection")

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._needed is None:
            head, found, _ = self._received.partition(b"\r\n\r\n")
            if not found:
                return
            fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
            if b"content-length" not in fields:
                self._fail("its server sends no Content-Length")
                return
            self._needed = len(head) + 4 + int(fields[b"content-length"])
        if len(self._received) < self._needed or self._waiting is None or self._waiting.done():
            return
        answer, self._received, self._needed = self._received, b"", None
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " in head.split(b"\r\n")[0] + b" ":
            self._waiting.set_result(body)
        else:
            self._fail(f"its server answered {head.splitlines()[0].decode()}: {body[:200].decode(errors='replace')}")

    def _fail(self, reason: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(PeerError(reason))

    async def send(self, content: bytes) -> bytes:
        """Send a request and return the answer's body."""
        self._waiting = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            self._fail("its server closed the connection")
        else:
            self._transport.write(content)
        return await self._waiting

    def close(self) -> None:
        self._transport.close()


async def connect(port: int) -> Connection:
    """A new connection to this machine's `port`."""
    return (await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port))[1]


def answer(port: int, content: bytes) -> bytes:
    """The body that answers one request."""

    async def once() -> bytes:
        connection = await connect(port)
        try:
            return await connection.send(content)
        finally:
            connection.close()

    return asyncio.run(once())


def closed(port: int, requests: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Clients that send their next request when the last is answered.

    Returns:
        "rate": answers per second; "latencies": seconds, of the answers within the `seconds` that count.
    """

    async def client(source: Iterator[bytes], began: float, latencies: list[float]) -> None:
        connection = await connect(port)
        try:
            while (sent := time.perf_counter()) < began + SETTLE + seconds:
                await connection.send(next(source))
                done = time.perf_counter()
                if began + SETTLE <= done < began + SETTLE + seconds:
                    latencies.append(done - sent)
        finally:
            connection.close()

    async def run() -> list[float]:
        source, latencies = itertools.cycle(requests), list[float]()
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client(source, began, latencies))
        return latencies

    latencies = _plainly(run(), seconds)
    return {"rate": len(latencies) / seconds, "latencies": latencies}


def opened(port: int, requests: list[bytes], rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Requests that arrive at random (Poisson), `rate` a second, whether or not earlier ones are answered.

    Returns:
        "rate": requests sent per second; "latencies": seconds from the arrival, the wait for a connection included.
    """
    generator, arrivals, now = random.Random(seed), [], 0.0
    while (now := now + generator.expovariate(rate)) < seconds:
        arrivals.append(now)

    async def one(idle: list[Connection], content: bytes, arrived: float) -> float:
        connection = idle.pop() if idle else await connect(port)
        await connection.send(content)
        idle.append(connection)
        return time.perf_counter() - arrived

    async def run() -> list[float]:
        idle: list[Connection] = []
        tasks = []
        async with asyncio.TaskGroup() as group:
            began = time.perf_counter()
            for arrival, content in zip(arrivals, itertools.cycle(requests), strict=False):
                await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
                tasks.append(group.create_task(one(idle, content, began + arrival)))
        for connection in idle:
            connection.close()
        return [task.result() for task in tasks]

    return {"rate": len(arrivals) / seconds, "latencies": _plainly(run(), seconds)}


def _plainly(work: Coroutine[Any, Any, list[float]], seconds: float) -> list[float]:
    """Run; the first failure becomes a PeerError, and so does an answer that does not come."""

    async def limited() -> list[float]:
        async with asyncio.timeout(seconds + PATIENCE):
            return await work

    found: list[float] = []
    try:
        found = asyncio.run(limited())
    except* TimeoutError:
        raise PeerError(f"its server left a request unanswered for {PATIENCE:.0f} s") from None
    except* (PeerError, OSError) as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise PeerError(str(first)) from None
    return found
