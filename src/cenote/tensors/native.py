"""Optional CPU kernels, compiled on first use with the system's C++ compiler and loaded with ctypes.

All of it may be absent: `load` returns `None` where there is no compiler, the build fails, the processor has no wide
vectors, or the kernels disagree with torch; callers then keep to plain torch. It is an error only if options name
instructions. The source is `kernels.cpp`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import subprocess
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.config import Isa
from cenote.errors import ConfigError
from cenote.tensors import library
from cenote.tensors.chains import ACTIVATIONS, Chain, Step, address_of, numbers_of
from cenote.tensors.packing import spans_of

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
VARIABLE = "CENOTE_ISA"
LONGEST = 8192
"""Keys of a sequence beyond which torch's own kernel is faster."""
SHORTEST_BLOCK, LONGEST_BLOCK = 64, 256
"""Rows that pass a chain of Linear layers together: fewer waste the BLAS, more leave the cache."""
STEADY_BLOCKS = {16: 1.5, 32: 1.25, 64: 1.1, 128: 1.0}
"""Rows of products in which a row may not depend on others, and the time that each of them takes, about."""
CACHE = 3 << 19
"""Bytes that the widest layer's rows of a block may take."""


class Target(NamedTuple):
    """Processor that the kernels are compiled for.

    Attributes:
        march: its name, for the compiler.
        lanes: float32 numbers of a vector, at least; with four (SSE) the kernels lose against torch.
    """

    march: str
    lanes: int


TARGETS: dict[Isa, Target] = {
    "auto": Target("native", 8),
    "avx2": Target("haswell", 8),
    "avx512": Target("native", 16),
    "amx": Target("native", 16),
}


_THREADS: ContextVar[int] = ContextVar("cenote_threads", default=0)
"""CPU threads of the kernels, where torch has another number; 0 = torch's."""


