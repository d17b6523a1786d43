"""Optional CPU kernels, compiled on first use with the system's C++ compiler and loaded with ctypes.

All of it may be absent: `load` returns `None` where there is no compiler, the build fails, the processor has no wide
vectors, or the kernels disagree with torch; callers then keep to plain torch. The source is `kernels.cpp`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
# Without -ffast-math: infinities and NaN keep their meaning.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)
LONGEST = 2048
"""Sequences beyond this length are as fast with torch's own kernel."""
NARROWEST = 8
"""Vectors with fewer lanes (SSE) lose against torch."""


class Kernels:
    """The compiled functions. Calls release the GIL and use as many threads as torch."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, long, real, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
        self._attention = library.packed_attention
        strided = (pointer, long, long)
        self._attention.argtypes = [*strided, *strided, *strided, pointer, pointer, *[long] * 4, real, integer]
        self._attention.restype = integer
        self._bias_gelu = library.bias_gelu
        self._bias_gelu.argtypes = [pointer, pointer, long, long, integer]
        self._bias_gelu.restype = None
        self.width: int = library.vector_width()

    def can_attend(self, q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, longest: int) -> bool:
        """Whether `attend` takes these tensors: float32 on the CPU, with a head size in whole vectors."""
        return (
            longest <= LONGEST
            and q_1NTH.shape[-1] % self.width == 0
            and k_1NTH.shape == v_1NTH.shape
            and q_1NTH.shape[-1] == k_1NTH.shape[-1]
            and not torch.is_grad_enabled()
            and all(
                x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1
                for x in (q_1NTH, k_1NTH, v_1NTH)
            )
        )

    def attend(self, q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, starts: Tensor, scale: float) -> Tensor:
        """Attention without mask within each sequence: `[1, T, N, H]`, contiguous.

        Args:
            q_1NTH: queries; keys and values may have fewer heads, whole groups of queries sharing one.
            starts: B + 1 int64 offsets.
            scale: factor on the dot products.

        Raises:
            MemoryError: there is no room for the scores of one block of queries.
        """
        _, heads, tokens, size = q_1NTH.shape
        out_1TNH = torch.empty(1, tokens, heads, size)
        strided = [x for t in (q_1NTH, k_1NTH, v_1NTH) for x in (t.data_ptr(), t.stride(1), t.stride(2))]
        failed = self._attention(
            *strided,
            out_1TNH.data_ptr(),
            starts.data_ptr(),
            len(starts) - 1,
            heads,
            heads // k_1NTH.shape[1],
            size,
            scale,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("packed attention")
        return out_1TNH

    def bias_gelu_(self, y_RD: Tensor, bias_D: Tensor) -> Tensor:
        """`gelu(y + bias)` in place, in its exact (erf) form; contiguous float32, D in whole vectors."""
        rows, columns = y_RD.shape
        self._bias_gelu(y_RD.data_ptr(), bias_D.data_ptr(), rows, columns, torch.get_num_threads())
        return y_RD

    def agree_with_torch(self) -> bool:
        """Whether small awkward cases equal torch in float64."""
        generator = torch.Generator().manual_seed(0)
        lengths = [1, 2, 7, 16, 17, 33, 70]
        starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])
        with torch.inference_mode():
            for size, heads, kv_heads in ((32, 3, 3), (64, 4, 2), (128, 8, 8)):
                q, k, v = (
                    torch.randn(1, sum(lengths), n, size, generator=generator).transpose(1, 2)
                    for n in (heads, kv_heads, kv_heads)
                )
                if not self.can_attend(q, k, v, max(lengths)):
                    return False
                got = self.attend(q, k, v, starts, size**-0.5)
                for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
                    one_q, one_k, one_v = (x[:, :, a:b].double() for x in (q, k, v))
                    want = F.scaled_dot_product_attention(
                        one_q, one_k, one_v, scale=size**-0.5, enable_gqa=heads != kv_heads
                    )
                    if not torch.allclose(got[:, a:b].double(), want.transpose(1, 2), atol=1e-5, rtol=1e-5):
                        return False
            y, bias = torch.randn(5, 64, generator=generator) * 4, torch.randn(64, generator=generator)
            want = F.gelu(y.double() + bias.double())
            return torch.allclose(self.bias_gelu_(y, bias).double(), want, atol=2e-6, rtol=1e-6)


@functools.cache
def load() -> Kernels | None:
    """The kernels, built if need be (about a second, once per processor and compiler), or `None`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cenote"
    try:
        kernels = Kernels(build(cache))
        if kernels.width < NARROWEST or not kernels.agree_with_torch():
            log.info("native kernels are not used: they do not suit this processor")
            return None
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        log.info("native kernels are not used: %s", error)
        return None
    return kernels


def build(folder: Path) -> Path:
    """Compile the kernels into `folder`, unless they are there already; returns the library.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: `folder` cannot be written, or belongs to somebody else.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise RuntimeError("there is no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    parts = [SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor().encode()]
    target = folder / f"kernels-{hashlib.sha256(bytes(0).join(parts)).hexdigest()[:20]}.so"
    if target.exists():
        return target
    problem = ""
    for openmp in (["-fopenmp"], []):  # one thread rather than nothing where OpenMP is missing
        handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        command = [compiler, *FLAGS, *openmp, str(SOURCE), "-o", name]
        done = subprocess.run(command, capture_output=True, timeout=120)
        if done.returncode == 0:
            os.replace(name, target)  # atomic: another process may build at the same time
            return target
        os.unlink(name)
        problem = done.stderr.decode(errors="replace")[-500:]
    raise RuntimeError(f"the compiler failed: {problem}")


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk may meet another processor."""
    kept = {"vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part"}
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in kept)


def keep_freed_memory() -> None:
    """Keep glibc from giving activations back to the system after every layer, and faulting them in again.

    Freeing one large mapped block raises malloc's mmap threshold to its size and the trim threshold to twice that
    (ceilings: 32 and 64 MiB). Without effect on other allocators.
    """
    del [torch.empty(31 << 20, dtype=torch.uint8)][0]
