"""`cenote serve` with the default model: its rate against the offline rate, latency, bulk beside short queries, memory.

    python -m benchmarks.serve [--texts 600] [--rounds 3] [--requests 100000] [--save NAME]

Clients, server and the offline engine share the cores of the machine and run one after the other in each round. What
the clients burn is printed beside each rate: a server whose clients are elsewhere has that much more. So is the share
of the cores that other processes took meanwhile; if it is not near 0, read nothing but CPU times.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.embed import cenote
from benchmarks.harness import Encode, Worker, row, save
from cenote.cli.load import Sample, closed
from cenote.cli.targets import Remote
from cenote.config import ModelConfig
from cenote.engine.engine import REST
from cenote.models.hub import embedded
from cenote.models.load import load
from material.corpus import docstrings

LOADS = ((1, 1), (16, 1), (64, 1), (16, 8))
"""Clients, and texts of a request."""
QUERY = "how deep is a cenote?"
BULK = 2048
OVERHEAD = 2e-3
"""Seconds that a server may add to the forward of one short text."""
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """`cenote serve` in a process of its own.

    Args:
        flags: further ones.
        command: module that is run, and its first arguments.

    Attributes:
        port: that it listens on.
        url: its address.
        operations: address of its second listener, with `--metrics-port`.
    """

    def __init__(self, *flags: str, command: tuple[str, ...] = ("cenote", "serve")) -> None:
        began = time.perf_counter()
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", "0", "--auto-truncate", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if "serving http" in line:
                break
        else:
            raise RuntimeError("".join(lines))
        self.url = ADDRESS.findall(lines[-1])[0]
        self.operations = ADDRESS.findall("".join(lines))[0]  # its line comes first
        self.port = int(self.url.rpartition(":")[2])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.remote = Remote(self.url, None, None)
        self.remote.ask(["hello"])
        self.first_answer = time.perf_counter() - began

    def answer(self, requests: Iterable[list[str]], clients: int = 1) -> Sample:
        """Answer all `requests` of clients that each wait for an answer before the next one.

        Raises:
            RuntimeError: one of them failed.
        """
        sample = closed(self.remote.ask, requests, clients=clients)
        if sample.errors:
            raise RuntimeError(sample.errors[0])
        return sample

    @property
    def cpu(self) -> float:
        """CPU seconds that it has burnt."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def megabytes(self, name: str = "VmRSS") -> float:
        """Its memory, by the names of /proc/PID/status."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024

    def stop(self) -> None:
        self.remote.close()
        self.process.terminate()
        self.process.wait()


def bare() -> Encode:
    """Seconds of forwards of one text, given how many and the pause before each; no server, queue or tokenizer."""
    model, checkpoint = load(ModelConfig())

    def run(order: tuple[str, int, float]) -> list[float]:
        from cenote.core import Sequence

        sequence = Sequence(checkpoint.tokenizer(order[0])["input_ids"])
        seconds = []
        for _ in range(order[1]):
            time.sleep(order[2])
            began = time.perf_counter()
            model.launch([sequence]).finish()
            seconds.append(time.perf_counter() - began)
        return seconds

    return run


def busy() -> float:
    """CPU seconds that all processes of the machine have burnt."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / TICKS


def rates(server: Server, texts: list[str], rounds: int) -> dict[str, Any]:
    """Served against offline, interleaved."""
    llm = Worker(cenote, threads=os.cpu_count() or 1)
    llm.ask(texts[:64])
    found: dict[str, Any] = {}
    for _, (clients, size) in itertools.product(range(rounds), LOADS[1:]):
        requests = [texts[i : i + size] for i in range(0, len(texts), size)]
        all_before, own_before, clients_before = busy(), server.cpu, time.process_time()
        sample = server.answer(requests, clients)
        own, burnt = server.cpu - own_before, time.process_time() - clients_before
        others = (busy() - all_before - own - burnt) / sample.seconds / (os.cpu_count() or 1)
        offline_cpu, wall, _ = llm.ask(texts)
        entry = {
            "fraction_of_offline": wall / sample.seconds,
            "cpu_fraction_of_offline": offline_cpu / own,
            "texts_per_second": len(texts) / sample.seconds,
            "clients_cpu_share": burnt / own,
            "others_share_of_cores": max(0.0, others),
        }
        own_results = found.setdefault(f"{clients} x {size}", {name: [] for name in entry})
        for name, value in entry.items():
            own_results[name].append(value)
    llm.stop()
    return found


