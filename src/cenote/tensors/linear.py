"""Linear layers on a CPU by products other than those of a BLAS, for float32 inputs and outputs.

float32 itself is multiplied by AMX as sums of bfloat16, without loss. The other kinds narrow the weights. int8 weights
have one scale per output; rows of the input are narrowed inside the kernel, each to bytes of its own range
(`x ~ low + step * q`, q in 0 .. 255), so that a row's result does not depend on its neighbours. bfloat16 is multiplied
where the CPU does so (AMX); elsewhere it is, like float16, only the form in which weights are kept, and they are
widened to float32 while they are read. The source is `linear.cpp`, compiled on first use; a *path* is a choice of
instructions.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import subprocess
from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cenote.functions import coalesce
from cenote.tensors import library, native
from cenote.tensors.chains import ACTIVATIONS, Chain, Step, address_of, numbers_of
from cenote.tensors.native import drawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cenote.config import Isa
    from cenote.tensors.chains import Products
    from cenote.tensors.native import Kernels

    Arrays = tuple[Tensor, Tensor | None, Tensor | None]
    """`Narrow.panels`, `Narrow.scale` and `Narrow.sums`."""

Kind = str
"""Key of `FORMS`."""

SOURCE = pathlib.Path(__file__).with_name("linear.cpp")


class Path(NamedTuple):
    """Products of Linear layers by one set of instructions.

    Attributes:
        kind: of the weights.
        isa: minimum instructions.
        layout: of the weights: multiplied as they are in panels, widened to float32 from tiles, or split with their
            inputs into bfloat16 from blocks, while they are read.
        text: for people.
        pairs: the products of two neighbours are added in 16 bits; see `quantize`.
    """

    kind: Kind
    isa: Isa
    layout: Literal["panels", "tiles", "blocks"]
    text: str
    pairs: bool = False


PATHS: dict[str, Path] = {
    "AVX2": Path("int8", "avx2", "panels", "int8 by AVX2", pairs=True),
    "AVX-VNNI": Path("int8", "avx2", "panels", "int8 by AVX-VNNI"),
    "AVX512-VNNI": Path("int8", "avx512", "panels", "int8 by AVX512-VNNI"),
    "AMX": Path("int8", "amx", "panels", "int8 by AMX"),
    "AMX-BF16": Path("bfloat16", "amx", "panels", "bfloat16 by AMX-BF16"),
    "AMX-FLOAT32": Path("float32", "amx", "blocks", "float32, as sums of bfloat16, by AMX"),
    "AMX-FLOAT16": Path("float16", "amx", "blocks", "float16, as sums of bfloat16, by AMX"),
    "float16": Path("float16", "avx2", "tiles", "float16, widened to float32 as they are read"),
    "bfloat16": Path("bfloat16", "avx2", "tiles", "bfloat16, widened to float32 as they are read"),
}
"""By the names that they have in `linear.cpp`."""
ISAS: tuple[Isa, ...] = ("avx2", "avx512", "amx", "auto")
"""Each allows the instructions of those before it."""
FASTEST: dict[Kind, tuple[str, ...]] = {
    "int8": ("AMX", "AVX512-VNNI", "AVX-VNNI", "AVX2"),
    "bfloat16": ("AMX-BF16", "bfloat16"),
    "float16": ("AMX-FLOAT16", "float16"),
    "float32": ("AMX-FLOAT32",),
}
"""Paths of each kind, the fastest first. vdpbf16ps is no faster than float32 on the processors tried, so it is none."""
PANEL, TILE, WIDE_TILE, LINE = 16, 32, 64, 64
"""Outputs of a panel, of a tile, and of a tile of widened weights; bytes to which rows are padded."""
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""Number of bfloat16 numbers whose sum is exactly one of each."""
WIDEST = 65_536
"""Inputs beyond which sums of 255 * 127 might not fit 32 bits."""


@dataclass(frozen=True, eq=False)
class Narrow:
    """A Linear's weights, as the kernel reads them.

    Attributes:
        path: a key of `PATHS`.
        inputs: D of `[outputs, D]`.
        panels: of int8 and bfloat16 that is multiplied `[panels, groups, 16, G]`, G = 4 int8 or 2 bfloat16; of weights
            that are split see `_blocks`; of weights that are widened `[tiles, D, 64]`.
        scale, sums: of int8, for each output: the scale, and the sum of its weights times it.
        bias: zeros if there is none.
    """

    path: str
    inputs: int
    outputs: int
    panels: Tensor
    scale: Tensor | None
    sums: Tensor | None
    bias: Tensor

    @property
    def groups(self) -> int:
        """4 bytes each, of a row of the input as it is multiplied."""
        lines: int = self.panels.shape[1]
        return 3 * TILE // 2 * lines if PATHS[self.path].layout == "blocks" else lines

    @property
    def parts(self) -> int:
        """Number of bfloat16 numbers into which a weight is split."""
        return PARTS[self.panels.dtype] if PATHS[self.path].layout == "blocks" else 1


