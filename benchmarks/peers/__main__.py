"""Cenote beside its peers: the same texts, an environment and a process for each, turn by turn.

    python -m benchmarks.peers [--quick] [--peers vllm infinity] [--workloads mixed] [--rounds 3] [--texts 200]

Makes a virtual environment per peer (once), checks that the vectors agree with sentence-transformers, and writes
benchmarks/results/DATE-peers.json, .md and .png. A peer that cannot be installed, or fails, is reported with its
reason.
"CPU" is the CPU time of a process and its children with one thread, "wall" the time with all cores.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import cenote
from benchmarks.harness import RESULTS, save
from benchmarks.peers import envs, figures, texts
from benchmarks.peers.envs import PeerError
from benchmarks.peers.load import Clients
from benchmarks.peers.processes import HERE, Server, Worker
from benchmarks.peers.table import CENOTE, COLBERT, EMBED, ENVS, FORMS, PEERS, REFERENCE, RERANK, Peer

PATH = "/v1/embeddings"
MODEL = "model"
"""Name of the model on every server."""

LOAD = 0.7
"""Arrivals of the open loop as a share of the best closed-loop rate."""

PATIENCE = 20.0
"""Seconds after which a peer is not measured again on the same texts."""


class Bench:
    """One run: who is ready, what was measured, and what was not.

    Args:
        root: folder of environments, models and logs.
        peers: rows of the table.
    """

    def __init__(self, root: Path, peers: list[Peer]) -> None:
        self.root = root
        self.peers = peers
        self.missing: list[dict[str, str]] = []
        self.versions: dict[str, dict[str, str]] = {}
        self.offline: list[dict[str, Any]] = []
        self.served: list[dict[str, Any]] = []
        self.agreement: dict[str, dict[str, dict[str, Any]]] = {}
        self.references: set[str] = set()
        self._wanted: dict[tuple[str, str], tuple[str, list[np.ndarray]]] = {}
        self.folders: dict[tuple[str, str], Path] = {}
        self._logs = root / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)

    def miss(self, peer: Peer, what: str, error: PeerError) -> None:
        """Note why `peer` has no figure; the run goes on without it."""
        print(f"  ! {peer.name}, {what}: {error}", flush=True)
        self.missing.append({"peer": peer.name, "what": what, "reason": str(error)})

    def python(self, peer: Peer) -> Path:
        """The Python of a peer."""
        return envs.python_of(ENVS[peer.env], self.root) if peer.env else Path(sys.executable)

    def folder(self, peer: Peer, task: str) -> Path:
        """The model of `task` in the peer's form."""
        return self.folders[task, peer.form]

    def prepare(self, tasks: list[str]) -> None:
        """Environments, models and their exports; peers without theirs are left out."""
        for task, folder in texts.models(self.root / "models").items():
            self.folders[task, "torch"] = folder
        own = envs.versions(Path(sys.executable), ("torch", "transformers"))
        self.versions[CENOTE] = {"cenote": cenote.__version__, **own}
        failed: dict[str, PeerError] = {}
        forms = {peer.form for peer in self.peers} - {"torch"}
        names = [peer.env for peer in self.peers if peer.env and not peer.absent] + [FORMS[form] for form in forms]
        for name in dict.fromkeys(names):
            print(f"environment {name}", flush=True)
            try:
                envs.make(ENVS[name], self.root)
                self.versions[name] = envs.versions(envs.python_of(ENVS[name], self.root), ENVS[name].reports)
            except (PeerError, subprocess.CalledProcessError) as error:
                failed[name] = PeerError(str(error))
        for form, task in itertools.product(sorted(forms), tasks):
            if task in (EMBED, RERANK) and FORMS[form] not in failed:
                try:
                    self.folders[task, form] = self._export(form, task)
                except PeerError as error:
                    failed[f"{task}-{form}"] = PeerError(f"the model cannot be exported: {error}")
        ready = []
        for peer in self.peers:
            reasons = [failed[key] for key in (peer.env, FORMS.get(peer.form)) if key in failed]
            reasons += [failed[key] for key in (f"{task}-{peer.form}" for task in tasks) if key in failed]
            if peer.absent or (peer.needs and not any(flag in _flags() for flag in peer.needs)):
                reasons = [PeerError(peer.absent or f"this processor has none of {', '.join(peer.needs)}")]
            if reasons:
                self.miss(peer, "everything", reasons[0])
            else:
                ready.append(peer)
        self.peers = ready

    def _export(self, form: str, task: str) -> Path:
        target = self.root / "models" / f"{task}-{form}"
        if not target.is_dir():
            half = target.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            exporter = next(peer for peer in PEERS if peer.env == FORMS[form])
            with self._workers([exporter], os.cpu_count() or 1) as workers:
                source = str(self.folders[task, "torch"])
                workers[exporter.name].ask("export", task=task, folder=source, target=str(half))
            half.rename(target)
        return target

    @contextmanager
    def _workers(self, peers: list[Peer], threads: int) -> Iterator[dict[str, Worker]]:
        workers: dict[str, Worker] = {}
        try:
            for peer in peers:
                workers[peer.name] = self._worker(peer, threads)
            yield workers
        finally:
            _stop(workers)

    def _worker(self, peer: Peer, threads: int) -> Worker:
        engine = HERE / "engines" / f"{peer.engine.replace('-', '_')}.py"
        log = self._log(peer, f"{threads}")
        return Worker(self.python(peer), engine, peer.variant, threads, peer.environment, log)

    def _log(self, peer: Peer, what: str) -> Path:
        return self._logs / f"{''.join(c if c.isalnum() else '-' for c in peer.name)}-{what}.log"

    def compare(self, task: str, workload: str, peer: str, got: list[np.ndarray]) -> None:
        """Note how far an answer is from the reference's; who answers a workload first is its reference."""
        key = (EMBED if task == "served" else task, workload)
        reference, wanted = self._wanted.setdefault(key, (peer, got))
        self.references.add(reference)
        if task == "served":  # a request has the first texts only
            wanted = [rows[: len(some)] for rows, some in zip(wanted, got, strict=True)]
        table = self.agreement.setdefault(task, {}).setdefault(workload, {})
        if peer not in table:
            table[peer] = figures.agreement(got, wanted)

    def run_offline(self, work: dict[str, dict[str, Any]], threads: int, rounds: int) -> None:
        """Every peer's time for every workload, turn by turn.

        Args:
            work: task -> workload -> order.
        """
        peers = [peer for peer in self.peers if set(peer.tasks) & set(work)]
        peers.sort(key=lambda peer: peer.name != REFERENCE)
        with self._workers(peers, threads) as workers:
            for task, orders in work.items():
                where = f"{task}, {threads} thread{'s' if threads > 1 else ''}"
                ready, slow = [], set[tuple[str, str]]()
                for peer in (peer for peer in peers if task in peer.tasks):
                    try:
                        if not workers[peer.name].alive:  # it failed in another task
                            workers[peer.name].stop()
                            workers[peer.name] = self._worker(peer, threads)
                        workers[peer.name].ask("load", task=task, folder=str(self.folder(peer, task)))
                        for order in orders.values():
                            workers[peer.name].run(task, _part(order))
                        ready.append(peer)
                    except PeerError as error:
                        self.miss(peer, where, error)
                for turn in range(rounds):
                    for workload, order in orders.items():
                        # The reference first, as its vectors are needed; then every second round backwards.
                        for peer in ready[::-1] if turn % 2 else list(ready):
                            if (peer.name, workload) in slow:
                                continue
                            try:
                                cpu, wall, arrays = workers[peer.name].run(task, order)
                            except PeerError as error:
                                self.miss(peer, f"{where}, {workload}", error)
                                ready.remove(peer)
                                continue
                            if wall > PATIENCE and turn + 1 < rounds:
                                slow.add((peer.name, workload))
                                reason = PeerError(f"measured {turn + 1} of {rounds} times: it took {wall:.0f} s")
                                self.miss(peer, f"{where}, {workload}", reason)
                            time.sleep(peer.settle)
                            self.compare(task, workload, peer.name, arrays)
                            found = {"task": task, "workload": workload, "threads": threads, "peer": peer.name}
                            found |= {"round": turn, "cpu": cpu, "wall": wall, "texts": _size(order)}
                            self.offline.append(found)
                            said = f"{where}, {workload}, round {turn + 1}"
                            print(f"  {said:<40} {peer.name:<58} {cpu:7.2f} CPU s {wall:7.2f} s", flush=True)

    def run_served(self, work: dict[str, list[str]], clients: list[int], seconds: float, rounds: int) -> None:
        """Closed loops of `clients`, then an open loop, for every peer that has a server, turn by turn."""
        cores = os.cpu_count() or 1
        servers: dict[str, Server] = {}
        sides: dict[str, Clients] = {}
        try:
            ready = []
            for peer in (peer for peer in self.peers if peer.serve):
                folder, log = self.folder(peer, EMBED), self._log(peer, "server")
                server = Server(peer.serve, self.python(peer), folder, cores, peer.environment, log)
                servers[peer.name] = server
            for peer in (peer for peer in self.peers if peer.name in servers):
                try:
                    server = servers[peer.name]
                    server.wait(PATH, _body(["hello"]))
                    sides[peer.name] = Clients(server.port, MODEL)
                    for workload, some in work.items():
                        self.compare("served", workload, peer.name, [_vectors(server.post(PATH, _body(some[:16])))])
                        sides[peer.name].closed(some, clients[-1], seconds / 2)
                    ready.append(peer)
                except PeerError as error:
                    self.miss(peer, "served", error)
            best: dict[tuple[str, str], list[float]] = {}
            for turn, workload in itertools.product(range(rounds), work):
                for level in [*clients, None]:
                    for peer in ready[::-1] if turn % 2 else list(ready):
                        side, rates = sides[peer.name], best.setdefault((peer.name, workload), [])
                        said = f"served, {workload}, {f'{level} clients' if level else 'open loop'}, round {turn + 1}"
                        try:
                            if level is None:
                                if not any(rates):
                                    raise PeerError(f"its server never answered within {seconds:g} s")
                                found = side.opened(work[workload], LOAD * max(rates), seconds, seed=turn)
                            else:
                                found = side.closed(work[workload], level, seconds)
                                rates.append(found["rate"])
                        except PeerError as error:
                            self.miss(peer, said, servers[peer.name].died() if not servers[peer.name].alive else error)
                            ready.remove(peer)
                            continue
                        time.sleep(peer.settle)
                        self.served.append(
                            {"peer": peer.name, "workload": workload, "clients": level, "round": turn} | found
                        )
                        late = statistics.median(found["latencies"] or [0]) * 1000
                        said = f"{said:<48} {peer.name:<20} {found['rate']:8.1f}/s"
                        print(f"  {said}   median {late:7.1f} ms", flush=True)
        finally:
            _stop(sides)
            _stop(servers)


