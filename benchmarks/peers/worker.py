"""Run by a peer's own Python: makes its engine and answers orders. Standard library only.

    python -P worker.py ENGINE.py VARIANT THREADS
    python -P worker.py --serve COMMAND ...

Orders come over stdin, answers go to stdout: 8 bytes of length, then a pickle. Whatever the libraries print to stdout
goes to stderr. The second form runs a server. Either ends with its whole process group when stdin does, so nothing
outlives the benchmark, however that ends.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

LENGTH = struct.Struct("<Q")
TICKS = os.sysconf("SC_CLK_TCK")


def write(pipe: BinaryIO, message: Any) -> None:
    """Send one message."""
    content = pickle.dumps(message, protocol=5)
    pipe.write(LENGTH.pack(len(content)) + content)
    pipe.flush()


def read(pipe: BinaryIO) -> Any:
    """The next message; raises EOFError at the end."""
    head = pipe.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    return pickle.loads(pipe.read(*LENGTH.unpack(head)))


def cpu_seconds() -> float:
    """CPU seconds of this process, its ended children and its living descendants, these to 10 ms."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + _descendants()


def _descendants() -> float:
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(file.parent.name)
        children.setdefault(int(fields[1]), []).append(pid)
        ticks[pid] = int(fields[11]) + int(fields[12])
    found, total = list(children.get(os.getpid(), [])), 0
    while found:
        pid = found.pop()
        total += ticks[pid]
        found += children.get(pid, [])
    return total / TICKS


def run(answerer: Any, order: Any) -> dict[str, Any]:
    """CPU seconds, wall seconds and the answer: float32 arrays, as (shape, bytes)."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    answer = answerer(order)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    arrays = answer if isinstance(answer, list) else [answer]
    packed = [(tuple(array.shape), array.astype("<f4").tobytes()) for array in arrays]
    return {"cpu": cpu, "wall": wall, "arrays": packed}


def end_group() -> NoReturn:
    """End this process and what it started; libraries leave threads and children behind."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGTERM)
    os._exit(0)


def serve(command: list[str]) -> int:
    """Run a server until it ends or stdin does; its exit status."""

    def watch() -> None:
        os.read(0, 1)  # returns at the end; nothing is ever written
        end_group()

    threading.Thread(target=watch, daemon=True).start()
    code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode
    return code if code >= 0 else 128 - code


def answer_orders(file: str, variant: str, threads: int) -> None:
    """Answer orders until there are no more."""
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    engine: Any = None
    loaded: dict[str, Any] = {}
    while True:
        try:
            order = read(orders)
        except EOFError:
            end_group()
        try:
            if engine is None:
                spec = importlib.util.spec_from_file_location("engine", file)
                assert spec is not None
                assert spec.loader is not None
                engine = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(engine)
            answer: dict[str, Any] = {}
            if order["do"] == "export":
                engine.export(order["task"], order["folder"], order["target"], variant)
            elif order["do"] == "load":
                loaded[order["task"]] = engine.load(order["task"], order["folder"], variant, threads)
            else:
                answer = run(loaded[order["task"]], order["order"])
            write(answers, {"ok": answer})
        except Exception as error:
            traceback.print_exc()
            write(answers, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.exit(serve(sys.argv[2:]))
    answer_orders(sys.argv[1], sys.argv[2], int(sys.argv[3]))
