"""The proofs at load: random ids, the rows that a model has to give for them, and the tolerances.

Nothing that Cenote assumes of a model is looked up by its name: it is proved on the model at hand, by a batch of short
random sequences.

- *Equal*: rows are those of the model's own forward over one sequence at a time, within `EQUAL`; also where a batch has
  more tokens than the model has positions.
- *Isolated*: when the tokens of a sequence change, the rows of its neighbours do not move by more than `ROUNDINGS`
  times what rounding by itself moves them. Rounding is measured without any neighbour's content: each sequence in a
  batch of copies of itself. In most models nothing moves by a bit; grouped products over experts are cut among threads
  by how many rows each expert has, which depends on the whole batch.
- *Unchanged*: rows after a change of the model are those before it, within `UNCHANGED`.
- *Finite*: values are numbers.
- *Stable*: forwards leave the model as it was, and have the same results beside each other as alone.

`choose` names the layout.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from cenote.core import Sequence
from cenote.errors import CheckpointError
from cenote.functions import coalesce
from cenote.models.layouts import Backbone, Padded, candidates, forward
from cenote.models.traits import (
    block_sparse_length,
    logits_of,
    position_offset,
    position_rows,
    reset_attention,
    vocabulary,
    windows,
)
from cenote.models.transformer_module import as_tuple
from cenote.tensors.packing import pack
from cenote.tensors.sharing import SHORTEST_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Sequence as Seq

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.models.layouts import Layout
    from cenote.models.vision import Vision
    from cenote.tensors.native import Kernels
    from cenote.tensors.packing import Batch, Place

log = logging.getLogger(__name__)

EQUAL = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest distance of rows that count as equal, by the model's dtype. All distances are relative to the largest value
of the rows, or to 1 if that is smaller."""
UNCHANGED = 2e-5
"""Largest distance of float32 rows before and after a change that is to keep them."""
ROUNDINGS = 4.0
"""Rows that move by more than so many times their movement by rounding are not isolated. Over experts of 4 to 128 they
moved by up to 1.2 times that, and both by less than the model's own distance to float64."""
LEAST_COSINE = 0.9
"""Minimum mean cosine of rows with narrow weights to those in float32; real text and weights are far above it."""

LENGTHS = (7, 11, 11, 3)
"""Tokens of the sequences of most probes; one that exceeds the model's window joins them."""
COPIES = (2, 5)
"""Sizes of the batches of copies in which rounding shows."""
COPIED = 5
"""Sequences of a probe of which there are copies."""
SHORT = 16
"""Tokens of a sequence that are enough to watch Linear layers."""
LONGEST_REAL_WINDOW = 512
PROBE_WINDOW = 32
MOST_REAL_POSITIONS = 2048
PATIENCE = 60.0
"""Seconds after which a forward beside another counts as stuck."""


class Draw:
    """Random ordinary token ids of a model, the same at every start."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        names = ("pad", "bos", "eos", "sep", "cls")
        special = {name: as_tuple(getattr(config, f"{name}_token_id", None)) for name in names}
        ordinary = set(range(min(vocabulary(model), 5000))).difference(*special.values())
        self._ids = torch.tensor(sorted(ordinary) or [0])
        self._end: tuple[int, ...] = special["eos"][:1] if getattr(config, "is_encoder_decoder", False) else ()
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, count: int) -> list[int]:
        """Draw `count` ids."""
        picks = torch.randint(len(self._ids), (count,), generator=self._generator)
        ids: list[int] = self._ids[picks].tolist()
        return ids

    def text(self, count: int) -> list[int]:
        """Draw `count` ids that end as a text does: BART's heads look at its end-of-sequence token."""
        return [*self(count - len(self._end)), *self._end]


