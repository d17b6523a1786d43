"""`cenote serve` at several times its capacity: who is answered, who is refused, how fast, and whether it is alive.

    python -m benchmarks.overload [--times 5] [--seconds 40] [--sizes 1 8] [--rounds 3] [--save NAME] [--flags ...]

Requests arrive at random (Poisson), whether or not earlier ones are answered, each on a connection that nobody uses. In
each round the capacity is measured first, by clients that wait for their answers. Another process asks for the health
of the server on its own port and on the second one. Clients and server share the cores of the machine: what the
clients burn, and what other processes take, is printed beside each figure.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import random
import statistics
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import httptools
import numpy as np
import orjson

from benchmarks.harness import row, save
from benchmarks.serve import Server, busy
from material.corpus import docstrings

CLIENTS = 64
"""Clients that wait, of whom the capacity is measured."""
PATIENCE = 120.0
"""Seconds after the last arrival in which an answer may still come."""
PROBE = 0.1
"""Seconds between two questions for the health."""
UNREACHABLE = 10.0
"""Seconds after which a server that does not tell its health counts as unreachable."""


@dataclass
class Flood:
    """What became of the requests of an open loop.

    Attributes:
        seconds: in which they arrived.
        sent: requests.
        latencies: seconds from arrival to answer, by status.
        during: requests that were answered 200 while others still arrived.
        lost: requests whose connection ended, by the name of the error.
        waits: values of `Retry-After`.
        lateness: seconds by which arrivals were sent too late.
    """

    seconds: float = 0.0
    sent: int = 0
    latencies: dict[int, list[float]] = field(default_factory=dict)
    during: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    lateness: list[float] = field(default_factory=list)

    @property
    def unanswered(self) -> int:
        """Requests without an answer."""
        return self.sent - sum(map(len, self.latencies.values()))

    def quantiles(self, *statuses: int) -> dict[str, float]:
        """Return p50 and p99 of the answers of these statuses, in milliseconds, and their number."""
        seconds = [value for status in statuses for value in self.latencies.get(status, [])]
        return {"count": len(seconds), **quantiles(seconds)}


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return p50, p99 and the maximum in milliseconds."""
    if not seconds:
        return {}
    p50, p99, top = np.quantile(seconds, (0.5, 0.99, 1.0)) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(top)}


