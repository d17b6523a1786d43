"""`cenote serve` under mixed load for a long time: memory, descriptors, threads and latencies must stay flat.

    python -m benchmarks.soak [--minutes 20] [--save NAME]

Some clients wait for their answers, others leave before; there are short texts and requests of many, long texts that
are cut, bodies that are refused, and texts in all encodings. Each minute has a row. The first one warms up; figures of
the last quarter are compared with those of the first quarter of the rest, and the status is 1 if one has grown.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from benchmarks.harness import row, save
from benchmarks.serve import QUERY, Server
from material.corpus import docstrings

CLIENTS = 6
REFUSED = 429
READINGS = 10
"""Readings of each minute."""
LIMITS = {"megabytes": 1.05, "descriptors": 1.2, "threads": 1.2, "p50_ms": 1.5, "p95_ms": 2.0}
"""How many times as large the last figures may be as the first: latencies of a shared machine go up and down."""


class Kind(NamedTuple):
    """A kind of request.

    Attributes:
        weight: how often it is sent.
        path: of its route.
        body: JSON.
        status: of its answer.
    """

    weight: int
    path: str
    body: bytes
    status: int


def kinds() -> list[Kind]:
    """Return the kinds of requests."""
    texts = docstrings(256)

    def of(weight: int, path: str, status: int = 200, **fields: Any) -> Kind:
        return Kind(weight, path, orjson.dumps(fields), status)

    return [
        of(20, "/v1/embeddings", input="how deep is a cenote?"),
        *(of(1, "/v1/embeddings", input=texts[place], encoding_format="base64") for place in range(20)),
        of(4, "/v1/embeddings", input=[*texts[:32]]),
        of(1, "/v1/embeddings", input=[*texts]),
        of(4, "/score", queries=QUERY, documents=[*texts[:8]]),
        of(3, "/pooling", input=[*texts[8:12]], task="token_embed", encoding_format="bytes_only"),
        of(3, "/v2/embed", texts=[*texts[12:20]], embedding_types=["int8", "float"]),
        of(2, "/tokenize", prompt=texts[0] * 20),
        of(1, "/v1/embeddings", input="water " * 100_000),
        of(2, "/v1/embeddings", 400, input=[None] * 2000),
        of(2, "/v1/embeddings", 400, input="a", dimensions=-1),
        of(1, "/nowhere", 404, input="a"),
    ]


class Clients:
    """Threads that send requests until they are stopped.

    Attributes:
        latencies: seconds of the short query, since they were last taken.
        statuses: of all answers.
        wrong: answers with another status than their kind has.
        left: requests whose client left.
    """

    def __init__(self, port: int) -> None:
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.wrong: Counter[str] = Counter()
        self.left = 0
        self._port = port
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        self._threads += [threading.Thread(target=work) for work in (self._ask, self._leave)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for the answers under way, and stop."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def take(self) -> list[float]:
        """Return the latencies since the last time."""
        taken, self.latencies = self.latencies, []
        return taken

    def _run(self, number: int) -> None:
        generator, connection = random.Random(number), http.client.HTTPConnection("127.0.0.1", self._port)
        all_kinds = kinds()
        weights = [kind.weight for kind in all_kinds]
        while not self._stopped.is_set():
            (kind,) = generator.choices(all_kinds, weights)
            status = answered(connection, kind)
            self.statuses[status] += 1
            if status == REFUSED:
                self._stopped.wait(1)
            elif status != kind.status:
                self.wrong[f"{kind.path}: {status}"] += 1
        connection.close()

    def _ask(self) -> None:
        """Send a short query from time to time, on a new connection."""
        kind = kinds()[0]
        while not self._stopped.wait(0.2):
            connection = http.client.HTTPConnection("127.0.0.1", self._port)
            began = time.perf_counter()
            status = answered(connection, kind)
            self.statuses[status] += 1
            if status == kind.status:
                self.latencies.append(time.perf_counter() - began)
            connection.close()

    def _leave(self) -> None:
        """Send half of a request, or a whole one, and leave."""
        kind = next(kind for kind in kinds() if len(kind.body) > 50_000)
        head = f"POST {kind.path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(kind.body)}\r\n\r\n".encode() + kind.body
        for half in itertools.cycle((True, False)):
            if self._stopped.wait(1):
                return
            with socket.create_connection(("127.0.0.1", self._port)) as client:
                client.sendall(request[: len(request) // 2] if half else request)
                self._stopped.wait(0.3)
            self.left += 1


def answered(connection: http.client.HTTPConnection, kind: Kind) -> int:
    """Send a request, and return the status of its answer."""
    connection.request("POST", kind.path, kind.body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def reading(server: Server) -> dict[str, float]:
    """Return memory, descriptors and threads of a server."""
    folder = Path(f"/proc/{server.process.pid}")
    return {
        "megabytes": server.megabytes(),
        "descriptors": len(os.listdir(folder / "fd")),
        "threads": len(os.listdir(folder / "task")),
    }


def minute(server: Server, clients: Clients) -> dict[str, float]:
    """Return the figures of a minute."""
    readings = []
    for _ in range(READINGS):
        time.sleep(60 / READINGS)
        readings.append(reading(server))
    figures = {name: statistics.median(entry[name] for entry in readings) for name in readings[0]}
    latencies = clients.take()
    return {
        **figures,
        "p50_ms": statistics.median(latencies) * 1e3,
        "p95_ms": float(np.quantile(latencies, 0.95)) * 1e3,
    }


def grown(minutes: list[dict[str, float]]) -> dict[str, float]:
    """Return how many times as large the figures of the last quarter are as those of the first, without a warm-up."""
    rest = minutes[1:] or minutes
    quarter = max(1, len(rest) // 4)
    return {
        name: statistics.median(entry[name] for entry in rest[-quarter:])
        / statistics.median(entry[name] for entry in rest[:quarter])
        for name in LIMITS
    }


def main() -> int:
    """Run and print; return 1 if something has grown, or an answer was not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    server = Server("--metrics-port", "0")
    clients = Clients(server.port)
    minutes: list[dict[str, float]] = []
    try:
        for number in range(options.minutes + 1):
            minutes.append(minute(server, clients))
            cells = "  ".join(f"{name} {value:.0f}" for name, value in minutes[-1].items())
            row(f"minute {number}", cells, "warm-up" if not number else "")
    finally:
        clients.stop()
        time.sleep(3)
        rest = reading(server)
        server.stop()
    growth = grown(minutes)
    for name, times in growth.items():
        row(f"{name}: the end over the beginning", f"{times:.2f} x", f"<= {LIMITS[name]:g}")
    row("at rest", "  ".join(f"{name} {value:.0f}" for name, value in rest.items()))
    row("answers", ", ".join(f"{count} x {status}" for status, count in sorted(clients.statuses.items())))
    row("answers with another status than their kind has", str(dict(clients.wrong)), "none")
    row("clients that left", str(clients.left))
    if options.save:
        result = {"minutes": minutes, "growth": growth, "at_rest": rest, "answers": dict(clients.statuses)}
        save(options.save, result, f"python -m benchmarks.soak --minutes {options.minutes}")
    return int(bool(clients.wrong) or any(growth[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
