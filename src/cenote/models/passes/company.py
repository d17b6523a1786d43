"""Rows that do not depend by a bit on the rest of the batch, its order, or the number of threads.

A sequence that has a forward of its own is computed in the same way whatever came beside it: operators choose the order
of their sums by shapes, and these are its own. That is always right, and slow for short sequences. Sequences may share
a packed forward where nothing else can differ: Linear layers run as chains of products whose rows are steady
(`cenote.tensors.native.Steady`; narrow weights' rows know nothing of each other anyway), attention by the native
kernel, and all other operators compute each row by itself. The operators are observed in a forward. Those that treat
the end of a tensor, or of a thread's part of it, in another way than the rest meet neither: they run on one thread,
over a multiple of `STEADY_ROWS` rows. In the end bits are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cenote.core import Sequence
from cenote.models.layouts import Packed, forward
from cenote.models.passes.subject import Outcome
from cenote.models.probe import Draw, fault_of, shortened_windows
from cenote.tensors.native import torch_on_one_thread
from cenote.tensors.packing import pack

if TYPE_CHECKING:
    from torch import Tensor

    from cenote.models.passes.subject import Subject

MOVES = """
_to_copy _unsafe_view alias any arange as_strided cat chunk clone contiguous copy_ detach dropout empty empty_like eq
expand flatten gather index index_select item lift_fresh max narrow new_empty numpy_T ones ones_like permute
repeat_interleave reshape select slice split split_with_sizes squeeze stack t to transpose unbind unsqueeze view zeros
zeros_like
"""
"""Operators that create, move, compare or count, and round nothing."""
ROW_BY_ROW = """
add add_ cos div div_ embedding exp gelu gelu_ layer_norm mean mul mul_ native_layer_norm neg pow relu relu_ rms_norm
rsqrt rsub sigmoid silu silu_ sin sqrt sub sub_ tanh tanh_
"""
"""Operators that compute each element, or each row, by itself."""
STEADY = frozenset(MOVES.split()) | frozenset(ROW_BY_ROW.split())
LENGTHS = (5, 1, 33, 12, 12, 64, 3, 100)
"""Tokens of the sequences whose bits are compared; the first one is in every batch."""


def apply(subject: Subject) -> Outcome:
    """Let sequences share forwards if that is proved to change no bit; else each has its own."""
    layout = subject.layout
    if not subject.settings.invariant:
        return Outcome()
    layout.is_apart = True
    fault = _obstacle(subject) or fault_of(lambda: _proof(subject))
    if not fault:
        return Outcome("bits do not depend on the batch, forwards are shared")
    layout.is_apart, layout.is_filled = True, False
    return Outcome(f"bits do not depend on the batch, forwards are apart, because {fault}")


def undo(subject: Subject) -> None:
    """Let sequences share forwards as they come."""
    subject.layout.is_apart = subject.layout.is_filled = False


def _obstacle(subject: Subject) -> str:
    """Return why sequences cannot share a forward, before any is run, or an empty string."""
    layout = subject.layout
    if not isinstance(layout, Packed):
        return f"the model runs {layout.name}"
    if layout.backbone.device.type != "cpu":
        return "kernels of a GPU choose the order of sums by the whole batch"
    if layout.backbone.vision is not None:
        return "the pictures of a batch are encoded together"
    return "adapters add products of their own" if subject.shelf is not None else ""


def _proof(subject: Subject) -> str:
    """Return why rows could depend on their batch if sequences shared forwards, or an empty string."""
    layout = subject.layout
    assert isinstance(layout, Packed)
    layout.is_apart, layout.is_filled = False, True
    draw = Draw(subject.full)
    ids = [draw.text(min(length, subject.settings.max_length)) for length in LENGTHS]
    with shortened_windows(subject.backbone), torch_on_one_thread(), torch.inference_mode():
        with _Watch() as watch:
            rows_LD = _rows(layout, ids[:1])
        unknown = sorted(watch.operators - STEADY)
        if unknown:
            return f"rows may depend on each other in {unknown[0]}"
        if not layout.is_fused:
            return "its attention is not the native kernel's"
        for company in (ids, ids[::-1], ids[:2], [ids[0], *[ids[1]] * 40], [ids[0]] * 9):
            at = company.index(ids[0])
            before = sum(map(len, company[:at]))
            if not torch.equal(_rows(layout, company)[before : before + len(ids[0])], rows_LD):
                return "a row moves by bits beside others"
    return ""


def _rows(layout: Packed, ids: list[list[int]]) -> Tensor:
    return forward(layout, pack([Sequence(sequence) for sequence in ids]))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of the operators that run.

    Attributes:
        operators: their names.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
