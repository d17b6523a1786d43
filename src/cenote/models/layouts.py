"""How a backbone is run over a batch: packed where that is proved exact, padded otherwise.

`choose` tries layouts from the fastest to the safest and returns the first that passes two tests on the model at
hand: its rows equal the model's own forward over one sequence at a time, and swapping one sequence's tokens moves
no row of the others. Poolers never see padding: every layout returns packed rows.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cenote.errors import CheckpointError
from cenote.models.passes import last_layer
from cenote.models.passes.fuse import fuse
from cenote.tensors import attention
from cenote.tensors.graphs import Graphs
from cenote.tensors.packing import PLACES, SHORTEST_PREFIX, pack, set_apart, share
from cenote.types import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cenote.tensors.native import Kernels, Products
    from cenote.tensors.packing import Batch, Place, Static

log = logging.getLogger(__name__)

PADDED_SEQUENCES = {"cpu": 8, "cuda": 64}
LONGEST_REAL_WINDOW = 512
MOST_REAL_POSITIONS = 2048
PROBE_WINDOW = 32
SHORT = 16
"""Tokens of a sequence are enough to see what Linear layers do."""
INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
POSITION_TABLES = frozenset({"position_embeddings", "position_embedding", "embed_positions", "wpe"})
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference that counts as equal, relative to the largest hidden value (at least 1)."""


@dataclass(eq=False)
class Backbone:
    """A Transformers model and what its forward takes.

    Attributes:
        accepts: names of the parameters of its `forward`.
        position_offset: what is added to positions that count from 0 (`padding_idx + 1` in the RoBERTa family).
        padding_idx: id whose tokens keep position `padding_idx`; RoBERTa treats a literal `<pad>` so.
        rope_class: lengths that share rotary frequencies share a class; `None` = all lengths do.
        device: where the weights are.
    """

    model: PreTrainedModel
    accepts: frozenset[str] = field(init=False)
    position_offset: int = 0
    padding_idx: int | None = None
    rope_class: Callable[[int], int] | None = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        only_keywords = "input_ids" not in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepts = INPUTS if only_keywords else frozenset(parameters)
        self.rope_class = rope_class(self.model)
        self.device = self.model.device

    def run(self, **inputs: Tensor | None) -> Tensor:
        """The model's own forward over `[B, L]` inputs; last hidden states `[B, L, D]`."""
        if self.rope_class is not None:
            reset_rope(self.model)
        known = {name: value for name, value in inputs.items() if value is not None and name in self.accepts}
        if "use_cache" in self.accepts:
            known["use_cache"] = False  # type: ignore[assignment]
        with torch.inference_mode():
            output = self.model(**known)
        states = getattr(output, "last_hidden_state", None)
        hidden: Tensor = output[0] if states is None else states
        return hidden


