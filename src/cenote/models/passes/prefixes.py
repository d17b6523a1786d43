"""Tokens with which several sequences of a batch begin, run once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cenote.models.layouts import Packed
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, prefixed, prefixed_pictures, shortened_windows

if TYPE_CHECKING:
    from cenote.models.passes.subject import Subject

log = logging.getLogger(__name__)


def apply(subject: Subject) -> Outcome:
    """Share prefixes, also those longer than the model's window, if that is proved to change nothing."""
    if not isinstance(subject.layout, Packed) or not subject.layout.is_causal:
        return Outcome()
    fault = fault_of(lambda: _fault(subject))
    if fault:
        undo(subject)
        log.info("%s does not share prefixes: %s", type(subject.backbone).__name__, fault)
    return Outcome()


def undo(subject: Subject) -> None:
    """Run every sequence as a whole."""
    subject.layout.shares_prefixes = False


def _fault(subject: Subject) -> str:
    layout, max_length = subject.layout, subject.settings.max_length
    assert isinstance(layout, Packed)
    probe = prefixed(layout, max_length)
    if probe is None:
        return f"it takes {max_length} tokens at most"
    pictures = prefixed_pictures(layout)
    layout.shares_prefixes = True
    with shortened_windows(subject.backbone):
        fault = probe.fault(layout)
    if not fault and subject.settings.keeps_bits and not layout.is_fused:
        return "attention over a prefix rounds in another order, and no bit may move"
    if fault or pictures is None:
        return fault
    return pictures.fault(layout)
