"""Narrows the weights of a backbone on a CPU, without knowing the model: int8, bfloat16 or float16.

It comes in two steps. `prepare` narrows the weights of every Linear when they have been read. When layout, heads and
fused layers have been proved in float32, `narrow` exchanges the chains that `cenote.models.passes.fuse` has made for
chains of narrow weights, and frees the others; what fusing could not take stays in float32. A probe runs before and
after: its rows must still resemble those in float32, and may not move with a neighbour's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cenote.errors import CheckpointError
from cenote.models.layouts import forward, vocabulary
from cenote.models.passes.fuse import Remembered
from cenote.tensors import linear, process
from cenote.tensors.linear import Narrow
from cenote.tensors.native import Chain
from cenote.tensors.packing import pack
from cenote.types import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.config import Isa
    from cenote.models.layouts import Layout
    from cenote.tensors.linear import Kernel, Kind
    from cenote.tensors.packing import Batch

PROBE_LENGTHS = (7, 11, 3)
LEAST_COSINE = 0.9
"""Of the probe's states to those in float32, on average; real text and real weights are far above it."""


@dataclass(frozen=True)
class Prepared:
    """Narrow weights that wait for their chains.

    Attributes:
        kernel: what will run them; `None` = everything stays in float32.
        path: how.
        dtype: of the token embedding, and of Linears unless they are quantised; `None` = float32.
        weights: of each Linear that the kernel can take.
        notes: what a user would want to be warned of.
    """

    kernel: Kernel | None = None
    path: str = ""
    dtype: torch.dtype | None = None
    weights: dict[nn.Linear, Narrow] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@torch.no_grad()
def prepare(model: nn.Module, *, int8: bool, dtype: torch.dtype | None, isa: Isa = "auto") -> Prepared:
    """Narrow the weights of the Linears of `model`, which keeps its own.

    Args:
        model: the backbone, on the CPU, in float32.
        int8: whether Linears are to be quantised.
        dtype: `torch.float16`, `torch.bfloat16` or `None`; see `Prepared.dtype`.
        isa: instructions that the kernels may use.
    """
    kinds: list[Kind] = ["int8"] if int8 else []
    if dtype is not None:
        kinds.append("bfloat16" if dtype == torch.bfloat16 else "float16")
    if not kinds:
        return Prepared()
    try:
        kernel = linear.load(isa)
    except RuntimeError as error:
        return Prepared(notes=(f"{' and '.join(kinds)} fell back to float32: {error}",))
    path = kernel.path(kinds[0])
    assert path is not None, "a processor that has any path has one of each kind"
    fewest = (
        linear.TILE if linear.PATHS[path].layout == "panels" else 1
    )  # smaller ones are gates, not worth their rounding
    fit = [
        x
        for x in model.modules()
        if type(x) is nn.Linear
        and (x.weight.dtype, x.weight.device.type) == (torch.float32, "cpu")
        and x.out_features >= fewest
        and x.in_features <= linear.WIDEST
    ]
    return Prepared(kernel, path, dtype, {x: linear.narrow(x.weight, x.bias, path) for x in fit})


class Outcome(NamedTuple):
    """What came of it.

    Attributes:
        text: how the Linears run now, for the report at start; empty if a BLAS multiplies them in float32.
        notes: what a user would want to be warned of.
    """

    text: str
    notes: tuple[str, ...]


