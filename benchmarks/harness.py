"""What the benchmarks share: processes that take turns, the GEMM rate, and results on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's spinning threads would slow torch's GEMMs
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

RESULTS = Path(__file__).parent / "results"

Encode = Callable[[Any], Any]


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds of this process, wall seconds, and the result."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def gemm_rate(shapes: list[tuple[int, int]], layers: int, tokens: int = 2048) -> float:
    """FLOP per CPU second of Linear layers of these (out, in) shapes over `tokens` rows; the best of five rounds."""
    weights = [torch.randn(out, into) for out, into in shapes * layers]
    inputs = {into: torch.randn(tokens, into) for _, into in shapes}
    with torch.inference_mode():
        best = min(
            timed(lambda: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in weights])[0] for _ in range(5)
        )
    return 2 * tokens * sum(w.numel() for w in weights) / best


def _work(make: Callable[..., Encode], arguments: tuple[Any, ...], pipe: Connection) -> None:
    encode = make(*arguments)
    while (order := pipe.recv()) is not None:
        pipe.send(timed(lambda order=order: encode(order)))


class Worker:
    """One engine in a process of its own, with a fixed number of threads.

    Args:
        make: a function of a module, called in the process with `arguments`; it returns what answers the orders.
    """

    def __init__(self, make: Callable[..., Encode], *arguments: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        context.Process(target=_work, args=(make, arguments, theirs), daemon=True).start()

    def ask(self, order: Any) -> tuple[float, float, Any]:
        """CPU seconds, wall seconds and the answer of the process."""
        self._pipe.send(order)
        answer: tuple[float, float, Any] = self._pipe.recv()
        return answer

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)


def row(name: str, value: str, goal: str = "") -> None:
    """Print a line of a result."""
    print(f"{name:<66} {value:>16}   {goal}", flush=True)


def save(
    name: str, result: dict[str, Any], command: str, versions: dict[str, Any] | None = None, folder: Path = RESULTS
) -> Path:
    """Write `result` as `results/NAME.json`, with the machine, the versions, the date and the command."""
    result["machine"] = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    result["versions"] = versions or {"torch": torch.__version__}
    result["date"] = date.today().isoformat()
    result["command"] = command
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    wide = "AVX-512" if any("avx512f" in line for line in lines) else "no AVX-512"
    return f"{names[0] if names else platform.processor()} ({wide})"
