"""Layouts, ways to run a backbone over a batch: packed end to end, or padded in small groups.

That one of them is exact for a model is proved at load (`cenote.models.probe`). Poolers never see padding: every layout
returns packed rows.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cenote.core import UNLIMITED
from cenote.functions import places_by
from cenote.models.traits import block_sparse_length, position_offset, reset_attention, reset_rope, rope_class
from cenote.tensors import attention
from cenote.tensors.graphs import Graphs
from cenote.tensors.native import LONGEST
from cenote.tensors.packing import Batch, filled, set_apart
from cenote.tensors.sharing import share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from cenote.models.vision import Vision
    from cenote.tensors.native import Kernels
    from cenote.tensors.packing import Features, Ids, Place, Static

PADDED_SEQUENCES = {"cpu": 8, "cuda": 64}
"""Sequences of a padded forward, by the type of the device."""
STEADY_ROWS = 32
"""Tokens of which a forward has a multiple, where no operator may meet the end of a tensor's vectors."""
INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})


@dataclass(eq=False)
class Backbone:
    """A Transformers model and the inputs of its forward.

    Attributes:
        accepts: names of the parameters of its `forward`.
        position_offset: added to positions that count from 0. In the RoBERTa family it is `padding_idx + 1`, and tokens
            with that id, literal `<pad>`, keep position `padding_idx`.
        rope_class: lengths that share rotary frequencies share a class; `None` = all lengths do.
        dense_length: tokens beyond which attention is block-sparse, which padding would change; 0 = it never is.
        device: where the weights are.
        vision: how it takes pictures; `None` = it does not.
        finish: makes the rows that are pooled of the last hidden states; `None` = these are.
    """

    model: PreTrainedModel
    accepts: frozenset[str] = field(init=False)
    position_offset: int = 0
    vision: Vision | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    rope_class: Callable[[int], int] | None = field(init=False)
    dense_length: int = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        only_keywords = "input_ids" not in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepts = INPUTS if only_keywords else frozenset(parameters)
        if hasattr(self.model, "language_model"):  # which takes it from the keywords
            self.accepts |= {"use_cache"}
        self.rope_class = rope_class(self.model)
        self.dense_length = block_sparse_length(self.model)
        self.device = self.model.device

    @property
    def first_position(self) -> int:
        """Position of the first token of a model that takes pictures and does not count from 0."""
        return 0 if self.vision is None else self.vision.pictures.first_position

    def length_class(self, length: int) -> int:
        """Return a number that lengths have in common which may share a padded forward."""
        if self.dense_length:
            return length if length > self.dense_length else 0
        return 0 if self.rope_class is None else self.rope_class(length)

    def run(
        self, *, sources: Tensor | None = None, features: Features | None = None, **inputs: Tensor | None
    ) -> Tensor:
        """The model's own forward over `[B, L]` inputs; last hidden states `[B, L, D]`.

        Args:
            sources: row of `features` that each token gets, see `Vision.arguments`.
            features: of the pictures; `None` = there are none.
            inputs: of the model's forward; those that it does not take are left out.
        """
        if self.rope_class is not None:
            reset_rope(self.model)
        if self.dense_length:
            reset_attention(self.model)
        arguments: dict[str, Any] = {
            name: value for name, value in inputs.items() if value is not None and name in self.accepts
        }
        if "use_cache" in self.accepts:
            arguments["use_cache"] = False
        with torch.inference_mode():
            output = self._output(arguments, sources, features)
            states = getattr(output, "last_hidden_state", None)
            hidden: Tensor = output[0] if states is None else states
            return hidden if self.finish is None else self.finish(hidden)

    def _output(self, arguments: dict[str, Any], sources: Tensor | None, features: Features | None) -> Any:
        """Run the model, or the part of it that reads the features of pictures."""
        if self.vision is None:
            return self.model(**arguments)
        if features is None or sources is None:
            return self.model(**arguments, **self.vision.by_ids(arguments["input_ids"]))
        return self.vision.reader(**self.vision.arguments(arguments, sources, features))


