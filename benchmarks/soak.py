"""`cenote serve` under mixed load for a long time: memory, descriptors, threads and latencies must stay flat.

    python -m benchmarks.soak [--minutes 20] [--leak memory | time] [--save NAME]

Some clients wait for their answers, others leave before; there are short texts and requests of many, long texts that
are cut, bodies that are refused, and texts in all encodings. In a round, each client sends all of these, in an order of
its own that stays the same, and waits for the others. So all rounds, of about half a minute, have the same mixture, and
each has one reading.

The first quarter of the readings warms up. Through the logarithms of each figure in the rest goes a straight line. Its
slope is the growth over that time, with three standard errors to both sides, wider where readings resemble those before
them. Other processes on the machine make latencies long and CPU time dear, so that the share of the cores that they
took is a second variable of the line. A figure has grown if all of the interval is beyond its limit, and is flat if
none of it is; else the run does not tell. The status is 0 if all are flat, 1 if one has grown or an answer was not what
it should be, and 2 if too much else went on to tell.

`--leak` serves with an engine that keeps bytes of every text, or looks at all earlier requests for each: by it one sees
that the status is 1.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import random
import re
import socket
import statistics
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from benchmarks.harness import row, save
from benchmarks.serve import QUERY, Server, busy
from material.corpus import docstrings

if TYPE_CHECKING:
    from collections.abc import Callable

CLIENTS = 6
REFUSED = 429
ASKING = 3
"""Clients that send the short query whose latencies are taken."""
LOOK = 1.0
"""Seconds between two looks at memory, descriptors and threads, of which a reading has the means."""
LIMITS = {
    "megabytes": 1.03, "descriptors": 1.1, "threads": 1.1, "cpu_ms_per_1000_tokens": 1.1, "mean_ms": 1.25,
    "p95_ms": 1.5,
}  # fmt: skip
"""How many times as large the figures may be at the end as at the beginning."""
SHARED = {"cpu_ms_per_1000_tokens", "mean_ms", "p95_ms"}
"""Figures that other processes change. A short query waits for a long batch or does not, so that the median of its
latencies jumps between the two; the mean does not."""
ERRORS = 3.0
"""Standard errors on each side of a growth."""
MOST_OTHERS = 0.7
"""Share of the cores that other processes may take; readings of `SHARED` beyond it are left out."""
FEWEST = 20
"""Readings without which nothing is told."""
LAG = 0.9
"""Maximum autocorrelation that is believed."""


class Kind(NamedTuple):
    """A kind of request.

    Attributes:
        weight: how often a client sends it in turn.
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

    Args:
        port: of the server.
        end_round: called at the end of each round, while no client sends but those that ask and leave.

    Attributes:
        latencies: seconds of the short query, since they were last taken.
        statuses: of all answers.
        wrong: answers with another status than their kind has.
        left: requests whose client left.
    """

    def __init__(self, port: int, end_round: Callable[[], None]) -> None:
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.wrong: Counter[str] = Counter()
        self.left = 0
        self._port = port
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._round = threading.Barrier(CLIENTS, end_round)
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        self._threads += [threading.Thread(target=work) for work in (*[self._ask] * ASKING, self._leave)]

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for the answers under way, and stop."""
        self._stopped.set()
        self._round.abort()
        for thread in self._threads:
            thread.join()

    def take(self) -> list[float]:
        """Return the latencies since the last time."""
        taken, self.latencies = self.latencies, []
        return taken

    def _run(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        requests = [kind for kind in kinds() for _ in range(kind.weight)]
        random.Random(number).shuffle(requests)
        with suppress(threading.BrokenBarrierError):
            while not self._stopped.is_set():
                self._send_all(connection, requests)
                self._round.wait()
        connection.close()

    def _send_all(self, connection: http.client.HTTPConnection, requests: list[Kind]) -> None:
        """Send the requests of a round, or those until the end."""
        for kind in itertools.takewhile(lambda _: not self._stopped.is_set(), requests):
            if self._send(connection, kind) == REFUSED:
                self._stopped.wait(1)

    def _ask(self) -> None:
        """Send a short query from time to time, on a new connection."""
        kind = kinds()[0]
        while not self._stopped.wait(0.1):
            connection = http.client.HTTPConnection("127.0.0.1", self._port)
            began = time.perf_counter()
            if self._send(connection, kind) == kind.status:
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

    def _send(self, connection: http.client.HTTPConnection, kind: Kind) -> int:
        """Send a request, count its answer, and return the status; 0 if there was none."""
        try:
            status = answered(connection, kind)
        except (OSError, http.client.HTTPException) as error:
            status, name = 0, type(error).__name__
            connection.close()
        else:
            name = str(status)
        with self._lock:
            self.statuses[status] += 1
            if status not in (REFUSED, kind.status):
                self.wrong[f"{kind.path}: {name}"] += 1
        return status


def answered(connection: http.client.HTTPConnection, kind: Kind) -> int:
    """Send a request, and return the status of its answer."""
    connection.request("POST", kind.path, kind.body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


class Meter:
    """Reads figures of a server, and those of the time since the last reading.

    Attributes:
        clients: of the server; each of their rounds ends with a reading.
        readings: the figures by their names, see `read`.
    """

    def __init__(self, server: Server) -> None:
        self.readings: list[dict[str, float]] = []
        self.clients = Clients(server.port, self.read)
        self._server = server
        self._states: list[dict[str, float]] = []
        self._last = self._sums()

    def look(self) -> None:
        """Look at memory, descriptors and threads of the server."""
        self._states.append(state(self._server))

    def _sums(self) -> dict[str, float]:
        """Return what grows all the time: seconds, CPU seconds of all, the server and the clients, and tokens."""
        page = urllib.request.urlopen(f"{self._server.operations}/metrics").read().decode()
        (tokens,) = re.findall(r"^cenote_tokens_total(?:\{.*\})? (\S+)", page, re.MULTILINE)
        return {
            "seconds": time.perf_counter(),
            "all": busy(),
            "server": self._server.cpu,
            "clients": time.process_time(),
            "tokens": float(tokens),
        }

    def read(self) -> None:
        """Add the figures to the readings and tell them; `others` is the share of the cores that others took."""
        before, self._last = self._last, self._sums()
        spent = {name: value - before[name] for name, value in self._last.items()}
        latencies = self.clients.take() or [spent["seconds"]]  # none has come: they take longer
        states, self._states = self._states or [state(self._server)], []
        others = (spent["all"] - spent["server"] - spent["clients"]) / spent["seconds"] / (os.cpu_count() or 1)
        reading = {
            **{name: statistics.mean(each[name] for each in states) for name in states[0]},
            "cpu_ms_per_1000_tokens": spent["server"] / max(1, spent["tokens"]) * 1e6,
            "mean_ms": statistics.mean(latencies) * 1e3,
            "p95_ms": float(np.quantile(latencies, 0.95)) * 1e3,
            "others": min(1.0, max(0.0, others)),
        }
        self.readings.append(reading)
        row(f"round {len(self.readings)}, {spent['seconds']:.0f} s", told(reading))


def state(server: Server) -> dict[str, float]:
    """Return memory, descriptors and threads of a server."""
    folder = Path(f"/proc/{server.process.pid}")
    return {
        "megabytes": server.megabytes(),
        "descriptors": len(os.listdir(folder / "fd")),
        "threads": len(os.listdir(folder / "task")),
    }


class Growth(NamedTuple):
    """How many times as large a figure is at the end as at the beginning, and how sure that is.

    Attributes:
        limit: of a flat figure.
    """

    times: float
    low: float
    high: float
    limit: float

    @property
    def verdict(self) -> str:
        """Whether the figure is flat or grown, or neither is sure."""
        if self.low > self.limit:
            return "grown"
        return "flat" if self.high <= self.limit else "not sure"


def growth(values: list[float], times: list[float], others: list[float], limit: float) -> Growth:
    """Return the growth of a figure from the beginning to the end, by least squares.

    Args:
        values: positive ones.
        times: of the values, from 0 (the beginning) to 1.
        others: share of the cores that other processes took; all equal = without effect.
        limit: of a flat figure.
    """
    count = len(values)
    if count < FEWEST:
        return Growth(1.0, 0.0, 1e3, limit)
    loads = -np.log1p(-np.minimum(others, 0.99))  # a wait for a core is as much longer as less of the cores is left
    design_NV = np.stack([np.ones(count), np.asarray(times), loads - loads.mean()], 1)
    inverse_VV = np.linalg.pinv(design_NV.T @ design_NV)
    logs = np.log(values)
    slopes = inverse_VV @ design_NV.T @ logs
    rest = logs - design_NV @ slopes
    spread = float(rest @ rest)
    follows = min(LAG, max(0.0, float(rest[1:] @ rest[:-1]) / max(spread, 1e-12)))
    variance = spread / max(1, count - 3) * inverse_VV[1, 1] * (1 + follows) / (1 - follows)
    low, middle, high = np.exp(slopes[1] + ERRORS * np.sqrt(max(0.0, variance)) * np.array([-1, 0, 1]))
    return Growth(float(middle), float(low), float(high), limit)


def judged(readings: list[dict[str, float]]) -> dict[str, Growth]:
    """Return the growth of each figure over the readings, of which the first quarter warms up."""
    times = np.linspace(-1 / 3, 1, len(readings))
    warm = [(float(at), reading) for at, reading in zip(times, readings, strict=True) if at >= 0]
    growths = {}
    for name, limit in LIMITS.items():
        most = MOST_OTHERS if name in SHARED else 1.0
        kept = [(at, reading) for at, reading in warm if reading["others"] <= most]
        others = [reading["others"] if name in SHARED else 0.0 for _, reading in kept]
        growths[name] = growth([reading[name] for _, reading in kept], [at for at, _ in kept], others, limit)
    return growths


def told(reading: dict[str, float]) -> str:
    """Return a reading, for people."""
    figures = [f"{name} {value:.0f}" for name, value in reading.items() if name != "others"]
    return "  ".join([*figures, f"others {reading['others']:.0%}"])


def status(growths: dict[str, Growth], wrong: Counter[str]) -> int:
    """Return the exit status of a run: see the head of this file."""
    verdicts = {growth.verdict for growth in growths.values()}
    if wrong or "grown" in verdicts:
        return 1
    return 2 if "not sure" in verdicts else 0


def main() -> int:
    """Run, print, and return the exit status; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=20, help="of fewer than 12 the rounds are too few to tell")
    parser.add_argument("--leak", choices=("memory", "time"), help="serve with an engine that leaks")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    command = ("cenote", "serve") if options.leak is None else ("benchmarks.leaking", options.leak)
    server = Server("--metrics-port", "0", command=command)
    meter = Meter(server)
    meter.clients.start()
    try:
        for _ in range(round(options.minutes * 60 / LOOK)):
            time.sleep(LOOK)
            meter.look()
    finally:
        meter.clients.stop()
        time.sleep(3)
        rest = state(server)
        server.stop()
    clients, readings = meter.clients, meter.readings
    growths = judged(readings)
    for name, growth in growths.items():
        interval = f"{growth.times:.3f} x ({growth.low:.3f} to {growth.high:.3f})"
        row(f"{name}: the end over the beginning", interval, f"<= {growth.limit:g}: {growth.verdict}")
    row("cores that other processes took, of all", f"{statistics.mean(reading['others'] for reading in readings):.0%}")
    row("at rest", "  ".join(f"{name} {value:.0f}" for name, value in rest.items()))
    row("answers", ", ".join(f"{count} x {status}" for status, count in sorted(clients.statuses.items())))
    row("answers with another status than their kind has", str(dict(clients.wrong)), "none")
    row("clients that left", str(clients.left))
    if options.save:
        result = {
            "readings": readings,
            "growth": {name: {**growth._asdict(), "verdict": growth.verdict} for name, growth in growths.items()},
            "at_rest": rest,
            "answers": dict(clients.statuses),
        }
        save(options.save, result, f"python -m benchmarks.soak --minutes {options.minutes}")
    return status(growths, clients.wrong)


if __name__ == "__main__":
    sys.exit(main())