class Packed:
    """The whole batch in one forward, attention kept apart by `cenote.tensors.attention`.

    Attributes:
        is_causal: whether the last forward's attention was.
        is_fused: whether one kernel did all sequences of it, rather than each length by itself.
        shares_prefixes: whether what sequences have in common at their beginning runs once.
        places: the tokens for which alone the last layer can run.
        graphs: replays forwards instead of launching their kernels one by one.
        unrecorded: why it does not, although it was to, or an empty string.
    """

    name = "packed"

    def __init__(self, backbone: Backbone, kernels: Kernels | None = None) -> None:
        self.backbone = backbone
        self.kernels = kernels
        self.is_causal = False
        self.is_fused = False
        self.shares_prefixes = False
        self.places: frozenset[Place] = frozenset()
        self.graphs: Graphs | None = None
        self.unrecorded = ""
        backbone.model.set_attn_implementation(attention.register())
        for module in backbone.model.modules():
            if hasattr(module, "compute_bias"):
                _bound_bias(module)

    def groups(self, lengths: tuple[int, ...], *, hides: bool = False) -> list[list[int]]:
        """Sequence numbers that may share a forward."""
        if self.backbone.rope_class is None:
            return [list(range(len(lengths)))]
        return list(_classes(lengths, self.backbone.rope_class).values())

    def run(self, batch: Batch, place: Place | None = None) -> Tensor:
        """One forward; `[T, D]`, NaN but for the rows at `place`, if one of `places` is given."""
        batch = self._positioned(batch)
        if batch.hides:
            return self._run(set_apart(batch))
        if place not in self.places or batch.tokens < 2 * batch.size:
            place = None
        shared = share(batch) if self.shares_prefixes else None
        if shared is not None:
            return _spread_rows(self._run(shared.batch, place), shared.batch, place)[shared.expand_T]
        hidden = None if self.graphs is None else self.graphs.run(batch, place)
        return _spread_rows(self._run(batch, place) if hidden is None else hidden, batch, place)

    def record(self, max_tokens: int) -> None:
        """Replay forwards of at most `max_tokens` from now on."""
        self.graphs = Graphs(self._run, self.backbone.device, max_tokens)

    def _run(self, batch: Batch | Static, place: Place | None = None) -> Tensor:
        """`[T, D]`, or `[B, D]` for the rows at `place` alone."""
        with attention.boundaries(batch, self.kernels, place) as under_way:
            hidden_TD = self.backbone.run(
                input_ids=batch.ids_T[None],
                position_ids=batch.positions_T[None],
                token_type_ids=None if batch.type_ids_T is None else batch.type_ids_T[None],
            )[0]
        self.is_causal, self.is_fused = under_way.is_causal, under_way.is_fused
        return hidden_TD

    def _positioned(self, batch: Batch) -> Batch:
        """`batch` with the positions that the model counts."""
        backbone = self.backbone
        if not backbone.position_offset:
            return batch
        positions_T = batch.host_positions_T + backbone.position_offset
        if backbone.padding_idx is not None and (pads := batch.host_ids_T == backbone.padding_idx).any():
            before = np.cumsum(pads) - pads
            before -= np.repeat(before[list(batch.starts[:-1])], batch.lengths)
            positions_T = np.where(pads, backbone.padding_idx, positions_T - before)
        return replace(batch, host_positions_T=positions_T)


class Padded:
    """Sorted micro-batches with an attention mask; rows are unpadded at once.

    Args:
        backbone: the model, with its own attention implementation.
        equal: only sequences of one length share a forward, for models that padding would change.
        size: most sequences in a forward.
    """

    shares_prefixes = False

    def __init__(self, backbone: Backbone, *, equal: bool = False, size: int | None = None) -> None:
        self.backbone = backbone
        self.equal = equal
        self.size = size or PADDED_SEQUENCES.get(backbone.device.type, 8)
        self.name = "one by one" if self.size == 1 else "equal lengths" if equal else "padded"

    def groups(self, lengths: tuple[int, ...], *, hides: bool = False) -> list[list[int]]:
        """Sequence numbers that may share a forward, longest first.

        Args:
            lengths: of the sequences.
            hides: some have hidden tokens, whose rows padding changes in models that let masked tokens see nothing
                (DeBERTa).
        """
        rope = self.backbone.rope_class or (lambda _: 0)
        classes = _classes(lengths, (lambda n: n) if self.equal or hides else rope)
        groups: list[list[int]] = []
        for members in classes.values():
            members.sort(key=lambda i: -lengths[i])
            groups += [members[i : i + self.size] for i in range(0, len(members), self.size)]
        return groups

    def run(self, batch: Batch, place: Place | None = None) -> Tensor:
        """One padded forward over all of `batch`; `[T, D]`, whatever `place` is wanted."""
        places_L, lengths_B1 = np.arange(batch.max_length), np.array(batch.lengths)[:, None]
        mask = seen = places_L < lengths_B1
        if batch.hides:
            seen = places_L < lengths_B1 - np.array([sequence.hidden for sequence in batch.sequences])[:, None]
        pad = getattr(self.backbone.model.config, "pad_token_id", None) or 0
        types_T = batch.host_type_ids_T
        states = self.backbone.run(
            input_ids=batch.index(_spread(batch.host_ids_T, mask, pad)),
            attention_mask=batch.index(seen),
            token_type_ids=None if types_T is None else batch.index(_spread(types_T, mask, 0)),
        )
        return states.flatten(0, 1)[batch.index(np.flatnonzero(mask))]


