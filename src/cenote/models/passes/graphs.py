"""Forwards that a GPU replays as one launch (`cenote.tensors.graphs`), where that is proved to change nothing."""

from __future__ import annotations

from itertools import chain, product
from typing import TYPE_CHECKING

import torch
from torch import nn

from cenote.models.layouts import Packed
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, shortened_windows, turned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cenote.models.passes.subject import Subject
    from cenote.models.probe import Probe

LAUNCH_SECONDS = 2e-5
"""Time of the host for a module without parts: Python around one kernel or two."""
GPU_FLOPS = 4e14
"""Rate of half-precision matrix products that a current GPU reaches in a model."""
MOST_TOKENS = 16384
"""Maximum tokens of a recording, unless the user says otherwise."""


def apply(subject: Subject) -> Outcome:
    """Replay forwards of batches of at most `Settings.graph_tokens`, if those of other batches of their shape agree."""
    layout, max_tokens = subject.layout, subject.settings.graph_tokens
    if not isinstance(layout, Packed) or not max_tokens:
        return Outcome()
    if subject.shelf is not None:
        return Outcome()  # a recording runs with the adapter with which it was made
    if layout.backbone.rope_class is not None:
        layout.unrecorded = "its rotary frequencies depend on the length of a sequence"
    else:
        layout.unrecorded = fault_of(lambda: _fault(subject, layout, max_tokens))
        undo(subject)
    if layout.unrecorded:
        return Outcome("", (f"runs without CUDA graphs: {layout.unrecorded}",))
    layout.record(max_tokens)  # anew: a recording keeps the shortened windows of the probe
    return Outcome()


def undo(subject: Subject) -> None:
    """Launch every kernel from the host."""
    if isinstance(subject.layout, Packed):
        subject.layout.graphs = None


def worthwhile_tokens(model: nn.Module) -> int:
    """Return the tokens up to which a forward takes longer to launch than to run."""
    leaves = [x for x in model.modules() if not list(x.children())]
    weights = chain.from_iterable(x.parameters() for x in leaves if not isinstance(x, nn.Embedding))
    multiplied = sum(map(torch.numel, weights))
    return min(int(len(leaves) * LAUNCH_SECONDS * GPU_FLOPS / (2 * multiplied)), MOST_TOKENS)


def _fault(subject: Subject, layout: Packed, max_tokens: int) -> str:
    """Return why forwards cannot be replayed, or an empty string; `layout` records from now on."""
    with shortened_windows(subject.backbone):
        probes = (subject.probe, turned(subject.probe, layout))
        layout.record(max_tokens)
        return next(filter(None, _faults(layout, probes)), "")


def _faults(layout: Packed, probes: Iterable[Probe]) -> Iterator[str]:
    """Yield the result of every proof; empty strings are no faults."""
    for probe in probes:
        yield probe.fault(layout)
    assert layout.graphs is not None
    yield layout.graphs.fault
    for probe, place in product(probes, layout.places):
        yield probe.equal_at(layout, place)