def distance(actual: Tensor, expected: Tensor, *, among: Tensor | None = None) -> float:
    """Return the largest difference of two tensors, relative to the largest value of `among` (at least 1).

    Infinity for different shapes; NaN where a value is NaN.

    Args:
        actual: any shape.
        expected: likewise.
        among: `None` = `expected`.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.numel():
        return 0.0
    scale = max(1.0, float(coalesce(among, expected).abs().max()))
    return float((actual.float() - expected.float()).abs().max()) / scale


def fault_beyond(limit: float, moved: float, fault: str) -> str:
    """Return `fault` if rows moved by more than `limit`, or became NaN; else an empty string."""
    return "" if moved <= limit else fault


def fault_of(check: Callable[[], str]) -> str:
    """Return the fault that `check` finds, an empty string if there is none; an exception is a fault.

    Any exception in a forward means that the model cannot be run in this way.
    """
    try:
        return check()
    except Exception as error:
        return line_of(error)


def line_of(error: Exception) -> str:
    """Return the first line of an error, with its class."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


class Probe:
    """A batch of random sequences, and the rows that a layout has to give for it.

    Args:
        model: a backbone.
        sequences: at least two.
        other: takes the place of the second sequence, to see whether rows of the others move.
        run: the rows `[T, D]` of a batch.
        crowd: number of copies of the third sequence in a batch of their own.

    Attributes:
        batch: the sequences.
        swapped: the sequences, the second of them `other`.
        short: two batches of their beginnings, forwards and backwards.
        rows_TD: the rows, float32.
        tolerance: see `EQUAL`.

    Raises:
        CheckpointError: the rows are not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: list[Sequence],
        other: Sequence,
        run: Callable[[Batch], Tensor],
        crowd: int = 0,
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.other = other
        self.crowd = crowd
        self.tolerance = EQUAL.get(model.dtype, 1e-1)
        self.batch = pack(sequences, model.device)
        self.swapped = pack([sequences[0], other, *sequences[2:]], model.device)
        forwards = [list(sequence.ids[:SHORT]) for sequence in sequences[:COPIED]]
        backwards = [ids[::-1] for ids in forwards]
        self.short = [_packed(forwards, model.device), _packed(backwards, model.device)]
        self.rows_TD = run(self.batch).float()
        if not bool(torch.isfinite(self.rows_TD).all()):
            where = f"for ordinary tokens: the weights are damaged, or do not fit the dtype {model.dtype}"
            if self.batch.hides:
                where = f"where hidden tokens fill queries up to {len(sequences[0])}, as the checkpoint wants it"
            raise CheckpointError(
                f"{type(model).__name__} returns values that are not finite (NaN or infinity) {where}"
            )

    def fault(self, layout: Layout) -> str:
        """Return why `layout` is not exact, or an empty string."""
        rows_TD = forward(layout, self.batch)
        return self.equal(rows_TD) or self.isolated(layout, rows_TD) or self.crowded(layout)

    def equal(self, rows_TD: Tensor) -> str:
        """Return how rows differ from the model's own, or an empty string."""
        moved = distance(rows_TD, self.rows_TD)
        fault = f"differs from the model's own output by {moved:.1e} (allowed {self.tolerance:.1e})"
        return fault_beyond(self.tolerance, moved, fault)

    def crowded(self, layout: Layout) -> str:
        """Return how rows of the crowd differ from the model's own, or an empty string."""
        if not self.crowd:
            return ""
        rows_TD = forward(layout, pack(self.sequences[2:3] * self.crowd, self.model.device))
        own_TD = self.rows_TD[self.batch.starts[2] : self.batch.starts[3]].repeat(self.crowd, 1)
        moved = distance(rows_TD, own_TD, among=self.rows_TD)
        fault = f"differs from the model's own output by {moved:.1e} in a batch of {len(own_TD)} tokens"
        return fault_beyond(self.tolerance, moved, fault)

    def equal_at(self, layout: Layout, place: Place) -> str:
        """Return how the rows at `place` differ where `layout` runs for them alone, or an empty string."""
        rows_B = self.batch.rows_at(place)
        moved = distance(forward(layout, self.batch, place)[rows_B], self.rows_TD[rows_B], among=self.rows_TD)
        return fault_beyond(self.tolerance, moved, f"gives other rows for the {place} tokens, by {moved:.1e}")

    def cosine(self, rows_TD: Tensor) -> float:
        """Return the mean cosine of rows to the model's own; see `LEAST_COSINE`."""
        return float(F.cosine_similarity(rows_TD.float(), self.rows_TD).mean())

    def moved(self, layout: Layout, rows_TD: Tensor | None = None) -> float:
        """Return the distance by which rows of `layout` move when the second sequence has other tokens.

        Args:
            layout: runs the batch.
            rows_TD: the rows of the batch in it, if they are there already.
        """
        if rows_TD is None:
            rows_TD = forward(layout, self.batch)
        neighbours_T = torch.ones(self.batch.tokens, dtype=torch.bool)
        neighbours_T[self.batch.starts[1] : self.batch.starts[2]] = False
        return distance(forward(layout, self.swapped)[neighbours_T], rows_TD[neighbours_T], among=self.rows_TD)

    def isolated(self, layout: Layout, rows_TD: Tensor | None = None) -> str:
        """Return how rows of `layout` depend on their neighbours' tokens, or an empty string; arguments as `moved`."""
        moved = self.moved(layout, rows_TD)
        if moved == 0:
            return ""
        rounding = self.rounding(layout)
        fault = f"rows move by {moved:.1e} when a neighbour's tokens change, and by {rounding:.1e} by rounding"
        return fault_beyond(min(ROUNDINGS * rounding, self.tolerance), moved, fault)

    def rounding(self, layout: Layout) -> float:
        """Return the distance by which rows move when a sequence runs in a batch of copies of itself.

        By the model's own attention; at least one step of the dtype. Copies see no other content than their own, so
        every movement is rounding, and a model whose rows depend on a neighbour's content gains nothing by it.
        """
        largest = torch.finfo(self.model.dtype).eps
        with layout.own_attention() as backbone:
            for sequence in self.sequences[:COPIED]:
                alone_1LD = _copies(backbone, sequence, 1)
                for count in COPIES:
                    beside_BLD = _copies(backbone, sequence, count)
                    moved = distance(beside_BLD, alone_1LD.expand_as(beside_BLD), among=self.rows_TD)
                    largest = max(largest, moved)
        return largest