class Packed:
    """The whole batch in one forward, attention kept apart by `cenote.tensors.attention`.

    It runs between `install` and `remove`.

    Attributes:
        is_causal: whether the last forward's attention was.
        is_fused: whether one kernel did the attention of all its sequences, rather than of each length by itself.
        shares_prefixes: whether common beginnings of sequences run once.
        places: the tokens for which alone the last layer can run.
        is_apart: each sequence has a forward of its own.
        is_filled: forwards have a multiple of `STEADY_ROWS` tokens.
        graphs: replays forwards instead of launching their kernels one by one.
        unrecorded: why forwards could not be recorded, or an empty string.
    """

    name = "packed"

    def __init__(self, backbone: Backbone, kernels: Kernels | None = None) -> None:
        self.backbone = backbone
        self.kernels = kernels
        self.is_causal = False
        self.is_fused = False
        self.shares_prefixes = False
        self.is_apart = False
        self.is_filled = False
        self.places: frozenset[Place] = frozenset()
        self.graphs: Graphs | None = None
        self.unrecorded = ""
        self._longest = UNLIMITED if kernels is None else LONGEST
        self._own_attention = _implementations(backbone.model.config)

    def install(self) -> None:
        """Make the model call `cenote.tensors.attention`, but for its vision tower."""
        name, vision = attention.register(), self.backbone.vision
        self.backbone.model.set_attn_implementation(name if vision is None else vision.attention(name))
        for module in self.backbone.model.modules():
            if hasattr(module, "compute_bias"):
                _bound_bias(module)

    def remove(self) -> None:
        """Give the model its own attention back."""
        model = self.backbone.model
        if _implementations(model.config) != self._own_attention:
            model.set_attn_implementation(self._own_attention)
        for module in model.modules():
            vars(module).pop("compute_bias", None)

    @contextmanager
    def own_attention(self) -> Iterator[Backbone]:
        """Yield the backbone, which has its own attention meanwhile."""
        self.remove()
        try:
            yield self.backbone
        finally:
            self.install()

    def groups(self, lengths: tuple[int, ...], *, hides: bool = False) -> list[list[int]]:
        """Group the numbers of sequences that may share a forward."""
        if self.is_apart:
            return [[i] for i in range(len(lengths))]
        return list(places_by(map(self._length_class, lengths)).values())

    def _length_class(self, length: int) -> tuple[int, int]:
        """Return numbers that lengths have in common which may share a forward.

        A sequence too long for the native attention would take the others from it.
        """
        of_rope = self.backbone.rope_class
        return max(0, length - self._longest), 0 if of_rope is None else of_rope(length)

    def run(self, batch: Batch, place: Place | None = None) -> Tensor:
        """Run one forward; `[T, D]`, NaN but for the rows at `place`, if that is one of `places`."""
        batch = self._positioned(batch)
        if batch.hides:
            return self._run(set_apart(batch))
        if place not in self.places or batch.tokens < 2 * batch.size:
            place = None
        shared = share(batch) if self.shares_prefixes else None
        if shared is not None:
            return _spread_rows(self._run(shared.batch, place), shared.batch, place)[shared.expand_T]
        hidden = self.graphs.run(batch, place) if self.graphs and not batch.media else None
        if hidden is None:
            hidden = self._run(batch, place)
        return _spread_rows(hidden, batch, place)

    def record(self, max_tokens: int) -> None:
        """Replay forwards of at most `max_tokens` from now on."""
        self.graphs = Graphs(self._run, self.backbone.device, max_tokens)

    def _run(self, batch: Batch | Static, place: Place | None = None) -> Tensor:
        """`[T, D]`, or `[B, D]` for the rows at `place` alone."""
        if self.is_filled and isinstance(batch, Batch) and batch.tokens % STEADY_ROWS:
            return self._run(filled(batch, STEADY_ROWS), place)[: batch.tokens]
        with attention.boundaries(batch, self.kernels, place) as under_way:
            hidden_TD = self.backbone.run(
                input_ids=batch.ids_T[None],
                position_ids=batch.positions_T[..., None, :],
                token_type_ids=None if batch.type_ids_T is None else batch.type_ids_T[None],
                sources=None if batch.sources_T is None else batch.sources_T[None],
                features=batch.features,
            )[0]
        self.is_causal, self.is_fused = under_way.is_causal, under_way.is_fused
        return hidden_TD

    def _positioned(self, batch: Batch) -> Batch:
        """Return `batch` with the positions that the model counts."""
        if self.backbone.first_position:
            return replace(batch, host_positions_T=batch.host_positions_T + self.backbone.first_position)
        offset = self.backbone.position_offset
        if not offset:
            return batch
        positions_T = _skipping(offset - 1, batch.host_positions_T + offset, batch)
        return replace(batch, host_positions_T=positions_T)