Layout = Packed | Padded


def forward(layout: Layout, batch: Batch, place: Place | None = None) -> Tensor:
    """Last hidden states of every token of `batch`, in its order: `[T, D]`.

    Args:
        layout: how.
        batch: of what.
        place: the only token of each sequence whose row is wanted; others may be NaN.
    """
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


def choose(
    model: PreTrainedModel,
    *,
    max_length: int = 1 << 30,
    packed: bool = True,
    kernels: Kernels | None = None,
    products: Products[Any] | None = None,
    share_prefixes: bool = True,
    graph_tokens: int = 0,
    filled_to: int = 0,
) -> tuple[Layout, list[str]]:
    """The fastest layout that is exact for `model`, and why each faster one was passed over.

    On a CPU the model's activations are fused with the Linears before them (`cenote.models.passes.fuse`).

    Args:
        model: in eval mode, on its device, with the attention implementation that it prefers.
        max_length: most tokens of a sequence, so that the probe stays within the model's positions.
        packed: whether to try packing at all.
        kernels: native CPU kernels to use where they apply.
        products: what multiplies by packed matrices on a CPU.
        share_prefixes: whether to try running common prefixes once.
        graph_tokens: tokens up to which forwards are replayed, where that is proved to change nothing; 0 = none.
        filled_to: length to which sequences may be filled up with hidden tokens; 0 = no token is hidden.

    Raises:
        CheckpointError: the model's own forward gives values that are not finite, or depends on its neighbours
            in every layout.
    """
    native = model.config._attn_implementation
    reasons: list[str] = []
    filled = _filled(model, min(filled_to, max_length)) if filled_to > 1 else None  # by the windows as they are
    with _shortened_windows(model) as window:
        reference = _one_by_one(model, min(window + 9, max_length))
    for build in _candidates(model, kernels) if packed else _padded_candidates():
        with _shortened_windows(model):
            layout, reason = _try(build, model, reference)
        if layout is not None and filled is not None and (fault := _fault(filled, layout)):
            reason, layout = f"{layout.name}, with hidden tokens: {fault}", None
        if layout is not None:
            with _shortened_windows(model):
                if share_prefixes and isinstance(layout, Packed) and layout.is_causal:
                    _try_sharing(layout, window, max_length)
                if model.device.type == "cpu":
                    probe, other = (partial(forward, layout, x) for x in reference.short)
                    fuse(model, probe, other, kernels, products)
                if isinstance(layout, Packed):
                    _try_places(layout, reference)
                    if graph_tokens:
                        _try_graphs(layout, reference, graph_tokens)
            return layout, reasons
        reasons.append(reason)
        _restore_attention(model, native)
    raise CheckpointError(
        f"{type(model).__name__} does not reproduce its own one-by-one output in any layout: {'; '.join(reasons)}"
    )


def _candidates(model: PreTrainedModel, kernels: Kernels | None) -> Iterator[Callable[[Backbone], Layout]]:
    offsets = dict.fromkeys((position_offset(model), 0))
    yield from (partial(_packed_from, offset, kernels) for offset in offsets)
    yield from _padded_candidates()


def _padded_candidates() -> Iterator[Callable[[Backbone], Layout]]:
    yield Padded
    yield lambda backbone: Padded(backbone, equal=True)
    yield lambda backbone: Padded(backbone, equal=True, size=1)


def _packed_from(offset: int, kernels: Kernels | None, backbone: Backbone) -> Packed:
    backbone.position_offset = offset
    backbone.padding_idx = offset - 1 if offset else None
    return Packed(backbone, kernels)


def _try(
    build: Callable[[Backbone], Layout], model: PreTrainedModel, reference: _Reference
) -> tuple[Layout | None, str]:
    """Build a layout and prove it; the layout, or `None` and the reason."""
    try:
        layout = build(Backbone(model))
    except Exception as error:  # as in _fault
        return None, _line(error)
    fault = _fault(reference, layout)
    return (None, f"{layout.name}: {fault}") if fault else (layout, "")


