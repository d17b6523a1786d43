"""Short requests of 16 clients beside a client whose every text is very long.

    python -m benchmarks.longtext [--requests 400] [--rounds 3] [--save NAME]

The long texts are 10 MB of a single word and of short ones, which are cut to what the model reads or refused, and
500 kB that a server with chunked processing runs in blocks, which takes longer than the measurement. Each is measured
beside the same clients alone, in turns.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import statistics
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import orjson

from benchmarks.harness import row, save
from benchmarks.serve import Server
from material.corpus import docstrings

CLIENTS = 16
CHUNKED = '{"enable_chunked_processing": true}'
TEXTS = {
    "one word": ("a" * 10_000_000, ()),
    "many words": ("water " * 1_700_000, ()),
    "in blocks": ("water " * 85_000, ("--pooler-config", CHUNKED)),
}
"""Long texts, and the flags of their servers."""
GOAL = 3.0


class Beside:
    """A client that sends one body again and again.

    Attributes:
        statuses: of its answers.
    """

    def __init__(self, server: Server, body: bytes) -> None:
        self.statuses: Counter[int] = Counter()
        self._server, self._body = server, body
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port)
        self._is_over = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._is_over:
                self._connection.request("POST", "/v1/embeddings", self._body, {"Content-Type": "application/json"})
                answer = self._connection.getresponse()
                answer.read()
                self.statuses[answer.status] += 1
        except OSError:
            if not self._is_over:
                raise

    def stop(self) -> None:
        """Leave, also in the middle of a request."""
        self._is_over = True
        if self._connection.sock is not None:
            self._connection.sock.shutdown(2)
        self._thread.join()


def p95(server: Server, requests: int) -> float:
    """Return the p95 of short requests in milliseconds."""
    texts = itertools.islice(itertools.cycle(docstrings(200)), requests)
    latencies = server.answer([[text[:200]] for text in texts], CLIENTS).latencies
    return float(np.quantile(latencies, 0.95)) * 1e3


def measure(name: str, requests: int, rounds: int) -> dict[str, Any]:
    """Return p95 in milliseconds of each round, alone and beside a long text."""
    text, flags = TEXTS[name]
    server = Server(*flags)
    body = orjson.dumps({"input": text})
    figures: dict[str, Any] = {"alone_p95_ms": [], "beside_p95_ms": [], "statuses": Counter()}
    try:
        p95(server, requests)
        for _ in range(rounds):
            figures["alone_p95_ms"].append(p95(server, requests))
            beside = Beside(server, body)
            time.sleep(1)
            figures["beside_p95_ms"].append(p95(server, requests))
            beside.stop()
            figures["statuses"].update(beside.statuses)
    finally:
        server.stop()
    ratios = [b / a for a, b in zip(figures["alone_p95_ms"], figures["beside_p95_ms"], strict=True)]
    return {**figures, "ratio": statistics.median(ratios)}


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    results = {name: measure(name, options.requests, options.rounds) for name in TEXTS}
    for name, figures in results.items():
        alone, beside = (statistics.median(figures[f"{kind}_p95_ms"]) for kind in ("alone", "beside"))
        answers = ", ".join(f"{count} x {status}" for status, count in figures["statuses"].items()) or "none in time"
        row(f"{name}: p95 alone, beside", f"{alone:.0f}, {beside:.0f} ms")
        row("  ratio, median of rounds", f"{figures['ratio']:.1f} x", f"<= {GOAL:g}")
        row("  answers to the long text", answers)
    if options.save:
        save(
            options.save,
            results,
            f"python -m benchmarks.longtext --requests {options.requests} --rounds {options.rounds}",
        )


if __name__ == "__main__":
    main()