@torch.no_grad()
def narrow(layout: Layout, full: PreTrainedModel, prepared: Prepared, *, max_length: int = 1 << 30) -> Outcome:
    """Put the prepared weights in place.

    Args:
        layout: proved and fused.
        full: the model that holds the backbone: weights that it shares with its head stay.
        prepared: of this backbone.
        max_length: most tokens of a sequence, so that the probe stays within the model's positions.

    Raises:
        CheckpointError: narrowed, the model is another one, or a row depends on its neighbours.
    """
    model = layout.backbone.model
    total = sum(isinstance(x, nn.Linear) or type(x).__name__ == "Conv1D" for x in model.modules())
    if prepared.kernel is None:
        own = {step.linear: step.weights for _, chain in _chains(model) for step in chain.steps}
        path = next((x.path for x in own.values() if isinstance(x, Narrow)), None)
        return Outcome(f"{len(own)} of {total} in {linear.PATHS[path].text}" if path else "", prepared.notes)
    batch, apart, others_T = _probe(model, max_length)
    reference_TD = forward(layout, batch)
    # Products over experts may move by a last bit with the batch in float32 already
    steady = torch.equal(reference_TD[others_T], forward(layout, apart)[others_T])
    count = _exchange(model, prepared.kernel, prepared)
    if prepared.dtype is not None:
        _narrow_embedding(full, model.get_input_embeddings(), prepared.dtype, lambda: forward(layout, batch))
    prepared.weights.clear()
    process.release_freed_memory()

    found_TD = forward(layout, batch)
    cosine = float(F.cosine_similarity(found_TD, reference_TD).mean())
    how = linear.PATHS[prepared.path].text
    if not cosine >= LEAST_COSINE:
        raise CheckpointError(
            f"{type(model).__name__} does not bear weights in {how}: the cosine of its states to those in float32 is "
            f"{cosine:.3f} on a probe, expected at least {LEAST_COSINE}; leave quantization and dtype out"
        )
    if steady and not torch.equal(found_TD[others_T], forward(layout, apart)[others_T]):
        raise CheckpointError(f"{type(model).__name__} with weights in {how}: rows move with their neighbours")
    if count == 0:
        return Outcome("", (f"none of the {total} Linear layers is of the plain kind that could be kept in {how}",))
    return Outcome(f"{count} of {total} in {how}, cosine {cosine:.4f} to float32 on a probe", prepared.notes)


def _probe(model: PreTrainedModel, max_length: int) -> tuple[Batch, Batch, Tensor]:
    """Two batches that differ in the second sequence, and the rows of the others."""
    draw = torch.Generator().manual_seed(2)
    ids = [torch.randint(vocabulary(model), (min(n, max_length),), generator=draw).tolist() for n in PROBE_LENGTHS]
    other = [ids[0], [(i + 1) % vocabulary(model) for i in ids[1]], *ids[2:]]
    batch, apart = (pack([Sequence(own) for own in drawn]) for drawn in (ids, other))
    others_T = torch.ones(batch.tokens, dtype=torch.bool)
    others_T[batch.starts[1] : batch.starts[2]] = False
    return batch, apart, others_T


def _chains(model: nn.Module) -> list[tuple[nn.Module, Chain[Any]]]:
    """The chains that `cenote.models.passes.fuse` has made, and whose `forward` they are."""
    found = []
    for module in model.modules():
        own = vars(module).get("forward")
        chain = own.plain if isinstance(own, Remembered) else own
        if isinstance(chain, Chain):
            found.append((module, chain))
    return found


def _exchange(model: nn.Module, kernel: Kernel, prepared: Prepared) -> int:
    """Replace the chains all of whose layers are prepared; returns how many Linears those are."""
    found: set[nn.Linear] = set()
    for module, chain in _chains(model):
        linears = [step.linear for step in chain.steps if step.linear in prepared.weights]
        if len(linears) < len(chain.steps):
            continue
        weights = [prepared.weights[x] for x in linears if x is not None]
        narrowed = kernel.chain(tuple(replace(x, weights=w) for x, w in zip(chain.steps, weights, strict=True)))
        own = vars(module)["forward"]
        if isinstance(own, Remembered):
            own.plain = narrowed
        else:
            vars(module)["forward"] = narrowed
        found.update(x for x in linears if x is not None)
    return len(found)


def _narrow_embedding(
    full: nn.Module, table: nn.Module | None, dtype: torch.dtype, probe: Callable[[], Tensor]
) -> None:
    """Keep the token embedding in `dtype`, if nobody but its own forward reads it."""
    if type(table) is not nn.Embedding or table.max_norm is not None or "forward" in vars(table):
        return
    if sum(p is table.weight for module in full.modules() for p in module._parameters.values()) != 1:
        return
    weight, half_VD = table.weight, table.weight.to(dtype)
    # Stays on the CPU, for models tell their device by their first weights; whoever reads the values gets NaN
    table.weight = nn.Parameter(torch.full((), torch.nan).expand(weight.shape), requires_grad=False)
    vars(table)["forward"] = lambda ids: F.embedding(ids, half_VD).float()
    try:
        alone = bool(torch.isfinite(probe()).all())
    except Exception:  # whatever a model raises means that it does more with its table than look ids up
        alone = False
    if not alone:
        table.weight = weight
        del vars(table)["forward"]


def leave_file(model: nn.Module) -> None:
    """Copy all weights but those of Linears, which fusing copies: one that stays keeps the mapped file in memory."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (type(module) is not nn.Linear or name != "weight"):
                tensor.data = tensor.data.clone()