class Padded:
    """Sorted micro-batches with an attention mask; rows are unpadded at once.

    Args:
        backbone: the model, with its own attention implementation.
        equal: only sequences of one length share a forward, for models that padding would change.
        size: maximum number of sequences in a forward.

    Attributes:
        is_apart: each sequence has a forward of its own.
    """

    shares_prefixes = False
    is_filled = False

    def __init__(self, backbone: Backbone, *, equal: bool = False, size: int | None = None) -> None:
        self.backbone = backbone
        self.is_apart = False
        self.equal = equal
        self.size = size or PADDED_SEQUENCES.get(backbone.device.type, 8)
        self.name = "equal lengths" if equal else "padded"
        if self.size == 1:
            self.name = "one by one"

    def install(self) -> None:
        """Nothing: the model stays as it is."""

    def remove(self) -> None:
        """Nothing, as `install`."""

    @contextmanager
    def own_attention(self) -> Iterator[Backbone]:
        """Yield the backbone, whose attention is its own anyway."""
        yield self.backbone

    def groups(self, lengths: tuple[int, ...], *, hides: bool = False) -> list[list[int]]:
        """Group the numbers of sequences that may share a forward, longest first.

        Args:
            lengths: of the sequences.
            hides: some have hidden tokens, whose rows padding changes in models that let masked tokens see nothing
                (DeBERTa).
        """
        size = 1 if self.is_apart else self.size
        length_class: Callable[[int], int] = int if self.equal or hides else self.backbone.length_class
        groups: list[list[int]] = []
        for members in places_by(map(length_class, lengths)).values():
            members.sort(key=lambda i: -lengths[i])
            groups += [members[i : i + size] for i in range(0, len(members), size)]
        return groups

    def run(self, batch: Batch, place: Place | None = None) -> Tensor:
        """Run one padded forward over all of `batch`; `[T, D]`, whatever the `place`."""
        places_L, lengths_B1 = np.arange(batch.max_length), np.array(batch.lengths)[:, None]
        mask = seen = places_L < lengths_B1
        if batch.hides:
            seen = places_L < lengths_B1 - np.array([sequence.hidden for sequence in batch.sequences])[:, None]
        pad = getattr(self.backbone.model.config, "pad_token_id", None) or 0
        types_T, sources_T, positions_T = batch.host_type_ids_T, batch.host_sources_T, batch.host_positions_T
        first = self.backbone.first_position
        has_positions = bool(first) or any(sequence.positions is not None for sequence in batch.sequences)
        states = self.backbone.run(
            input_ids=batch.index(_spread(batch.host_ids_T, mask, pad)),
            attention_mask=batch.index(seen),
            token_type_ids=None if types_T is None else batch.index(_spread(types_T, mask, 0)),
            position_ids=batch.index(_spread(positions_T + first, mask, 0)) if has_positions else None,
            sources=None if sources_T is None else batch.index(_spread(sources_T, mask, -1)),
            features=batch.features,
        )
        return states.flatten(0, 1)[batch.index(np.flatnonzero(mask))]


Layout = Packed | Padded


def forward(layout: Layout, batch: Batch, place: Place | None = None) -> Tensor:
    """Return the last hidden states of every token of `batch`, in its order: `[T, D]`.

    Args:
        layout: runs the batch.
        batch: sequences.
        place: the only token of each sequence whose row will be used; others may be NaN.
    """
    vision = layout.backbone.vision
    if batch.media and batch.features is None:
        assert vision is not None
        with torch.inference_mode():
            batch = replace(batch, features=vision.encode(batch.media, apart=layout.is_apart))
        if vision.is_apart:
            return _apart(layout, batch, place)
    groups = layout.groups(batch.lengths, hides=batch.hides)
    if groups == [list(range(batch.size))]:
        return layout.run(batch, place)
    hidden_TD: Tensor | None = None
    for members in groups:
        part, rows = batch.select(members)
        part_TD = layout.run(part, place)
        if hidden_TD is None:
            hidden_TD = part_TD.new_empty(batch.tokens, part_TD.shape[-1])
        hidden_TD[rows] = part_TD
    assert hidden_TD is not None
    return hidden_TD