class Line(asyncio.Protocol):
    """A connection, and the request on it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._content = b""
        self._arrived: float | None = None
        self._parser = httptools.HttpResponseParser(self)

    def send(self, content: bytes, arrived: float) -> None:
        """Send a request, once there is a connection."""
        self._content, self._arrived = content, arrived
        if self._transport is not None:
            self._transport.write(content)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._content)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._load.flood.waits[value.decode()] += 1

    def on_message_complete(self) -> None:
        status, keeps = self._parser.get_status_code(), self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        arrived, self._arrived = self._arrived, None
        assert arrived is not None
        self._load.answered(status, arrived)
        if keeps:
            self._load.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._load.idle:
            self._load.idle.remove(self)
        if self._arrived is not None:
            self._load.lost(type(error).__name__ if error else "closed")

    def close(self) -> None:
        """Give up."""
        if self._transport is not None:
            self._transport.abort()


class Load:
    """Requests that arrive at random.

    Args:
        port: of the server, on this machine.
        contents: requests with their heads.
        rate: arrivals a second.
        seconds: for which they arrive.
    """

    def __init__(self, port: int, contents: Iterator[bytes], rate: float, seconds: float) -> None:
        self.flood = Flood(seconds)
        self.idle: deque[Line] = deque()
        self._port, self._contents, self._rate, self._seconds = port, contents, rate, seconds
        self._lines: list[Line] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0
        self._end = 0.0

    async def run(self) -> Flood:
        """Send them, and wait for the answers."""
        generator = random.Random(0)
        now = arrival = time.perf_counter()
        self._end = now + self._seconds
        while arrival < self._end:
            if arrival > now:
                await asyncio.sleep(arrival - now)
            self._send(arrival)
            arrival += generator.expovariate(self._rate)
            now = time.perf_counter()
            if now >= arrival and not self.flood.sent % 16:
                await asyncio.sleep(0)
        while self._open and time.perf_counter() < self._end + PATIENCE:
            await asyncio.sleep(0.05)
        for line in self._lines:
            line.close()
        return self.flood

    def answered(self, status: int, arrived: float) -> None:
        """Note an answer."""
        now = time.perf_counter()
        self._open -= 1
        self.flood.latencies.setdefault(status, []).append(now - arrived)
        self.flood.during += status == 200 and now < self._end

    def lost(self, reason: str) -> None:
        """Note that an answer does not come."""
        self._open -= 1
        self.flood.lost[reason] += 1

    def _send(self, arrival: float) -> None:
        self.flood.sent += 1
        self.flood.lateness.append(time.perf_counter() - arrival)
        self._open += 1
        if self.idle:
            line = self.idle.pop()
            line.send(next(self._contents), arrival)
            return
        line = Line(self)
        line.send(next(self._contents), arrival)
        self._lines.append(line)
        task = asyncio.get_running_loop().create_task(self._connect(line))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, line: Line) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: line, "127.0.0.1", self._port)
        except OSError as error:
            self.lost(type(error).__name__)


def contents(texts: tuple[str, ...], size: int) -> Iterator[bytes]:
    """Return requests of `size` texts, without end."""
    source = itertools.cycle(texts)
    while True:
        body = orjson.dumps({"input": [*itertools.islice(source, size)], "encoding_format": "base64"})
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        yield f"{head}\r\n\r\n".encode() + body


def probe(addresses: list[str], pipe: Connection) -> None:
    """Ask each address in turn until told to stop; send seconds and failures of each."""
    seconds: dict[str, list[float]] = {address: [] for address in addresses}
    failures = dict.fromkeys(addresses, 0)
    pipe.send("ready")
    while not pipe.poll(PROBE):
        for address in addresses:
            began = time.perf_counter()
            try:
                with urllib.request.urlopen(address, timeout=UNREACHABLE) as answer:
                    answer.read()
            except OSError:
                failures[address] += 1
            seconds[address].append(time.perf_counter() - began)
    pipe.send((seconds, failures))


class Probe:
    """A process that asks for the health of a server."""

    def __init__(self, addresses: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._addresses = addresses
        context.Process(target=probe, args=([*addresses.values()], theirs), daemon=True).start()
        self._pipe.recv()

    def stop(self) -> dict[str, dict[str, float]]:
        """Stop, and return the figures of each address by its name."""
        self._pipe.send(None)
        seconds, failures = self._pipe.recv()
        return {
            name: {"count": len(seconds[address]), "failures": failures[address], **quantiles(seconds[address])}
            for name, address in self._addresses.items()
        }


def capacity(server: Server, texts: tuple[str, ...], size: int, seconds: float) -> float:
    """Return the texts a second of clients that wait for their answers."""
    end = time.perf_counter() + seconds
    source = itertools.cycle(texts)
    requests = iter(lambda: [*itertools.islice(source, size)] if time.perf_counter() < end else None, None)
    sample = server.answer(requests, CLIENTS if size == 1 else CLIENTS // 4)
    return sample.texts / sample.seconds


def measure(server: Server, texts: tuple[str, ...], size: int, times: float, seconds: float) -> dict[str, Any]:
    """Return the figures of one flood of requests with `size` texts."""
    able = capacity(server, texts, size, seconds / 4)
    watched = Probe({"health": f"{server.url}/health", "second listener": f"{server.operations}/health"})
    all_before, own_before, clients_before = busy(), server.cpu, time.process_time()
    began = time.perf_counter()
    flood = asyncio.run(Load(server.port, contents(texts, size), times * able / size, seconds).run())
    wall = time.perf_counter() - began
    own, burnt = server.cpu - own_before, time.process_time() - clients_before
    others = (busy() - all_before - own - burnt) / wall / (os.cpu_count() or 1)
    return {
        "capacity": able,
        "requests_per_second": times * able / size,
        "sent": flood.sent,
        "statuses": {status: len(latencies) for status, latencies in sorted(flood.latencies.items())},
        "goodput": flood.during * size / seconds / able,
        "accepted": flood.quantiles(200),
        "refused": flood.quantiles(429),
        "unanswered": flood.unanswered,
        "lost": dict(flood.lost),
        "retry_after": dict(flood.waits),
        **watched.stop(),
        "lateness": quantiles(flood.lateness),
        "server_cpu": own / wall,
        "clients_cpu": burnt / wall,
        "others_share_of_cores": max(0.0, others),
        "megabytes": server.megabytes("VmHWM"),
    }


def report(size: int, rounds: list[dict[str, Any]]) -> None:
    """Print the medians of several rounds."""

    def median(*path: str) -> float:
        values = []
        for value in rounds:
            for name in path:
                value = value.get(name, {})
            values.append(float(value or 0))  # type: ignore[arg-type]
        return statistics.median(values)

    rate = median("requests_per_second")
    print(f"\n{size} text{'s' * (size > 1)} a request, {rate:.0f} requests a second; {median('capacity'):.0f} texts")
    row("goodput, of the capacity", f"{median('goodput'):.0%}", ">= 80 %")
    accepted = f"{median('accepted', 'p50_ms') / 1e3:.1f} / {median('accepted', 'p99_ms') / 1e3:.1f} s"
    row("accepted, p50 / p99", accepted, "<= --max-waiting-time, 10 s")
    row("refused with 429", f"{median('refused', 'count'):.0f} of {median('sent'):.0f}")
    row("  p50 / p99", f"{median('refused', 'p50_ms'):.0f} / {median('refused', 'p99_ms'):.0f} ms", "<= 50 ms")
    row("unanswered, in all rounds", f"{sum(figures['unanswered'] for figures in rounds)}", "0")
    for name in ("health", "second listener"):
        row(f"{name}, p50 / p99", f"{median(name, 'p50_ms'):.0f} / {median(name, 'p99_ms'):.0f} ms")
        row("  unreachable, in all rounds", f"{sum(figures[name]['failures'] for figures in rounds)}", "0")
    row("cores: server, clients", f"{median('server_cpu'):.2f}, {median('clients_cpu'):.2f}")
    row("cores that other processes took, of all", f"{median('others_share_of_cores'):.0%}")
    row("arrivals sent too late, p99", f"{median('lateness', 'p99_ms'):.0f} ms")
    row("peak memory", f"{median('megabytes'):.0f} MB")


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=5, help="arrivals, of the capacity")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8], help="texts of a request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of the server")
    options = parser.parse_args()
    texts = docstrings(2000)
    server = Server("--metrics-port", "0", *options.flags)
    results: dict[str, list[dict[str, Any]]] = {str(size): [] for size in options.sizes}
    try:
        server.answer([[text] for text in texts[:200]], 16)
        for _, size in itertools.product(range(options.rounds), options.sizes):
            results[str(size)].append(measure(server, texts, size, options.times, options.seconds))
    finally:
        server.stop()
    for size, rounds in results.items():
        report(int(size), rounds)
    if options.save:
        sizes = " ".join(map(str, options.sizes))
        command = f"python -m benchmarks.overload --times {options.times:g} --seconds {options.seconds:g}"
        flags = " ".join(["", "--flags", *options.flags]) if options.flags else ""
        save(options.save, dict(results), f"{command} --sizes {sizes} --rounds {options.rounds}{flags}")


if __name__ == "__main__":
    main()
