"""Forwards that a GPU replays as one launch (`cenote.tensors.graphs`), where that is proved to change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenote.models.layouts import Packed
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, shortened_windows, turned

if TYPE_CHECKING:
    from cenote.models.passes.subject import Subject


def apply(subject: Subject) -> Outcome:
    """Replay forwards of batches of at most `Settings.graph_tokens`, if those of other batches of their shape agree."""
    layout, max_tokens = subject.layout, subject.settings.graph_tokens
    if not isinstance(layout, Packed) or not max_tokens:
        return Outcome()
    if subject.adapters:
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


def _fault(subject: Subject, layout: Packed, max_tokens: int) -> str:
    """Why forwards cannot be replayed, or an empty string; `layout` records from now on."""
    probe = subject.probe
    with shortened_windows(subject.backbone):
        other = turned(probe, layout)
        layout.record(max_tokens)
        assert layout.graphs is not None
        fault = probe.fault(layout) or other.fault(layout) or layout.graphs.fault
        for place in layout.places:
            fault = fault or probe.equal_at(layout, place) or other.equal_at(layout, place)
    return fault