def _stop(several: dict[str, Any]) -> None:
    """Stop workers, servers or clients."""
    for one in several.values():
        one.stop()


def _flags() -> list[str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])


def _part(order: Any) -> Any:
    return (order[0], order[1][:32]) if isinstance(order, tuple) else order[:32]


def _size(order: Any) -> int:
    return len(order[1] if isinstance(order, tuple) else order)


def _body(some: list[str]) -> bytes:
    return json.dumps({"model": MODEL, "input": some, "encoding_format": "base64"}).encode()


def _vectors(answer: bytes) -> np.ndarray:
    rows = sorted(json.loads(answer)["data"], key=lambda row: row["index"])
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows])


def _chosen(words: list[str] | None) -> list[Peer]:
    for word in words or []:
        if not any(word.lower() in peer.name.lower() for peer in PEERS):
            raise SystemExit(f"--peers: {word!r} is in no name; there are {', '.join(peer.name for peer in PEERS)}")
    named = [peer for peer in PEERS if words is None or any(word.lower() in peer.name.lower() for word in words)]
    return [peer for peer in PEERS if peer.name == CENOTE or peer in named]


def _draw(bench: Bench, source: Path) -> None:
    try:
        envs.make(ENVS["plot"], bench.root)
    except PeerError as error:
        print(f"  ! no plot: {error}", flush=True)
        return
    python = envs.python_of(ENVS["plot"], bench.root)
    done = subprocess.run([str(python), "-P", str(HERE / "plot.py"), str(source), str(source.with_suffix(".png"))])
    if done.returncode:
        print(f"  ! no plot: exit status {done.returncode}", flush=True)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("short", "mixed", "long", RERANK, COLBERT)
    parser.add_argument("--texts", type=int, default=200, help="mixed texts; the others follow (200)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which medians are taken (3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each served measurement (2)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], help="of the closed loops (1 16 64)")
    parser.add_argument("--peers", nargs="+", metavar="PART", help="only peers with one of these in their name")
    parser.add_argument("--workloads", nargs="+", choices=names, default=list(names), help="(all)")
    parser.add_argument("--parts", nargs="+", choices=("offline", "served"), default=["offline", "served"])
    parser.add_argument("--envs", type=Path, default=Path(".bench"), help="environments, models, logs (.bench)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report (benchmarks/results)")
    parser.add_argument("--name", default=f"{date.today().isoformat()}-peers", help="of the report (DATE-peers)")
    parser.add_argument("--quick", action="store_true", help="24 texts, 1 round, 1 s: proves that it runs, no more")
    options = parser.parse_args()
    if options.quick:
        options.texts, options.rounds, options.seconds = 24, 1, 1.0
        options.out, options.name = options.envs, "quick"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that every `finally` runs

    bench = Bench(options.envs.resolve(), _chosen(options.peers))
    plain = [name for name in options.workloads if name not in (RERANK, COLBERT)]
    tasks = [EMBED] * bool(plain) + [task for task in (RERANK, COLBERT) if task in options.workloads]
    bench.prepare(tasks)
    folder = bench.folders[EMBED, "torch"]
    every = texts.workloads(folder, options.texts)
    query, documents = texts.pairs(every["mixed"])
    work: dict[str, dict[str, Any]] = {EMBED: {name: every[name] for name in plain}}
    if RERANK in tasks:
        work[RERANK] = {RERANK: (query, documents)}
    if COLBERT in tasks:
        work[COLBERT] = {COLBERT: every["mixed"]}
    cores = os.cpu_count() or 1
    if "offline" in options.parts:
        for threads in sorted({1, cores}):
            bench.run_offline({task: orders for task, orders in work.items() if orders}, threads, options.rounds)
    if "served" in options.parts and plain:
        bench.run_served(work[EMBED], sorted(options.clients), options.seconds, options.rounds)
    _report(bench, options, {**every, RERANK: documents, COLBERT: every["mixed"]}, folder, cores)


def _report(bench: Bench, options: Any, every: dict[str, list[str]], folder: Path, cores: int) -> None:
    sizes = {}
    for name in options.workloads:
        counts = texts.tokens(folder, every[name])
        sizes[name] = {"texts": len(counts), "tokens": sum(counts), "median": statistics.median(counts)}
        sizes[name] |= {"least": min(counts), "most": max(counts)}
    offline = figures.offline(bench.offline, cores)
    result: dict[str, Any] = {
        "rounds": options.rounds,
        "workloads": sizes,
        "goals": figures.goals(offline) if offline else [],
        "offline": offline,
        "served": figures.served(bench.served),
        "references": sorted(bench.references),
        "agreement": bench.agreement,
        "missing": bench.missing,
        "measurements": bench.offline,
        "served_measurements": [{k: v for k, v in one.items() if k != "latencies"} for one in bench.served],
    }
    command = f"python -m benchmarks.peers {_command(options)}".strip()
    source = save(options.name, result, command, bench.versions, options.out)
    page = figures.page(result)
    source.with_suffix(".md").write_text(page)
    _draw(bench, source)
    print(f"\n{page}\n{source.with_suffix('.md')}")


def _command(options: Any) -> str:
    given = {"texts": options.texts, "rounds": options.rounds, "seconds": f"{options.seconds:g}"}
    words = [f"--{name} {value}" for name, value in given.items()]
    words += [f"--{name} {' '.join(map(str, getattr(options, name)))}" for name in ("clients", "workloads", "parts")]
    return " ".join(words + ([f"--peers {' '.join(options.peers)}"] if options.peers else []))


if __name__ == "__main__":
    main()