def one_by_one(backbone: Backbone, longest: int) -> Probe:
    """Probe with a few short random sequences, one of `longest` tokens, and the model's own rows for each alone."""
    model = backbone.model
    first, second, third, last = (min(n, longest) for n in LENGTHS)
    draw = Draw(model)
    ids = [draw(n) for n in (first, second, max(longest, 1), third, last)]
    other = draw(second)
    # A literal <mask> changes the scale of a whole row in ESM, a literal <pad> the positions in RoBERTa.
    mask = getattr(model.config, "mask_token_id", -1)
    if mask in range(vocabulary(model)):
        other[0] = mask
    if position_offset(model) and third > 2:
        ids[3][1] = position_offset(model) - 1
    # Models that check the length of their input must see a batch longer than their positions.
    rows = coalesce(position_rows(model), 0)
    crowd = rows // len(ids[2]) + 1 if rows in range(sum(map(len, ids)), MOST_REAL_POSITIONS) else 0
    return Probe(model, _texts(ids), Sequence(other), _alone(backbone), crowd)


def filled(model: PreTrainedModel, length: int) -> Probe:
    """Probe with sequences that few to many hidden tokens fill up to `length`, with one that has none among them."""
    draw = Draw(model)
    seen = [max(1, min(n, length - 1)) for n in (3, length // 2, length - 1)]
    ids = [draw(n) for n in (length, length, min(5, length), length)]
    hidden = [length - seen[0], length - seen[1], 0, length - seen[2]]
    sequences = [Sequence(tokens, hidden=count) for tokens, count in zip(ids, hidden, strict=True)]
    return Probe(model, sequences, Sequence(draw(length), hidden=hidden[1]), _alone(Backbone(model)))


def prefixed(layout: Layout, max_length: int) -> Probe | None:
    """Probe with sequences with a common beginning longer than the model's window, and their rows in `layout` as it is.

    `None` if the model takes too few tokens for a beginning that would be shared.
    """
    model = layout.backbone.model
    draw = Draw(model)
    ends = [draw(n) for n in (8, 8, 3, 1, 8)]
    longest = max_length - len(ends[0])
    if longest < SHORTEST_PREFIX:
        return None
    with shortened_windows(model) as size:
        prefix = draw(min(size + 5, longest))
        *ids, other = [prefix + end for end in ends]
        return Probe(model, _texts([*ids, draw(11)]), Sequence(other), partial(forward, layout))


def turned(probe: Probe, layout: Layout) -> Probe:
    """Probe with the sequences of `probe` in another order, and their rows in `layout` as it is."""
    sequences = [*probe.sequences[2:], *probe.sequences[:2]]
    return Probe(probe.model, sequences, probe.other, partial(forward, layout))


def brief(layout: Layout, max_length: int) -> Probe:
    """Probe with three short sequences, and their rows in `layout` as it is."""
    model = layout.backbone.model
    draw = Draw(model)
    first, second, _, last = (min(n, max_length) for n in LENGTHS)
    sequences = _texts([draw(first), draw(second), draw(last)])
    return Probe(model, sequences, Sequence(draw(second)), partial(forward, layout))


def pictured(vision: Vision, model: PreTrainedModel) -> Probe:
    """Probe with pictures among texts, and the model's own rows for each sequence alone.

    Pictures stand first and last, once and twice, several in a sequence; one sequence is text alone. The sequence that
    is exchanged keeps its ids and has other pictures.

    Raises:
        CheckpointError: the model's own rows do not move with the content of a picture.
    """
    draw, drawn = Draw(model), vision.draw(torch.Generator().manual_seed(0))
    first, second, third, fourth = islice(drawn, 4)
    twin = next(x for x in drawn if x.grid == second.grid and x.tokens == second.tokens)
    text = [draw(n) for n in LENGTHS]
    if vision.is_apart:
        layouts: list[list[Any]] = [[text[0]], [second], [first], [text[3]], [third], [second], [first]]
        other: list[Any] = [twin]
    else:
        layouts = [[text[0]], [text[1], second], [first, text[2]], [text[3], third, text[1], fourth, first]]
        layouts += [[second, second, text[3]], [text[1], second]]
        other = [text[1], twin]
    sequences = [vision.sequence(parts) for parts in layouts]
    swapped = vision.sequence(other)
    probe = Probe(model, sequences, swapped, partial(_each_alone, vision))
    moved = distance(vision.alone(swapped).float(), vision.alone(sequences[1]).float())
    if not moved > probe.tolerance:
        raise CheckpointError(f"{type(model).__name__} gives the same rows for other pictures")
    return probe


def prefixed_pictures(layout: Layout) -> Probe | None:
    """Probe with sequences of the same ids and of different pictures, and their rows in `layout` as it is.

    `None` if pictures have no text before or behind them.
    """
    model, vision = layout.backbone.model, layout.backbone.vision
    if vision is None or vision.is_apart:
        return None
    draw, drawn = Draw(model), vision.draw(torch.Generator().manual_seed(1))
    first = next(drawn)
    second, third = islice((x for x in drawn if x.grid == first.grid and x.tokens == first.tokens), 2)
    begin, end = draw(SHORTEST_PREFIX + 2), draw(3)
    sequences = [vision.sequence([begin, picture, end]) for picture in (first, second, first, third)]
    return Probe(model, sequences, vision.sequence([begin, third, end]), partial(forward, layout))


def _each_alone(vision: Vision, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return torch.cat([vision.alone(sequence) for sequence in batch.sequences])


class HeadProbe:
    """A few short random sequences, and the output of a model with a head for each alone, by its own forward.

    Attributes:
        batch: the sequences.
        rows_TD: last hidden states of the backbone.
        logits: of the whole model, float32, one tensor for each sequence.
    """

    def __init__(self, full: PreTrainedModel, *, max_length: int) -> None:
        draw = Draw(full)
        ids = [draw.text(min(n, max_length)) for n in LENGTHS]
        self.batch = _packed(ids, full.device)
        self._tolerance = EQUAL.get(full.dtype, 1e-1)
        inputs = [torch.tensor([sequence], device=full.device) for sequence in ids]
        with torch.inference_mode():
            self.logits = [logits_of(full(input_ids=ids_1L, return_dict=True))[0].float() for ids_1L in inputs]
        backbone: PreTrainedModel = full.base_model  # type: ignore[assignment]
        reset_attention(backbone)
        self.rows_TD = _alone(Backbone(backbone))(self.batch)

    @property
    def width(self) -> int:
        """Number of logits of a token or a sequence."""
        return int(self.logits[0].shape[-1])

    def agrees(self, logits: list[Tensor], columns: Seq[int] = ()) -> bool:
        """Return whether logits, one tensor for each sequence, are those of the whole model, or its `columns`."""
        chosen = list(columns) or slice(None)
        expected = [row[..., chosen] for row in self.logits]
        return distance(_joined(logits), _joined(expected)) <= self._tolerance


@dataclass(frozen=True)
class Proved:
    """The layout that is exact for a model.

    Attributes:
        layout: the layout, installed.
        reasons: why each faster one was passed over.
        probe: the sequences by which it was proved, whose forwards need `shortened_windows`.
    """

    layout: Layout
    reasons: list[str]
    probe: Probe


def choose(
    model: PreTrainedModel,
    *,
    max_length: int = 1 << 30,
    packed: bool = True,
    kernels: Kernels | None = None,
    filled_to: int = 0,
    vision: Vision | None = None,
    pictures: Probe | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Proved:
    """Find the fastest layout that is exact for `model`.

    Args:
        model: in eval mode, on its device, with the attention implementation that it prefers.
        max_length: maximum tokens of a sequence, so that the probe stays within the model's positions.
        packed: whether to try packing at all.
        kernels: native CPU kernels to use where they apply.
        filled_to: length to which sequences may be filled up with hidden tokens; 0 = no token is hidden.
        vision: see `Backbone`, as is `finish`.
        pictures: the probe with pictures, if it takes any.

    Raises:
        CheckpointError: its own forward gives values that are not finite, or depends on neighbours in every layout.
    """
    reasons: list[str] = []
    further = {"pictures": pictures} if pictures is not None else {}
    if filled_to > 1:
        further["hidden tokens"] = filled(model, min(filled_to, max_length))  # by the windows as they are
    reference = Backbone(model, vision=vision, finish=finish)
    with shortened_windows(model) as size:
        probe = one_by_one(reference, min(max(size, block_sparse_length(model)) + 9, max_length))
    for layout in candidates(model, kernels, packed=packed, vision=vision, finish=finish):
        fault = _layout_fault(layout, probe, further)
        if not fault:
            return Proved(layout, reasons, probe)
        reasons.append(fault)
        layout.remove()
    raise CheckpointError(
        f"{type(model).__name__} does not reproduce its own one-by-one output in any layout: {'; '.join(reasons)}"
    )


def _layout_fault(layout: Layout, probe: Probe, further: Mapping[str, Probe]) -> str:
    """Install `layout`, and return why it is not exact, also for further probes, or an empty string."""

    def check() -> str:
        layout.install()
        with shortened_windows(probe.model):
            return probe.fault(layout)

    fault = fault_of(check)
    if fault:
        return f"{layout.name}: {fault}"
    for name, other in further.items():
        fault = fault_of(partial(other.fault, layout))
        if fault:
            return f"{layout.name}, with {name}: {fault}"
    return ""


@contextmanager
def shortened_windows(model: PreTrainedModel) -> Iterator[int]:
    """Yield a window length that a probe can exceed cheaply; long windows are shortened for the time being."""
    places = windows(model)
    longest = max((place.size for place in places), default=0)
    if longest <= LONGEST_REAL_WINDOW:
        yield max(longest, PROBE_WINDOW)
        return
    try:
        for holder, name, size in places:
            setattr(holder, name, min(size, PROBE_WINDOW))
        yield PROBE_WINDOW
    finally:
        for holder, name, size in places:
            setattr(holder, name, size)


def finite(values: Tensor) -> str:
    """Return a fault if a value is NaN or infinite, or an empty string."""
    return "" if bool(torch.isfinite(values).all()) else "gives values that are not finite (NaN or infinity)"


def unchanged(run: Callable[[], Tensor], expected: Tensor) -> str:
    """Return how a result in float32 differs from that before a change, or an empty string."""
    moved = distance(run(), expected)
    return fault_beyond(UNCHANGED, moved, f"moves the result by {moved:.1e} (allowed {UNCHANGED:.1e})")


def stable(module: nn.Module, runs: list[Callable[[], list[Tensor]]]) -> str:
    """Return why several threads cannot run `module` at a time, or an empty string.

    Transformers' modules are functions of their inputs, as a rule. The exceptions remember something between calls,
    such as the frequencies for the longest sequence so far. Forwards must leave all attributes and buffers of all
    modules as they were, and those of several threads at a time must have the results of each alone.

    Args:
        module: the model, in eval mode.
        runs: forwards over different inputs, each with its results.
    """
    alone = [run() for run in runs]  # attributes that a model makes in its first forwards and keeps are no obstacle
    before = _state(module)
    beside = _run_beside(runs)
    for run in runs[:-1]:  # whose inputs are others than the last one before, so that traces differ
        run()
    after = _state(module)
    changed = [name for name in before | after if not _same(before.get(name), after.get(name))]
    if changed:
        return f"a forward changes {changed[0]}"
    agree = all(map(_close, beside, alone))
    return "" if agree else "forwards beside each other give something else"


def _run_beside(runs: list[Callable[[], list[Tensor]]]) -> list[list[Tensor] | None]:
    """Run each in a thread of its own, all at a time; return their results, `None` for one that fails."""
    results: list[list[Tensor] | None] = [None] * len(runs)
    start = threading.Barrier(len(runs))

    def work(number: int) -> None:
        try:
            start.wait(PATIENCE)
            results[number] = runs[number]()
        except Exception as error:  # one that succeeds alone and fails beside others is not stable
            log.info("beside another forward: %s: %s", type(error).__name__, error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return list(results)


def _close(actual: list[Tensor] | None, expected: list[Tensor]) -> bool:
    if actual is None or len(actual) != len(expected):
        return False
    return all(distance(a, b) <= EQUAL[torch.float32] for a, b in zip(actual, expected, strict=True))


def _state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return every attribute of `module` and its parts, each with contents that show a change in place."""
    state = {}
    for path, part in module.named_modules():
        for name, value in _attributes(part):
            state[f"{path}.{name}" if path else name] = value
    return state


def _attributes(module: nn.Module) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield name, _shown(value)


def _shown(value: Any) -> tuple[Any, ...]:
    """Return `value` and its contents, one level deep."""
    if isinstance(value, torch.Tensor):
        return value, None if value.is_inference() else value._version
    if isinstance(value, dict):
        return value, *value, *value.values()
    if isinstance(value, (list, set, tuple)):
        return value, *value
    inner = getattr(value, "__dict__", None)
    if isinstance(inner, dict) and not isinstance(value, (nn.Module, type)):
        return value, *inner, *inner.values()
    return (value,)


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if type(before) is not type(after):
        return False
    if isinstance(before, tuple) and len(before) == len(after):
        return all(map(is_, before, after)) or all(map(_same, before, after))
    return isinstance(before, (int, float, str)) and before == after


def _texts(ids: list[list[int]]) -> list[Sequence]:
    return [Sequence(tokens) for tokens in ids]


def _packed(ids: list[list[int]], device: torch.device) -> Batch:
    return pack(_texts(ids), device)


def _copies(backbone: Backbone, sequence: Sequence, count: int) -> Tensor:
    """Return the rows `[count, L, D]` of copies of a sequence in one forward, of the tower that reads it."""
    vision = backbone.vision
    if vision is not None and vision.is_apart and sequence.media:
        with torch.inference_mode():
            rows_FD = vision.features(list(sequence.media) * count).rows_FD
        return rows_FD.view(count, -1, rows_FD.shape[-1])
    ids_1L = torch.tensor([sequence.ids], device=backbone.device)
    return backbone.run(input_ids=ids_1L.expand(count, -1))


def _alone(backbone: Backbone) -> Callable[[Batch], Tensor]:
    """Return the model's own forward over one sequence at a time."""
    return partial(forward, Padded(backbone, equal=True, size=1))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