def threads() -> int:
    """Return the number of CPU threads that kernels may use."""
    return _THREADS.get() or torch.get_num_threads()


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Run torch's operators within on one thread, and the kernels here on as many as torch had.

    torch cuts tensors into as many parts as it has threads, and computes the ends of parts by other instructions.
    """
    count = torch.get_num_threads()
    token = _THREADS.set(threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _THREADS.reset(token)


class Kernels:
    """The compiled functions. Calls release the GIL and use as many threads as torch.

    Args:
        path: of the library.
        isa: instructions that it may use.
    """

    def __init__(self, path: Path, isa: Isa = "auto") -> None:
        self.isa = isa
        compiled = ctypes.CDLL(str(path))
        pointer, long, real, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
        self._attention = compiled.packed_attention
        strided = (pointer, long, long)
        self._attention.argtypes = [*strided * 3, pointer, pointer, *[long] * 4, real, integer, long, integer]
        self._attention.restype = integer
        self._rms_norm = compiled.rms_norm
        self._rms_norm.argtypes = [pointer, pointer, real, pointer, long, long, integer]
        self._rms_norm.restype = None
        self._chain = compiled.linear_chain
        states = (pointer, long, pointer, long, pointer)
        self._chain.argtypes = [pointer, pointer, integer, *states, long, long, integer, integer]
        self._chain.restype = integer
        self._blas = _Blas.find()
        self.width: int = compiled.vector_width()

    def can_attend(self, q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, longest: int) -> bool:
        """Return whether `attend` takes these tensors: float32 on the CPU, with a head size in whole vectors."""
        traits = {(x.dtype, x.is_cpu, x.stride(-1)) for x in (q_1NTH, k_1NTH, v_1NTH)}
        conditions = (
            longest <= LONGEST,
            q_1NTH.shape[-1] % self.width == 0,
            k_1NTH.shape == v_1NTH.shape,
            q_1NTH.shape[-1] == k_1NTH.shape[-1],
            not torch.is_grad_enabled(),
            traits == {(torch.float32, True, 1)},
        )
        return all(conditions)

    def attend(
        self,
        q_1NTH: Tensor,
        k_1NTH: Tensor,
        v_1NTH: Tensor,
        spans_B7: Tensor,
        scale: float,
        *,
        causal: bool = False,
        window: int | None = None,
    ) -> Tensor:
        """Attention within each sequence and its prefix: `[1, Q, N, H]`, contiguous.

        The result of a query depends on nothing but itself and the keys and values that it may see: not on the other
        queries, the other sequences, the threads, or whether keys lie in a prefix.

        Args:
            q_1NTH: queries `[1, N, Q, H]`; keys and values may have fewer heads, whole groups of queries sharing one.
            k_1NTH: keys.
            v_1NTH: values.
            spans_B7: rows of each sequence, as `cenote.tensors.packing.spans_of` makes them.
            scale: factor on the dot products.
            causal: a query sees keys up to its own position only.
            window: a query sees keys nearer than this many positions; `None` = all.

        Raises:
            MemoryError: there is no room for the scores of one block of queries.
        """
        _, heads, tokens, size = q_1NTH.shape
        out_1TNH = torch.empty(1, tokens, heads, size, dtype=torch.float32, device="cpu")
        strided = [x for t in (q_1NTH, k_1NTH, v_1NTH) for x in (t.data_ptr(), t.stride(1), t.stride(2))]
        failed = self._attention(
            *strided,
            out_1TNH.data_ptr(),
            *(spans_B7.data_ptr(), len(spans_B7), heads, heads // k_1NTH.shape[1], size),
            *(scale, causal, window or 0, threads()),
        )
        if failed:
            raise MemoryError("packed attention")
        return out_1TNH

    def rms_norm(self, x: Tensor, gamma_D: Tensor, epsilon: float) -> Tensor:
        """`x / sqrt(mean of x^2 + epsilon) * gamma` over the last dimension, contiguous.

        Raises:
            TypeError: `x` is not float32 on the CPU, or its rows have another size than `gamma_D`.
        """
        if (x.dtype, x.device.type, x.shape[-1:]) != (torch.float32, "cpu", gamma_D.shape):
            raise TypeError(f"expected float32 [..., {len(gamma_D)}] on the CPU, got {x.dtype} {tuple(x.shape)}")
        x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        self._rms_norm(x.data_ptr(), gamma_D.data_ptr(), epsilon, out.data_ptr(), rows, x.shape[-1], threads())
        return out

    @property
    def can_chain(self) -> bool:
        """Whether there is a BLAS that multiplies by packed matrices: torch's MKL, on x86."""
        return self._blas is not None

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> BlasMatrix:
        """See `Products`; the order is that in which the BLAS reads the matrix."""
        assert self._blas is not None
        rows, columns = weight.shape
        return BlasMatrix(self._blas.pack(weight.detach().contiguous()), rows, columns, bias)

    def unpack(self, packed: BlasMatrix) -> Tensor:
        """See `Products`: products with the unit vectors are exact."""
        return (
            self.chain((Step(packed._replace(bias=None)),))(
                torch.eye(packed.columns, dtype=torch.float32, device="cpu")
            )
            .t()
            .contiguous()
        )

    def chain(self, steps: tuple[Step[BlasMatrix], ...]) -> Chain[BlasMatrix]:
        """See `Products`."""
        widest = max(step.weights.rows for step in steps)
        block = max(SHORTEST_BLOCK, min(LONGEST_BLOCK, CACHE // (4 * widest)))
        return Chain(partial(self._run_chain, block), (_Step * len(steps))(*map(_plain, steps)), steps)

    def _run_chain(self, block: int, steps: ctypes.Array[_Step], rows: int, *states: int | None) -> None:
        """See `Chain`. `block` is the maximum number of rows that go through the layers at a time."""
        count = threads()
        if rows > block or count > 1:
            turns = -(-rows // (block * count))
            block = max(SHORTEST_BLOCK, -(-rows // (turns * count)))
        self.run_blocks(block, False, steps, rows, *states)

    def run_blocks(self, block: int, fixed: bool, steps: ctypes.Array[_Step], rows: int, *states: int | None) -> None:
        """Run `linear_chain` of kernels.cpp; see `Chain`."""
        assert self._blas is not None
        if self._chain(self._blas.compute, steps, len(steps), *states, rows, block, threads(), fixed):
            raise MemoryError("a chain of Linear layers")

    def agree_with_torch(self) -> bool:
        """Return whether small awkward cases equal torch in float64."""
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            heads = ((32, 3, 3), (64, 4, 2), (128, 8, 8))
            if not all(self._attention_agrees(*numbers, generator) for numbers in heads):
                return False
            x, gamma = 3 * drawn(generator, 3, 5, 97), drawn(generator, 97)
            expected = F.rms_norm(x.double(), (97,), gamma.double(), 1e-5)
            if not torch.allclose(self.rms_norm(x, gamma, 1e-5).double(), expected, atol=1e-5, rtol=1e-5):
                return False
            return not self.can_chain or self._chains_agree(generator)

    def _attention_agrees(self, size: int, heads: int, kv_heads: int, generator: torch.Generator) -> bool:
        lengths = [1, 2, 7, 16, 17, 33, 70]
        starts = list(accumulate(lengths, initial=0))
        q, k, v = (drawn(generator, 1, starts[-1], n, size).transpose(1, 2) for n in (heads, kv_heads, kv_heads))
        if not self.can_attend(q, k, v, max(lengths)):
            return False
        for causal, window in ((False, None), (True, None), (False, 9), (True, 20)):
            out = self.attend(q, k, v, spans_of(starts), size**-0.5, causal=causal, window=window)
            for start, stop in pairwise(starts):
                parts = [x[:, :, start:stop].double() for x in (q, k, v)]
                expected = _attention(*parts, causal=causal, window=window).transpose(1, 2)
                if not torch.allclose(out[:, start:stop].double(), expected, atol=1e-5, rtol=1e-5):
                    return False
        return True

    def _chains_agree(self, generator: torch.Generator) -> bool:
        first, second = nn.Linear(40, 100, dtype=torch.float32), nn.Linear(100, 40, bias=False, dtype=torch.float32)
        norm = nn.LayerNorm(40, dtype=torch.float32)
        for parameter in (*first.parameters(), *second.parameters(), *norm.parameters()):
            parameter.copy_(drawn(generator, *parameter.shape))
        packed = [self.pack(linear.weight, linear.bias) for linear in (first, second)]
        for rows in (1, 5, 300):
            x, residual = drawn(generator, rows, 40), drawn(generator, rows, 40)
            hidden = F.linear(x.double(), first.weight.double(), first.bias.double())
            for name, apply in ACTIVATIONS.items():
                product = F.linear(apply(hidden), second.weight.double()) + residual
                expected = F.layer_norm(product, (40,), norm.weight.double(), norm.bias.double(), norm.eps)
                steps = (Step(packed[0], activation=name), Step(packed[1], norm=norm))
                if not torch.allclose(self.chain(steps)(x, residual).double(), expected, atol=2e-5, rtol=1e-5):
                    return False
        unpacked = [self.unpack(weights) for weights in packed]
        return torch.equal(unpacked[0], first.weight) and torch.equal(unpacked[1], second.weight)


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """Return random numbers, float32 on the CPU whatever torch's defaults are: another thread may change them."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None) -> Tensor:
    """Attention within one sequence by torch, `[1, N, L, H]`."""
    length = q.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance.abs() < (window or length)
    if causal:
        seen &= distance >= 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])


class Steady:
    """Products by a BLAS in which a row does not depend by a bit on the others: see `Products`.

    A BLAS chooses the order of its sums by the shape of the product. So products have one of a few numbers of rows,
    filled up with zeros, and run on one thread each; of these numbers those are used that are proved, for each shape of
    a matrix, to give a row the same bits at every place.

    Args:
        kernels: of the processor.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._blocks: dict[tuple[int, int], frozenset[int]] = {}

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> BlasMatrix:
        """Copy a matrix, and the bias of its layer."""
        with torch_on_one_thread():
            return self._kernels.pack(weight, bias)

    def unpack(self, packed: BlasMatrix) -> Tensor:
        """Return the very same matrix."""
        return self._kernels.unpack(packed)

    def chain(self, steps: tuple[Step[BlasMatrix], ...]) -> Chain[BlasMatrix]:
        """Return a chain of the layers."""
        blocks = sorted(frozenset.intersection(*(self._proved(step.weights) for step in steps)))
        return Chain(
            partial(self._run, blocks or [max(STEADY_BLOCKS)]), (_Step * len(steps))(*map(_plain, steps)), steps
        )

    def _run(self, blocks: list[int], layers: ctypes.Array[_Step], rows: int, *states: int | None) -> None:
        """See `Chain`; products have one of `blocks` rows, that which takes least time."""
        count = threads()
        block = min(blocks, key=lambda size: -(-rows // (size * count)) * size * STEADY_BLOCKS[size])
        self._kernels.run_blocks(block, True, layers, rows, *states)

    def _proved(self, weights: BlasMatrix) -> frozenset[int]:
        """Return the numbers of rows in which a row has the same bits at every place of all of them."""
        shape = (weights.rows, weights.columns)
        if shape not in self._blocks:
            x_1D = drawn(torch.Generator().manual_seed(0), 1, weights.columns)
            products = {block: self._repeated(weights, x_1D, block) for block in STEADY_BLOCKS}
            first_N = products[max(STEADY_BLOCKS)][0]
            self._blocks[shape] = frozenset(size for size, x_RN in products.items() if bool((x_RN == first_N).all()))
        return self._blocks[shape]

    def _repeated(self, weights: BlasMatrix, x_1D: Tensor, block: int) -> Tensor:
        """Return the product of one row, `block` times."""
        steps = (Step(weights._replace(bias=None)),)
        chain = Chain(partial(self._run, [block]), (_Step * 1)(*map(_plain, steps)), steps)
        with torch_on_one_thread():
            return chain(x_1D.expand(block, -1).contiguous())


class _Step(ctypes.Structure):
    """`Step` of kernels.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("into", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("activation", ctypes.c_int32),
    )


class BlasMatrix(NamedTuple):
    """A matrix in the order in which the BLAS reads it.

    Attributes:
        memory: its bytes. Most of those that MKL reserves beyond the matrix are never touched, so they cost nothing.
        rows: outputs of the layer.
        columns: inputs of the layer.
        bias: of the layer.
    """

    memory: mmap.mmap
    rows: int
    columns: int
    bias: Tensor | None

    @property
    def address(self) -> int:
        """Where it begins."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


def _plain(step: Step[BlasMatrix]) -> _Step:
    weights = step.weights
    gamma, beta, epsilon, activation = numbers_of(step)
    return _Step(
        weights.address,
        address_of(weights.bias),
        gamma,
        beta,
        weights.columns,
        weights.rows,
        epsilon,
        activation,
    )


class _Blas:
    """The functions of MKL for packed matrices, which torch carries and exports on x86.

    Packing names a number of rows to tune for; the packed matrix serves any other number as well.
    """

    ROW_MAJOR, TRANSPOSE, MATRIX_B = 101, 112, 162

    def __init__(self, library: ctypes.CDLL) -> None:
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._size = library.cblas_sgemm_pack_get_size
        self._size.argtypes = [integer] * 4
        self._size.restype = ctypes.c_size_t
        self._pack = library.cblas_sgemm_pack
        self._pack.argtypes = [*[integer] * 6, ctypes.c_float, pointer, integer, pointer]
        self._pack.restype = None
        self.compute = ctypes.cast(library.cblas_sgemm_compute, pointer)

    @classmethod
    def find(cls) -> _Blas | None:
        """MKL, or `None` where torch is built with another BLAS."""
        try:
            return cls(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")))
        except (OSError, AttributeError):
            return None

    def pack(self, weight: Tensor) -> mmap.mmap:
        out, into = weight.shape
        memory = mmap.mmap(-1, max(1, self._size(self.MATRIX_B, LONGEST_BLOCK, out, into)))
        target = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._pack(
            self.ROW_MAJOR,
            self.MATRIX_B,
            self.TRANSPOSE,
            LONGEST_BLOCK,
            out,
            into,
            1.0,
            weight.data_ptr(),
            into,
            target,
        )
        return memory


def load(isa: Isa = "auto") -> Kernels | None:
    """Load the kernels, built if need be (about a second, once per processor and compiler).

    Args:
        isa: instructions that they may use; see `chosen`.

    Returns:
        The kernels; `None` for `none`, and for `auto` where they are not available.

    Raises:
        ConfigError: kernels with the instructions named are not available.
    """
    return _load(chosen(isa))


@functools.cache
def _load(isa: Isa) -> Kernels | None:
    if isa == "none":
        return None
    try:
        return _checked(isa)
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        if isa != "auto":
            raise unavailable(isa, error) from error
        log.warning("native kernels are not used: %s", error)
        return None


def chosen(isa: Isa) -> Isa:
    """Return `isa`, or in place of `auto` that of the environment variable `CENOTE_ISA`.

    Raises:
        ConfigError: the variable names none.
    """
    named = os.environ.get(VARIABLE, "auto") if isa == "auto" else isa
    names: tuple[Isa, ...] = get_args(Isa)
    if named not in names:
        raise ConfigError(f"environment variable {VARIABLE} is {named!r}, expected one of {', '.join(names)}")
    return named


def unavailable(isa: Isa, reason: Exception) -> ConfigError:
    """Return the error for instructions that were named and are not available."""
    return ConfigError(
        f"CPU kernels with isa {isa} cannot be had here: {reason}; leave isa out for the widest that can"
    )


def _checked(isa: Isa) -> Kernels:
    """Build, load and try the kernels.

    Raises:
        RuntimeError: they do not suit the processor, or disagree with torch.
    """
    target = TARGETS[isa]
    if isa == "avx2" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        raise RuntimeError("the processor has no AVX2")
    with library.compiled(SOURCE, target.march) as file:
        kernels = Kernels(file, isa)
    if kernels.width < target.lanes:
        raise RuntimeError(f"the processor's vectors have {kernels.width} lanes, expected {target.lanes}")
    if not kernels.agree_with_torch():
        raise RuntimeError("they do not agree with torch")
    return kernels