def narrow(weight_ND: Tensor, bias_N: Tensor | None, path: str) -> Narrow:
    """Narrow the weights of a Linear for `path`.

    Raises:
        ValueError: D is larger than the kernel takes.
    """
    outputs, inputs = weight_ND.shape
    form = FORMS[PATHS[path].kind]
    panels, scale, sums = form.narrow(weight_ND, PATHS[path])
    return Narrow(path, inputs, outputs, panels, scale, sums, _padded(bias_N, outputs))


def _in_bytes(weight_ND: Tensor, path: Path) -> Arrays:
    """Return weights in int8 as the kernel reads them."""
    outputs, inputs = weight_ND.shape
    if inputs > WIDEST:
        raise ValueError(f"a Linear of {inputs} inputs is too wide, expected at most {WIDEST}")
    codes_ND, scale_N = quantize(weight_ND, pairs=path.pairs)
    sums_N = codes_ND.sum(1, dtype=torch.int64) * scale_N
    return _panels(codes_ND), _padded(scale_N, outputs), _padded(sums_N, outputs)


def _in_floats(weight_ND: Tensor, path: Path) -> Arrays:
    """Return weights of a floating-point kind as the kernel reads them."""
    outputs, inputs = weight_ND.shape
    if path.layout == "blocks":
        exact_ND = weight_ND.half() if path.kind == "float16" else as_stored(weight_ND)
        return _blocks(exact_ND), None, None
    if path.layout == "panels":
        return _panels(weight_ND.bfloat16()), None, None
    half_ND = F.pad(weight_ND.to(getattr(torch, path.kind)), (0, 0, 0, -outputs % WIDE_TILE))
    return half_ND.view(-1, WIDE_TILE, inputs).mT.contiguous(), None, None


def quantize(weight_ND: Tensor, *, pairs: bool) -> tuple[Tensor, Tensor]:
    """Return int8 codes `[N, D]` and their scales `[N]`: symmetric, one scale per output.

    Args:
        pairs: the products of two neighbours are added in 16 bits, so that two codes may be 128 together at most
            (128 * 255 < 2 ** 15). Scales are larger for that, by a third for normally distributed weights.
    """
    weight_ND = weight_ND.float()
    scale_N = weight_ND.abs().amax(1) / 127
    if pairs:
        even_ND = F.pad(weight_ND, (0, weight_ND.shape[1] % 2))
        # Rounding moves the sum of two codes by at most 1
        scale_N = scale_N.maximum((even_ND[:, ::2] + even_ND[:, 1::2]).abs().amax(1) / 127)
    scale_N = scale_N.clamp(min=torch.finfo(torch.float32).tiny)
    return (weight_ND / scale_N[:, None]).round().clamp(-127, 127).to(torch.int8), scale_N