def latency(server: Server, rounds: int) -> dict[str, Any]:
    """One client with one short text against the bare forward, in turns of 20.

    The forward is measured in a loop, and again with a pause before each, as a server's has.
    """
    worker = Worker(bare, threads=os.cpu_count() or 1)
    served, alone, paused = [], [], []
    for _ in range(5 * rounds):
        served += server.answer([[QUERY]] * 20).latencies
        alone += worker.ask((QUERY, 20, 0.0))[2]
        paused += worker.ask((QUERY, 20, OVERHEAD))[2]
    worker.stop()
    return {
        "p50_ms": statistics.median(served) * 1e3,
        "p95_ms": float(np.quantile(served, 0.95)) * 1e3,
        "bare_forward_p50_ms": statistics.median(alone) * 1e3,
        "bare_forward_after_a_pause_p50_ms": statistics.median(paused) * 1e3,
    }


def stall(server: Server, texts: list[str]) -> dict[str, Any]:
    """Short queries of one client, alone and beside requests of `BULK` texts."""
    alone = server.answer([[QUERY]] * 100).latencies
    bulk = list(itertools.islice(itertools.cycle(texts), BULK))
    finished = threading.Event()

    def flood() -> None:
        while not finished.is_set():
            server.remote.ask(bulk)

    flooding = threading.Thread(target=flood)
    flooding.start()
    time.sleep(1)
    beside = server.answer([[QUERY]] * 200).latencies
    finished.set()
    flooding.join()
    q95 = [float(np.quantile(x, 0.95)) * 1e3 for x in (alone, beside)]
    return {"p95_alone_ms": q95[0], "p95_beside_bulk_ms": q95[1], "p50_beside_bulk_ms": statistics.median(beside) * 1e3}


def flatness(server: Server, texts: list[str], count: int) -> dict[str, Any]:
    """Resident memory before and over `count` requests of a short text, ten readings; its peak; and when all rest."""
    short = [[" ".join(text.split()[:6])] for text in texts]
    source, readings = itertools.cycle(short), [server.megabytes()]
    for _ in range(10):
        server.answer(itertools.islice(source, max(1, count // 10)), clients=16)
        readings.append(server.megabytes())
    time.sleep(REST + 1)
    peak, resting = server.megabytes("VmHWM"), server.megabytes()
    return {"requests": count, "megabytes": readings, "peak": peak, "resting": resting}


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    texts = list(docstrings(options.texts))
    starts = []
    for _ in range(3):
        server = Server()
        starts.append(server.first_answer)
        if len(starts) < 3:
            server.stop()
    weights = sum(file.stat().st_size for file in embedded().glob("*.safetensors")) / (1 << 20)
    result: dict[str, Any] = {"first_answer_seconds": starts, "weights_megabytes": weights}
    result["loaded_megabytes"] = server.megabytes()
    result["rates"] = rates(server, texts, options.rounds)
    result["latency"] = latency(server, options.rounds)
    result["stall"] = stall(server, texts)
    result["memory"] = flatness(server, texts, options.requests)
    server.stop()

    median = statistics.median
    row("start to first answer", f"{median(starts):.1f} s", "<= 5")
    for name, own in result["rates"].items():
        row(f"served / offline, {name} (clients x texts)", f"{median(own['fraction_of_offline']):.0%}", ">= 95 %")
        row("  the same by the CPU time of the processes", f"{median(own['cpu_fraction_of_offline']):.0%}")
        row("  CPU time of the clients, of the server's", f"{median(own['clients_cpu_share']):.1%}")
        row("  cores that other processes took", f"{median(own['others_share_of_cores']):.0%}")
    times = result["latency"]
    wanted = times["bare_forward_p50_ms"] + OVERHEAD * 1e3
    row("one short text, one client, p50", f"{times['p50_ms']:.1f} ms", f"<= {wanted:.1f}")
    row("  the bare forward, in a loop", f"{times['bare_forward_p50_ms']:.1f} ms")
    row(f"  the same, {OVERHEAD * 1e3:.0f} ms after the last", f"{times['bare_forward_after_a_pause_p50_ms']:.1f} ms")
    times = result["stall"]
    ratio = times["p95_beside_bulk_ms"] / times["p95_alone_ms"]
    row(f"p95 of a short query beside {BULK} texts, of its p95 alone", f"{ratio:.1f} x", "<= 3")
    memory = result["memory"]
    row("resident after loading", f"{result['loaded_megabytes']:.0f} MB", f"<= {weights + 500:.0f}")
    row("  after the loads above", f"{memory['megabytes'][0]:.0f} MB", f"<= {weights + 500:.0f}")
    row(f"  after {memory['requests']} more requests", f"{memory['megabytes'][-1]:.0f} MB", "flat")
    row("  when the server rests", f"{memory['resting']:.0f} MB", f"<= {weights + 500:.0f}")
    if options.save:
        command = f"python -m benchmarks.serve --texts {options.texts} --rounds {options.rounds}"
        save(options.save, result, f"{command} --requests {options.requests}")


if __name__ == "__main__":
    main()
