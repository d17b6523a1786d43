"""Narrow weights of a backbone on a CPU, without knowing the model: int8, bfloat16 or float16.

It comes in two steps. When fusing packs a Linear, `KeepsNarrow` keeps its weights in float32 and narrow. When all else
has been proved in float32, `apply` exchanges the chains that `cenote.models.passes.fuse` has made for chains of
narrow weights, and frees the others; Linears outside of chains stay in float32. A probe runs before and after: its
rows must still resemble those in float32, and may not move with a neighbour's tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cenote.errors import CheckpointError
from cenote.models import probe as proofs
from cenote.models.layouts import forward
from cenote.models.passes import fuse
from cenote.models.passes.fuse import Remembered
from cenote.models.passes.subject import Narrowing, Outcome
from cenote.tensors import linear, process

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.config import Isa
    from cenote.models.passes.patches import Patches
    from cenote.models.passes.subject import Subject
    from cenote.tensors.chains import Chain, Products, Step
    from cenote.tensors.linear import Kernel, Kind, Narrow
    from cenote.tensors.native import Kernels

NAME = "narrow"
NEEDS = ("packed",)
"""Kinds of fusing without which no weights can be narrowed."""
KIND_OF_DTYPE: dict[torch.dtype, Kind] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def choose(*, quantization: str = "none", dtype: torch.dtype | None = None, isa: Isa = "auto") -> Narrowing:
    """Return how this CPU runs narrow weights, if there are to be any.

    Args:
        quantization: a kind of `cenote.tensors.linear.FORMS`, or "none".
        dtype: `torch.float16`, `torch.bfloat16` or `None`; see `Narrowing.dtype`.
        isa: instructions that the kernels may use.
    """
    kinds: list[Kind] = [] if quantization == "none" else [quantization]
    if dtype is not None:
        kinds.append(KIND_OF_DTYPE[dtype])
    if not kinds:
        return Narrowing()
    try:
        kernel = linear.load(isa)
    except RuntimeError as error:
        return Narrowing(fault=f"{' and '.join(kinds)} fell back to float32: {error}")
    path = kernel.path(kinds[0])
    assert path is not None, "a processor that has any path has one of each kind"
    return Narrowing(kernel, path, dtype)


def products(kernels: Kernels | None, narrowing: Narrowing, *, steady: bool = False) -> Products[Any] | None:
    """Return the products in float32 on this CPU; if weights are to be narrowed, only until they are.

    With `steady` rows do not depend by a bit on each other, or on the number of threads.
    """
    if narrowing.kernel is None:
        return linear.float32(kernels, steady=steady)
    blas = linear.blas(kernels, steady=steady)
    return None if blas is None else KeepsNarrow(blas, narrowing)


class Pair(NamedTuple):
    """Weights in float32 as they are multiplied, and narrow ones; `None` = they are not narrowed."""

    exact: Any
    narrow: Narrow | None


class KeepsNarrow:
    """Products in float32 that keep narrow weights besides; see `cenote.tensors.chains.Products`."""

    def __init__(self, exact: Products[Any], narrowing: Narrowing) -> None:
        self._exact = exact
        self._path = narrowing.path
        is_rounded = linear.PATHS[narrowing.path].layout == "panels"
        self._fewest = linear.TILE if is_rounded else 1  # smaller ones are gates, not worth their rounding

    def pack(self, weight_ND: Tensor, bias_N: Tensor | None = None) -> Pair:
        """Copy the matrix and the bias in float32, and narrow ones if the kernel takes them."""
        outputs, inputs = weight_ND.shape
        exact = self._exact.pack(weight_ND, bias_N)
        if outputs < self._fewest or inputs > linear.WIDEST:
            return Pair(exact, None)
        return Pair(exact, linear.narrow(weight_ND, bias_N, self._path))

    def unpack(self, packed: Pair) -> Tensor:
        """Return the float32 matrix `[N, D]`."""
        return self._exact.unpack(packed.exact)

    def chain(self, steps: tuple[Step[Pair], ...]) -> Chain[Pair]:
        """Return a chain that runs the layers in float32."""
        chain = self._exact.chain(tuple(replace(step, weights=step.weights.exact) for step in steps))
        chain.steps = steps
        return chain


@torch.no_grad()
def apply(subject: Subject) -> Outcome:
    """Put the narrow weights in place; the text says how many there are, and how near their rows are to float32.

    Raises:
        CheckpointError: narrowed, the rows are too far from float32, or depend on their neighbours.
    """
    narrowing, layout, model = subject.settings.narrowing, subject.layout, subject.backbone
    if narrowing.kernel is None:
        return Outcome("", (narrowing.fault,))
    probe = proofs.brief(layout, subject.settings.max_length)
    # Where rounding moves rows already, as products over experts do, narrow weights make whole steps of it
    is_steady = probe.moved(layout) == 0
    count = _exchange(subject.patches, narrowing.kernel)
    if narrowing.dtype is not None:
        run = partial(forward, layout, probe.batch)
        _narrow_embedding(subject.full, model.get_input_embeddings(), narrowing.dtype, run, subject.patches)
    process.release_freed_memory()

    how = linear.PATHS[narrowing.path].text
    cosine = probe.cosine(forward(layout, probe.batch))
    _check_cosine(cosine, how, model)
    if is_steady and probe.moved(layout) != 0:
        raise CheckpointError(f"{type(model).__name__} with weights in {how}: rows move with their neighbours")
    total = fuse.count(model)
    if count == 0:
        return Outcome("", (f"none of the {total} Linear layers is of the plain kind that could be kept in {how}",))
    return Outcome(f"{count} of {total} in {how}, cosine {cosine:.4f} to float32 on a probe")


def _check_cosine(cosine: float, how: str, model: PreTrainedModel) -> None:
    if not cosine >= proofs.LEAST_COSINE:
        raise CheckpointError(
            f"{type(model).__name__} does not bear weights in {how}: the cosine of its states to those in float32 is "
            f"{cosine:.3f} on a probe, expected at least {proofs.LEAST_COSINE}; leave quantization and dtype out"
        )


def _exchange(patches: Patches, kernel: Kernel) -> int:
    """Replace the chains all of whose layers have narrow weights; returns the number of Linears in them."""
    forwards = patches.of(fuse.NAME)
    narrowed: set[nn.Linear | None] = set()
    for module, chain in fuse.chains(patches).items():
        steps = tuple(replace(step, weights=step.weights.narrow) for step in chain.steps)
        if any(step.weights is None for step in steps):
            continue
        before = forwards[module]
        if isinstance(before, Remembered):
            before.plain = kernel.chain(steps)
        else:
            forwards[module] = kernel.chain(steps)
        narrowed.update(step.linear for step in steps)
    patches.put(fuse.NAME, forwards)
    return len(narrowed)


def _narrow_embedding(
    full: nn.Module, table: nn.Module | None, dtype: torch.dtype, run: Callable[[], Tensor], patches: Patches
) -> None:
    """Keep the token embedding in `dtype`, if nothing but its own forward reads it."""
    if type(table) is not nn.Embedding or table.max_norm is not None or patches.replaces(table):
        return
    if fuse.uses(full)[id(table.weight)] != 1:
        return
    weight, half_VD = table.weight, table.weight.to(dtype)
    # Stays on the CPU, for models tell their device by their first weights; a read of its values gets NaN
    table.weight = nn.Parameter(torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape), requires_grad=False)
    patches.put(NAME, {table: lambda ids: F.embedding(ids, half_VD).float()})
    if proofs.fault_of(lambda: proofs.finite(run())):
        table.weight = weight
        patches.remove(NAME)
