"""One client with one short text at a time, on an idle machine and beside processes that use its cores.

    python -m benchmarks.shared [--requests 200] [--rounds 3] [--busy 1] [--against FOLDER] [--save NAME]

Servers take turns within each round. Beside the one with default options are one of one thread, and one whose threads
sleep between their parts of a forward; the better figure of them is the goal. `--against` adds the server of another
checkout.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.harness import row, save
from benchmarks.serve import QUERY, Server

BUSY = "while True: pass"
WAYS: dict[str, dict[str, str]] = {
    "as it is": {},
    "one thread": {"CENOTE_THREADS": "1"},
    "threads that sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""Environments of the servers."""


def started(environment: dict[str, str]) -> Server:
    """Start a server with further variables of the environment."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        return Server()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure(servers: dict[str, Server], requests: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return p50 and p95 in milliseconds and CPU milliseconds a request, of each server."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    cpu = dict.fromkeys(servers, 0.0)
    for _ in range(rounds):
        for name, server in servers.items():
            before = server.cpu
            seconds[name] += server.answer([[QUERY]] * requests).latencies
            cpu[name] += server.cpu - before
    return {
        name: {
            "p50": 1e3 * statistics.median(times),
            "p95": 1e3 * sorted(times)[int(0.95 * len(times))],
            "cpu": 1e3 * cpu[name] / len(times),
        }
        for name, times in seconds.items()
    }


def report(title: str, figures: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    for name, figure in figures.items():
        row(f"{title}: {name}", f"{figure['p50']:.1f} / {figure['p95']:.1f}", f"{figure['cpu']:.1f} CPU ms a request")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="requests of each server in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=1, help="processes that use a core each")
    parser.add_argument("--against", metavar="FOLDER", help="checkout of another version")
    parser.add_argument("--save", metavar="NAME")
    options = parser.parse_args()
    ways = dict(WAYS)
    if options.against:
        ways["the other checkout"] = {"PYTHONPATH": f"{options.against}/src"}
    servers = {name: started(environment) for name, environment in ways.items()}
    beside: list[subprocess.Popen[bytes]] = []
    try:
        measure(servers, 50, 1)
        idle = measure(servers, options.requests, options.rounds)
        report("idle, p50 / p95 ms", idle)
        beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
        time.sleep(1)
        busy = measure(servers, options.requests, options.rounds)
        report(f"beside {options.busy} busy, p50 / p95 ms", busy)
    finally:
        for process in beside:
            process.kill()
        for server in servers.values():
            server.stop()
    if options.save:
        result: dict[str, Any] = {"idle": idle, "busy": busy}
        save(options.save, result, " ".join(["python -m benchmarks.shared", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