def _fault(reference: _Reference, layout: Layout) -> str:
    """Why `layout` is not exact, or an empty string."""
    try:
        return reference.fault(layout)
    except Exception as error:  # whatever a model raises under a layout means: not in this layout
        return _line(error)


def _try_sharing(layout: Packed, window: int, max_length: int) -> None:
    """Let `layout` share prefixes, also those longer than the model's window, if that is proved to change nothing."""
    try:
        fault = _sharing_fault(layout, window, max_length)
    except Exception as error:  # as in _fault
        fault = _line(error)
    layout.shares_prefixes = not fault
    if fault:
        log.info("%s does not share prefixes: %s", type(layout.backbone.model).__name__, fault)


def _sharing_fault(layout: Packed, window: int, max_length: int) -> str:
    model = layout.backbone.model
    draw = _Draw(model)
    ends = [draw(n) for n in (8, 8, 3, 1, 8)]
    longest_prefix = max_length - len(ends[0])
    if longest_prefix < SHORTEST_PREFIX:
        return f"it takes {max_length} tokens at most"
    prefix = draw(min(window + 5, longest_prefix))
    *drawn, other = [prefix + end for end in ends]
    reference = _Reference(model, [*drawn, draw(11)], other, partial(forward, layout))
    layout.shares_prefixes = True
    return reference.fault(layout)


def _try_places(layout: Packed, reference: _Reference) -> None:
    """Let `layout` run the last layer for single tokens, where that is proved to change nothing."""
    layer = last_layer.find(layout.backbone.model)
    if layer is None:
        return
    last_layer.LastLayer(layer)
    for place in ("last",) if layout.is_causal else PLACES:
        layout.places |= {place}
        try:
            exact = reference.is_exact_at(layout, place)
        except Exception as error:  # as in _fault
            log.info("%s runs its last layer for all tokens: %s", type(layout.backbone.model).__name__, _line(error))
            exact = False
        if not exact:
            layout.places -= {place}
    if not layout.places:
        del vars(layer)["forward"]


def _try_graphs(layout: Packed, reference: _Reference, max_tokens: int) -> None:
    """Let `layout` replay its forwards if that is proved to change nothing, for other batches of a shape too."""
    model = layout.backbone.model
    if layout.backbone.rope_class is not None:
        layout.unrecorded = "its rotary frequencies depend on the length of a sequence"
        return
    drawn, other = reference.drawn
    moved = _Reference(model, [*drawn[2:], *drawn[:2]], other, partial(forward, layout))
    layout.record(max_tokens)
    assert layout.graphs is not None
    layout.unrecorded = reference.fault(layout) or moved.fault(layout) or layout.graphs.fault
    for place in layout.places:
        if not layout.unrecorded and not (reference.is_exact_at(layout, place) and moved.is_exact_at(layout, place)):
            layout.unrecorded = f"the last layer gives other rows for the {place} tokens"
    layout.graphs = None
    if not layout.unrecorded:
        layout.record(max_tokens)  # anew: a recording keeps the shortened windows of the probe


class _Draw:
    """Random ordinary token ids of a model, the same at every start."""

    def __init__(self, model: PreTrainedModel) -> None:
        special = {getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls")}
        self._ids = torch.tensor([i for i in range(min(vocabulary(model), 5000)) if i not in special] or [0])
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, count: int) -> list[int]:
        picks = torch.randint(len(self._ids), (count,), generator=self._generator)
        ids: list[int] = self._ids[picks].tolist()
        return ids


def _one_by_one(model: PreTrainedModel, longest: int) -> _Reference:
    """A few short random sequences and the model's own answer to each, alone."""
    lengths = [min(n, longest) for n in (7, 11, max(longest, 1), 11, 3)]
    draw = _Draw(model)
    drawn = [draw(n) for n in lengths]
    other = draw(lengths[1])
    # A literal <mask> changes the scale of a whole row in ESM, a literal <pad> the positions in RoBERTa.
    if isinstance(mask := getattr(model.config, "mask_token_id", None), int) and 0 <= mask < vocabulary(model):
        other[0] = mask
    if position_offset(model) and lengths[3] > 2:
        drawn[3][1] = position_offset(model) - 1
    # Models that check the length of their input must see a batch longer than their positions.
    while (rows := position_rows(model)) and rows < MOST_REAL_POSITIONS and sum(map(len, drawn)) <= rows:
        drawn.append(draw(lengths[2]))
    alone = Padded(Backbone(model), equal=True, size=1)
    return _Reference(model, drawn, other, partial(forward, alone))