def _apart(layout: Layout, batch: Batch, place: Place | None) -> Tensor:
    """Return the rows of a batch in which a picture is a sequence of its own: its features."""
    assert batch.features is not None
    rows_FD = batch.features.rows_FD
    hidden_TD = rows_FD.new_empty(batch.tokens, rows_FD.shape[-1])
    texts = [i for i, sequence in enumerate(batch.sequences) if not sequence.media]
    pictures = [i for i, sequence in enumerate(batch.sequences) if sequence.media]
    part, rows = batch.select(pictures)
    hidden_TD[rows] = rows_FD[part.sources_T]
    if texts:
        part, rows = batch.select(texts)
        part = replace(part, media=(), host_sources_T=None, features=None)
        hidden_TD[rows] = forward(layout, part, place).to(hidden_TD.dtype)
    return hidden_TD


def candidates(
    model: PreTrainedModel,
    kernels: Kernels | None = None,
    *,
    packed: bool = True,
    vision: Vision | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Layout]:
    """Yield layouts from the fastest to the safest.

    Args:
        model: in eval mode, on its device, with the attention implementation that it prefers.
        kernels: native CPU kernels for packed attention.
        packed: whether packed layouts are among them.
        vision: see `Backbone`.
        finish: see `Backbone`.
    """
    offsets = dict.fromkeys((position_offset(model), 0)) if packed else ()
    for offset in offsets:
        yield Packed(Backbone(model, offset, vision, finish), kernels)
    backbone = Backbone(model, vision=vision, finish=finish)
    yield Padded(backbone)
    yield Padded(backbone, equal=True)
    yield Padded(backbone, equal=True, size=1)


def _implementations(config: PretrainedConfig) -> dict[str, Any]:
    """Return the names of the attention of a model and of its parts, as `set_attn_implementation` takes them.

    Some parts have none, as those that are settings (MPT) or convolutions.
    """
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    nested = {name: _implementations(part) for name, part in parts.items() if part is not None}
    names = {"": config._attn_implementation, **nested}
    return {name: value for name, value in names.items() if value}


def _bound_bias(module: nn.Module) -> None:
    """T5 builds a bias for the whole packed length, T x T; the longest sequence is all that is ever read."""
    original: Callable[..., Tensor] = module.compute_bias  # type: ignore[assignment]

    def compute_bias(query_length: int, key_length: int, **kwargs: Any) -> Tensor:
        longest = attention.current().batch.max_length
        return original(min(query_length, longest), min(key_length, longest), **kwargs)

    module.compute_bias = compute_bias  # type: ignore[assignment]


def _skipping(padding_idx: int, positions_T: Ids, batch: Batch) -> Ids:
    """Give tokens `padding_idx` that position, and count the others as if these were not there."""
    pads_T = batch.host_ids_T == padding_idx
    if not pads_T.any():
        return positions_T
    before_T = np.cumsum(pads_T) - pads_T
    before_T -= np.repeat(before_T[list(batch.starts[:-1])], batch.lengths)
    return np.where(pads_T, padding_idx, positions_T - before_T)


def _spread_rows(hidden: Tensor, batch: Batch, place: Place | None) -> Tensor:
    """Put rows at `place`, `[B, D]`, where they belong in `[T, D]`; all rows stay as they are."""
    if place is None:
        return hidden
    spread_TD = hidden.new_full((batch.tokens, hidden.shape[-1]), torch.nan)
    return spread_TD.index_copy_(0, batch.rows_at(place), hidden)


def _spread(x_T: np.ndarray, mask_BL: np.ndarray, fill: int) -> np.ndarray:
    """Return `[T]` as `[B, L]`, and `[3, T]` as `[3, B, L]`, `fill` beside the tokens."""
    padded_BL = np.full((*x_T.shape[:-1], *mask_BL.shape), fill)
    padded_BL[..., mask_BL] = x_T
    return padded_BL
