"""The last layer, run only for the tokens that pooling looks at.

Of a sequence that is pooled by its first or last token, the last layer needs the keys and values of all tokens, but
the query, the output and the feed-forward part of that one token alone: of 12 units of work, with a feed-forward part
of four times the hidden size, 9 are spared. The layer's own forward is run twice: over all tokens, until it calls the
attention function with its keys and values, and over the pooled tokens, whose queries then see those keys.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cenote.models.layouts import Packed
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, shortened_windows
from cenote.models.traits import of_kind
from cenote.tensors import attention
from cenote.tensors.packing import PLACES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.models.passes.subject import Subject
    from cenote.tensors.packing import Place

log = logging.getLogger(__name__)

NAME = "last_layer"


def apply(subject: Subject) -> Outcome:
    """Run the last layer for single tokens, for each place where that is proved to change nothing."""
    layout, model = subject.layout, subject.backbone
    layer = find(model)
    if not isinstance(layout, Packed) or layer is None or subject.patches.replaces(layer):
        return Outcome()
    subject.patches.put(NAME, {layer: LastLayer(layer)})
    places: tuple[Place, ...] = ("last",) if layout.is_causal else PLACES
    for place in places:
        layout.places |= {place}
        with shortened_windows(model):
            fault = fault_of(partial(_fault, subject, place))
        if not fault and subject.pictures is not None:
            fault = fault_of(partial(subject.pictures.equal_at, layout, place))
        if fault:
            layout.places -= {place}
            log.info("%s runs its last layer for all tokens: %s", type(model).__name__, fault)
    if not layout.places:
        undo(subject)
    return Outcome()


def _fault(subject: Subject, place: Place) -> str:
    """Return how the rows at `place` differ if the last layer runs for them alone, or an empty string."""
    layout = subject.layout
    assert isinstance(layout, Packed)
    fault = subject.probe.equal_at(layout, place)
    if not fault and subject.settings.keeps_bits and not layout.is_fused:
        return "attention from single tokens rounds in another order, and no bit may move"
    return fault


def undo(subject: Subject) -> None:
    """Run the last layer for all tokens."""
    if isinstance(subject.layout, Packed):
        subject.layout.places = frozenset()
    subject.patches.remove(NAME)


def find(model: PreTrainedModel) -> nn.Module | None:
    """Return the last layer of a backbone, if its layers are a list of as many as its config says."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return next((layers[-1] for layers in of_kind(model, nn.ModuleList) if len(layers) == count), None)


class LastLayer:
    """The `forward` of a last layer, instead of its own."""

    def __init__(self, layer: nn.Module) -> None:
        self._forward: Callable[..., Any] = layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer: for all tokens, or where the packed forward under way has a `place`, for those alone.

        Raises:
            RuntimeError: it does not call the attention function.
        """
        under_way = attention.under_way_or_none()
        if under_way is None or under_way.place is None:
            return self._forward(*args, **kwargs)
        batch = under_way.batch
        under_way.wants_keys = True
        try:
            self._forward(*args, **kwargs)
        except attention.KeysFound:
            rows_B = batch.rows_at(under_way.place)
            args, kwargs = _at(args, rows_B, batch.tokens), _at(kwargs, rows_B, batch.tokens)
            under_way.wants_keys = False
            return self._forward(*args, **kwargs)
        finally:
            under_way.wants_keys, under_way.keys = False, None
        raise RuntimeError("the last layer does not call the registered attention function")


def _at(value: Any, rows_B: Tensor, tokens: int) -> Any:
    """Cut an argument for all tokens, `[1, T, ...]` or `[T, D]`, to some of them; return any other as it is."""
    if isinstance(value, torch.Tensor):
        return _rows_at(value, rows_B, tokens)
    if isinstance(value, dict):
        return {key: _at(entry, rows_B, tokens) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_at(entry, rows_B, tokens) for entry in value)
    return value


def _rows_at(x: Tensor, rows_B: Tensor, tokens: int) -> Tensor:
    if x.shape[:2] == (1, tokens):
        return x.index_select(1, rows_B)
    if x.ndim == 2 and len(x) == tokens:
        return x.index_select(0, rows_B)
    return x