def _filled(model: PreTrainedModel, length: int) -> _Reference:
    """Sequences that few to many hidden tokens fill up to `length`, with one that has none among them."""
    draw = _Draw(model)
    seen = [max(1, min(n, length - 1)) for n in (3, length // 2, length - 1)]
    drawn = [draw(n) for n in (length, length, min(5, length), length)]
    hidden = [length - seen[0], length - seen[1], 0, length - seen[2]]
    alone = Padded(Backbone(model), equal=True, size=1)
    return _Reference(model, drawn, draw(length), partial(forward, alone), hidden)


class _Reference:
    """A batch and the rows that it must have.

    Args:
        model: whose device and dtype count.
        drawn: token ids of the sequences.
        other: what takes the second one's place to see whether that moves rows of the others.
        answer: gives the rows.
        hidden: how many of each one's last tokens are hidden.

    Raises:
        CheckpointError: they are not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drawn: list[list[int]],
        other: list[int],
        answer: Callable[[Batch], Tensor],
        hidden: list[int] | None = None,
    ) -> None:
        self.drawn = drawn, other
        self.tolerance = TOLERANCE.get(model.dtype, 1e-1)
        counts = hidden or [0] * len(drawn)
        self.batch, self.swapped = (
            pack([Sequence(ids, hidden=n) for ids, n in zip(batch, counts, strict=True)], model.device)
            for batch in (drawn, [drawn[0], other, *drawn[2:]])
        )
        short = [ids[:SHORT] for ids in drawn[:5]]
        self.short = [pack([Sequence(ids[::way]) for ids in short], model.device) for way in (1, -1)]
        self.rows = answer(self.batch).float()
        if not bool(torch.isfinite(self.rows).all()):
            where = f"for ordinary tokens: the weights are damaged, or do not fit the dtype {model.dtype}"
            if hidden is not None:
                where = f"where hidden tokens fill queries up to {len(drawn[0])}, as the checkpoint wants it"
            raise CheckpointError(
                f"{type(model).__name__} returns values that are not finite (NaN or infinity) {where}"
            )

    def fault(self, layout: Layout) -> str:
        """Why `layout` is not exact, or an empty string."""
        batch = self.batch
        rows = forward(layout, batch)
        worst = float((rows.float() - self.rows).abs().max())
        allowed = self.tolerance * max(1.0, float(self.rows.abs().max()))
        if not worst <= allowed:
            return f"differs from the model's own output by {worst:.1e} (allowed {allowed:.1e})"
        other = forward(layout, self.swapped)
        own = torch.ones(batch.tokens, dtype=torch.bool)
        own[batch.starts[1] : batch.starts[2]] = False
        if not torch.equal(rows[own], other[own]):
            return "rows move when a neighbour's tokens change"
        return ""

    def is_exact_at(self, layout: Layout, place: Place) -> bool:
        """Whether `layout` gives the rows at `place` where it is asked for them alone."""
        wanted_B = self.batch.rows_at(place)
        found, rows = forward(layout, self.batch, place)[wanted_B].float(), self.rows[wanted_B]
        return torch.allclose(found, rows, 0, self.tolerance * max(1.0, float(self.rows.abs().max())))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def vocabulary(model: PreTrainedModel) -> int:
    """Rows of the token embedding: every smaller id can be looked up."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
    return rows


def position_offset(model: PreTrainedModel) -> int:
    """Where positions start: `padding_idx + 1` of the position table, if that has a padding row, else 0."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def position_rows(model: PreTrainedModel) -> int | None:
    """Number of usable rows of a learned absolute position table, or `None` if the model has none."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in POSITION_TABLES and isinstance(module, torch.nn.Embedding):
            return int(module.weight.shape[0]) - max(position_offset(model), int(getattr(module, "offset", 0)))
    return None


def rope_class(model: PreTrainedModel) -> Callable[[int], int] | None:
    """How lengths fall into classes with equal rotary frequencies; `None` if frequencies do not depend on length.

    "longrope" has two sets of frequencies; "dynamic" NTK has one per length beyond the trained one
    (`transformers/modeling_rope_utils.py`).
    """
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        names = set(types.values()) if isinstance(types, dict) else {types}
        if "longrope" in names:
            limit = int(_original_length(module))
            return lambda n: int(n > limit)
        if any(isinstance(name, str) and "dynamic" in name for name in names):
            limit = int(module.original_max_seq_len)  # type: ignore[arg-type]
            return lambda n: max(n, limit)
    return None


def _original_length(module: nn.Module) -> int:
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    if "original_max_position_embeddings" not in parameters:
        parameters = next(p for p in parameters.values() if "original_max_position_embeddings" in p)
    return int(parameters["original_max_position_embeddings"])


def reset_rope(model: PreTrainedModel) -> None:
    """Forget the longest sequence seen: Transformers keeps grown "dynamic" frequencies for later, shorter inputs."""
    for module in model.modules():
        names = {*vars(module), *module._buffers} if hasattr(module, "original_max_seq_len") else set()
        for name in (n for n in names if n.endswith("original_inv_freq")):
            prefix = name.removesuffix("original_inv_freq")
            module.register_buffer(
                f"{prefix}inv_freq", getattr(module, name).to(model.device).clone(), persistent=False
            )
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _bound_bias(module: nn.Module) -> None:
    """T5 builds a bias for the whole packed length, T x T; the longest sequence is all that is ever read."""
    original: Callable[..., Tensor] = module.compute_bias  # type: ignore[assignment]

    def compute_bias(query_length: int, key_length: int, **kwargs: Any) -> Tensor:
        longest = attention.current().batch.max_length
        return original(min(query_length, longest), min(key_length, longest), **kwargs)

    module.compute_bias = compute_bias  # type: ignore[assignment]


def _restore_attention(model: PreTrainedModel, native: str) -> None:
    if model.config._attn_implementation != native:
        model.set_attn_implementation(native)
    for module in model.modules():
        vars(module).pop("compute_bias", None)


@contextmanager
def _shortened_windows(model: PreTrainedModel) -> Iterator[int]:
    """Yield a window length that a probe can exceed cheaply; long windows are shortened for the time being."""
    holders: list[Any] = [m for m in (model.config, *model.modules()) if _window(m) is not None]
    longest = max((_window(m) or 0 for m in holders), default=0)
    if longest <= LONGEST_REAL_WINDOW:
        yield max(longest, PROBE_WINDOW)
        return
    saved = [(holder, holder.sliding_window) for holder in holders]
    try:
        for holder, _ in saved:
            holder.sliding_window = PROBE_WINDOW
        yield PROBE_WINDOW
    finally:
        for holder, window in saved:
            holder.sliding_window = window


def _window(holder: Any) -> int | None:
    window = getattr(holder, "sliding_window", None)
    return window if isinstance(window, int) and not isinstance(window, bool) else None


def _classes(lengths: tuple[int, ...], key: Callable[[int], int]) -> dict[int, list[int]]:
    classes: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        classes.setdefault(key(length), []).append(i)
    return classes


def _spread_rows(hidden: Tensor, batch: Batch, place: Place | None) -> Tensor:
    """Rows at `place`, `[B, D]`, where they belong in `[T, D]`; all rows as they are."""
    if place is None:
        return hidden
    spread_TD = hidden.new_full((batch.tokens, hidden.shape[-1]), torch.nan)
    return spread_TD.index_copy_(0, batch.rows_at(place), hidden)


def _spread(x_T: np.ndarray, mask_BL: np.ndarray, fill: int) -> np.ndarray:
    padded_BL = np.full(mask_BL.shape, fill)
    padded_BL[mask_BL] = x_T
    return padded_BL