def _panels(narrow_ND: Tensor) -> Tensor:
    """Lay out lines of 64 bytes, one 4-byte group of each of 16 rows; padded with zeros to whole lines and tiles."""
    size = LINE // narrow_ND.element_size()
    outputs, inputs = narrow_ND.shape
    padded_ND = F.pad(narrow_ND, (0, -inputs % size, 0, -outputs % TILE))
    group = 4 // narrow_ND.element_size()
    return padded_ND.view(padded_ND.shape[0] // PANEL, PANEL, -1, group).transpose(1, 2).contiguous()


def as_stored(weight_ND: Tensor) -> Tensor:
    """Return a float32 matrix in the smallest dtype that holds all of it, as checkpoints are often stored in halves."""
    halves = (weight_ND.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((x for x in halves if torch.equal(x.float(), weight_ND)), weight_ND)


def _blocks(weight_ND: Tensor) -> Tensor:
    """`[tiles, blocks, 2, 16, 2, 16]`: 32 outputs; 32 inputs; panels; inputs i; i and i + 16; outputs.

    The last two are the other way round in bfloat16, which is multiplied as it is.
    """
    outputs, inputs = weight_ND.shape
    padded = F.pad(weight_ND, (0, -inputs % TILE, 0, -outputs % TILE))
    blocks = padded.view(-1, 2, PANEL, padded.shape[1] // TILE, 2, TILE // 2).permute(0, 3, 1, 5, 4, 2)
    return (blocks.mT if weight_ND.dtype == torch.bfloat16 else blocks).contiguous()


def unsplit(weights: Narrow) -> Tensor:
    """Return the float32 matrix `[N, D]`, exactly."""
    blocks = weights.panels.mT if weights.panels.dtype == torch.bfloat16 else weights.panels
    whole = blocks.permute(0, 2, 5, 1, 4, 3).reshape(TILE * blocks.shape[0], -1)
    return whole[: weights.outputs, : weights.inputs].float().contiguous()


def _padded(vector_N: Tensor | None, outputs: int) -> Tensor:
    vector_N = coalesce(vector_N, torch.zeros(outputs, dtype=torch.float32, device="cpu"))
    return F.pad(vector_N.float(), (0, -outputs % WIDE_TILE)).contiguous()


class _Step(ctypes.Structure):
    """`NarrowStep` of linear.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "sums", "bias", "gamma", "beta")),
        *((name, ctypes.c_int64) for name in ("into", "out", "groups")),
        ("epsilon", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("parts", ctypes.c_int32),
    )


class Kernel:
    """The compiled function. Calls release the GIL and use as many threads as torch.

    Args:
        file: the library.
        isa: instructions that it may use.

    Attributes:
        paths: that the library, the processor and `isa` have in common.
    """

    def __init__(self, file: pathlib.Path, isa: Isa = "auto") -> None:
        compiled = ctypes.CDLL(str(file))
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._chain = compiled.narrow_chain
        self._chain.argtypes = [pointer, integer, pointer, long, pointer, long, pointer, long, integer]
        self._chain.restype = integer
        compiled.linear_path.restype = ctypes.c_char_p
        names = takewhile(lambda name: name is not None, map(compiled.linear_path, count()))
        self._numbers = {name.decode(): number for number, name in enumerate(names)}
        allowed = ISAS[: ISAS.index(isa) + 1]
        self.paths = tuple(name for name, path in PATHS.items() if name in self._numbers and path.isa in allowed)

    def path(self, kind: Kind) -> str | None:
        """Return the fastest path for weights of this kind, if there is any."""
        return next(filter(self.paths.__contains__, FASTEST[kind]), None)

    def chain(self, steps: tuple[Step[Narrow], ...]) -> Chain[Narrow]:
        """Return a chain of layers whose weights were all made for the same path; only the last may normalise."""
        layers = (_Step * len(steps))(*(_plain(step, self._numbers[step.weights.path]) for step in steps))
        return Chain(self._run_chain, layers, steps)

    def _run_chain(self, layers: ctypes.Array[_Step], rows: int, *states: int | None) -> None:
        """See `Chain`."""
        if self._chain(layers, len(layers), *states, rows, native.threads()):
            raise MemoryError("a chain of narrow Linear layers")

    def agrees_with_torch(self) -> bool:
        """Return whether every path computes the same as torch with the same narrowed numbers, in float64."""
        generator = torch.Generator().manual_seed(0)
        for rows, inputs in ((1, 5), (37, 70), (65, 1030), (66, 130)):
            x = drawn(generator, rows, inputs) * 2 + 0.3
            weight, bias, residual = (drawn(generator, n, inputs) for n in (97, 97, rows))
            stored = weight.to([*PARTS][rows % 3]).float()  # in as many parts, if in any
            residual = residual[:, :1].expand(rows, 97).contiguous()
            if not all(self._path_agrees(path, x, stored, bias[:, 0], residual) for path in self.paths):
                return False
        return True

    def _path_agrees(self, path: str, x_RD: Tensor, weight_ND: Tensor, bias_N: Tensor, residual_RN: Tensor) -> bool:
        norm = nn.LayerNorm(len(weight_ND), dtype=torch.float32)
        weights = narrow(weight_ND, bias_N, path)
        expected_RN = emulate(x_RD, weight_ND, bias_N, path)
        pairs = [(self.chain((Step(weights),))(x_RD), expected_RN)]
        for name, apply in ACTIVATIONS.items():
            pairs.append((self.chain((Step(weights, name),))(x_RD), apply(expected_RN)))
        normalised_RN = F.layer_norm(expected_RN + residual_RN, norm.normalized_shape, eps=norm.eps)
        pairs.append((self.chain((Step(weights, norm=norm),))(x_RD, residual_RN), normalised_RN))
        return all(torch.allclose(actual.double(), expected, atol=1e-4, rtol=1e-4) for actual, expected in pairs)


class Exact(NamedTuple):
    """float32, multiplied as exactly as by a BLAS: see `cenote.tensors.chains.Products`."""

    kernel: Kernel
    path: str

    def pack(self, weight_ND: Tensor, bias_N: Tensor | None = None) -> Narrow:
        """Return the weights as the kernel reads them."""
        return narrow(weight_ND.detach(), bias_N, self.path)

    def unpack(self, packed: Narrow) -> Tensor:
        """Return the float32 matrix `[N, D]`."""
        return unsplit(packed)

    def chain(self, steps: tuple[Step[Narrow], ...]) -> Chain[Narrow]:
        """Return a chain of the layers."""
        return self.kernel.chain(steps)


def _plain(step: Step[Narrow], path: int) -> _Step:
    weights = step.weights
    gamma, beta, epsilon, activation = numbers_of(step)
    return _Step(
        weights.panels.data_ptr(),
        address_of(weights.scale),
        address_of(weights.sums),
        weights.bias.data_ptr(),
        gamma,
        beta,
        weights.inputs,
        weights.outputs,
        weights.groups,
        epsilon,
        activation,
        path,
        weights.parts,
    )


def blas(kernels: Kernels | None, *, steady: bool = False) -> Products[Any] | None:
    """Return products in float32 by a BLAS, if there is any.

    Args:
        kernels: of the processor.
        steady: a row may not depend by a bit on the others, or on the number of threads.
    """
    if kernels is None or not kernels.can_chain:
        return None
    return native.Steady(kernels) if steady else kernels


def float32(kernels: Kernels | None, *, steady: bool = False) -> Products[Any] | None:
    """Return products in float32: by AMX, whose rows know nothing of each other, or see `blas`."""
    if kernels is None:
        return None
    try:
        kernel = load(kernels.isa)
    except RuntimeError:
        return blas(kernels, steady=steady)
    path = kernel.path("float32")
    return blas(kernels, steady=steady) if path is None else Exact(kernel, path)


def emulate(x_RD: Tensor, weight_ND: Tensor, bias_N: Tensor, path: str) -> Tensor:
    """Compute the products of `path` by torch in float64: `[R, N]`."""
    row = PATHS[path]
    return FORMS[row.kind].emulate(x_RD, weight_ND, row) + bias_N.double()


def _of_floats(x_RD: Tensor, weight_ND: Tensor, path: Path) -> Tensor:
    rounded_RD = x_RD.bfloat16() if path.layout == "panels" else x_RD
    return F.linear(rounded_RD.double(), weight_ND.to(getattr(torch, path.kind)).double())


def _of_bytes(x_RD: Tensor, weight_ND: Tensor, path: Path) -> Tensor:
    codes_ND, scale_N = quantize(weight_ND, pairs=path.pairs)
    low_R1 = x_RD.amin(1, keepdim=True)
    range_R1 = x_RD.amax(1, keepdim=True) - low_R1
    q_RD = ((x_RD - low_R1) * (torch.full_like(range_R1, 255) / range_R1)).round()
    rounded_RD = q_RD.double() * (range_R1.double() / 255) + low_R1.double()
    return F.linear(rounded_RD, codes_ND.double() * scale_N.double()[:, None])


class Form(NamedTuple):
    """What a kind of weights is made of.

    Attributes:
        narrow: returns a matrix `[N, D]` as the kernel reads it, with scales and sums if it has any; see `Narrow`.
        emulate: computes the products of a path by torch in float64, without the bias: `[R, N]`.
        makes_steps: products make whole steps out of the rounding of their inputs.
    """

    narrow: Callable[[Tensor, Path], Arrays]
    emulate: Callable[[Tensor, Tensor, Path], Tensor]
    makes_steps: bool = False


FORMS: dict[str, Form] = {
    "int8": Form(_in_bytes, _of_bytes, makes_steps=True),
    **dict.fromkeys(("bfloat16", "float16", "float32"), Form(_in_floats, _of_floats)),
}
"""By the kind of the weights. A further quantisation is a row here, one for each of its paths in `PATHS`, an entry of
`FASTEST`, a path of `linear.cpp`, and its name in `cenote.config.Quantization`."""


def load(isa: Isa = "auto") -> Kernel:
    """Load the kernel, built if need be (a few seconds, once per processor and compiler).

    Args:
        isa: instructions that it may use; see `cenote.tensors.native.chosen`.

    Raises:
        RuntimeError: it is not available, and why.
    """
    return _load(native.chosen(isa))


@functools.cache
def _load(isa: Isa) -> Kernel:
    if isa == "none":
        raise RuntimeError("native kernels are switched off")
    try:
        with library.compiled(SOURCE, native.TARGETS[isa].march) as file:
            kernel = Kernel(file, isa)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(str(error)) from error
    if not kernel.paths:
        raise RuntimeError("the processor has none of AVX2, VNNI and AMX")
    if isa == "amx" and "AMX" not in kernel.paths:
        raise RuntimeError("the processor has no AMX, or the system does not allow it")
    if not kernel.agrees_with_torch():
        raise RuntimeError("the kernel does not agree with torch")
    return kernel


def require(isa: Isa) -> None:
    """Build and try all kernels of `isa`, if it names instructions.

    Raises:
        ConfigError: they are not available.
    """
    isa = native.chosen(isa)
    native.load(isa)
    if isa in ("auto", "none"):
        return
    try:
        load(isa)
    except RuntimeError as error:
        raise native.unavailable(isa, error) from error
