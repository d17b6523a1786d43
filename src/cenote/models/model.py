"""A loaded checkpoint, able to turn sequences into outputs: forward, pool, head, host.

`PoolingModel.launch` starts a batch; `Pending.finish` waits for it. Between the two, on a GPU, the next batch can
be packed and launched. All tasks of a model share one forward.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cenote.core import ModelInfo, Output, Sequence
from cenote.errors import BadRequest, CenoteError, EngineFailed
from cenote.functions import optional, places_by
from cenote.models import lora
from cenote.models.audit import Audit
from cenote.models.classifiers import at_none
from cenote.models.layouts import forward
from cenote.models.passes import shelf
from cenote.tasks import TASKS, only_of
from cenote.tensors.native import torch_on_one_thread
from cenote.tensors.packing import pack
from cenote.tensors.results import kept

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq
    from pathlib import Path

    from torch import Tensor

    from cenote.core import PoolingParams
    from cenote.models.layouts import Layout
    from cenote.models.passes.shelf import Shelf
    from cenote.models.poolers import TaskOutput
    from cenote.tensors.packing import Batch, Place


class PoolingModel:
    """Layout and task outputs of one checkpoint.

    Args:
        invariant: outputs do not depend by a bit on the rest of the batch, or on the number of threads.

    Attributes:
        is_reentrant: whether several threads may `launch` at a time.
    """

    def __init__(
        self,
        info: ModelInfo,
        layout: Layout,
        outputs: Mapping[str, TaskOutput],
        adapters: Shelf | None = None,
        *,
        invariant: bool = False,
    ) -> None:
        self.info = info
        self.layout = layout
        self.outputs = outputs
        self.is_reentrant = False
        self._adapters = adapters
        self._invariant = invariant

    @property
    def shares_prefixes(self) -> bool:
        """Whether tokens with which several sequences begin are run once."""
        return self.layout.shares_prefixes

    def warn(self, note: str) -> None:
        """Add a line to the warnings of the report at start."""
        self.info = self.info.reported(warnings=(*self.info.report.warnings, note))

    def add_adapter(self, name: str, folder: Path) -> None:
        """Add an adapter to those that sequences may choose.

        Raises:
            BadRequest: the model was loaded without room for adapters (`enable_lora`).
            CheckpointError: it cannot be honoured.
        """
        if self._adapters is None or not self._adapters.is_reserved:
            raise BadRequest(
                "this model was loaded without enable_lora, so no adapter can be added to it; load it with "
                "enable_lora, or name the adapter in lora_modules"
            )
        audit = Audit()
        self._adapters.add(lora.read(name, folder, audit), audit)
        self.info = replace(self.info, adapters=self._adapters.names)

    def launch(self, sequences: Seq[Sequence]) -> Pending:
        """Start the forwards of `sequences`, which may mix tasks and parameters: one for each adapter."""
        parts: list[Part] = []
        with torch_on_one_thread() if self._invariant else nullcontext():
            for members in self._groups(sequences):
                with shelf.active(sequences[members[0]].adapter, self.info.adapters):
                    parts += self._run(sequences, members)
        return Pending(sequences, parts, self.layout.backbone.device)

    def _groups(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """Group the numbers of sequences by adapter; each is its own group where its pictures must not meet others."""
        if self._invariant and self.layout.backbone.vision is not None:
            return [[i] for i in range(len(sequences))]
        return list(places_by(sequence.adapter for sequence in sequences).values())

    def _run(self, sequences: Seq[Sequence], chosen: list[int]) -> list[Part]:
        """Run one forward over the sequences numbered `chosen`."""
        order = sorted(chosen, key=lambda i: -len(sequences[i].ids))
        ordered = [sequences[i] for i in order]
        batch = pack(ordered, self.layout.backbone.device)
        groups = _by_output(ordered)
        read = [row for row, sequence in enumerate(ordered) if self._is_read(sequence)]
        with torch.inference_mode():
            hidden_TD = self._forward(batch, read, self._place(batch, groups))
            if not self._invariant:
                return self._finish(hidden_TD, batch, groups, order)
            parts: list[Part] = []
            for row, sequence in enumerate(ordered):
                part, rows = batch.select([row])  # whose rows are a copy, at an address that does not depend on others
                parts += self._finish(hidden_TD[rows], part, _by_output([sequence]), [order[row]])
        return parts

    def _finish(
        self, hidden_TD: Tensor, batch: Batch, groups: Mapping[tuple[str, PoolingParams], list[int]], order: list[int]
    ) -> list[Part]:
        """Pool, and run heads; `order` are the places of the batch's sequences among those that were launched."""
        parts = []
        for (task, params), members in groups.items():
            values, lengths, indices = self.outputs[task](hidden_TD, batch, members, params)
            places = [order[row] for row in members]
            parts.append(Part(task, places, _on_host(values), lengths, optional(_on_host, indices)))
        return parts

    def _forward(self, batch: Batch, read: list[int], place: Place | None) -> Tensor:
        """Hidden states `[T, D]`, of which only those of the sequences numbered `read` count, at `place` if given."""
        if len(read) == batch.size:
            return forward(self.layout, batch, place)
        if not read:
            return torch.empty(batch.tokens, 0, dtype=torch.float32, device=batch.ids_T.device)
        part, rows = batch.select(read)
        part_TD = forward(self.layout, part, place)
        return part_TD.new_zeros(batch.tokens, part_TD.shape[-1]).index_copy_(0, rows, part_TD)

    def _place(self, batch: Batch, groups: Mapping[tuple[str, PoolingParams], list[int]]) -> Place | None:
        """Return the only token of each sequence that all these outputs depend on, if there is one."""
        places: set[Place | None] = set()
        for (task, _), members in groups.items():
            place = getattr(self.outputs[task], "place", at_none)
            places.add(place(batch, members))
        return places.pop() if len(places) == 1 else None

    def _is_read(self, sequence: Sequence) -> bool:
        """Return whether the model has to read `sequence`: not if a table gives all that is asked of it."""
        if not sequence.looked_up:
            return True
        tasks = (sequence.task, *sequence.also)
        return not all(getattr(self.outputs[task], "looks_up", False) for task in tasks)


def _on_host(values: Tensor) -> Tensor:
    """Begin to copy `values` to the host, into pinned memory."""
    return values.to("cpu", non_blocking=True)


def _by_output(sequences: Seq[Sequence]) -> dict[tuple[str, PoolingParams], list[int]]:
    """Return the numbers of `sequences` by the tasks and parameters of their outputs."""
    groups: dict[tuple[str, PoolingParams], list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        groups[sequence.task, sequence.params].append(row)
        for task in sequence.also:
            groups[task, only_of(TASKS[task], sequence.params)].append(row)
    return groups


class Part(NamedTuple):
    """Results of one task on their way to the host.

    Attributes:
        places: numbers of the sequences.
        values: rows of the sequences, end to end.
        lengths: number of rows of each; `None` = one, which is the result.
        indices: vocabulary entries of sparse results, one for each value.
    """

    task: str
    places: list[int]
    values: Tensor
    lengths: list[int] | None
    indices: Tensor | None

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Split `rows` by sequence."""
        if self.lengths is None:
            return list(rows)
        return [rows[end - length : end] for length, end in zip(self.lengths, accumulate(self.lengths), strict=True)]


class Pending:
    """A launched batch.

    Attributes:
        parts: its results, on their way.
    """

    def __init__(self, sequences: Seq[Sequence], parts: list[Part], device: torch.device) -> None:
        self._sequences = sequences
        self.parts = parts
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def ready(self) -> bool:
        """Return whether `finish` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def finish(self) -> list[Output | CenoteError]:
        """Wait, and return one output per sequence; a sequence whose values are not finite gets an error instead."""
        if self._event is not None:
            self._event.synchronize()
        outputs: list[dict[str, Output]] = [{} for _ in self._sequences]
        for part in self.parts:
            rows = kept(part.values)
            all_finite = bool(np.isfinite(rows).all())
            indices = [None] * len(part.places) if part.indices is None else part.split(kept(part.indices))
            for place, values, entries in zip(part.places, part.split(rows), indices, strict=True):
                if all_finite or np.isfinite(values).all():
                    outputs[place][part.task] = Output(values, entries)
        return [_joined(*pair) for pair in zip(self._sequences, outputs, strict=True)]


def _joined(sequence: Sequence, outputs: dict[str, Output]) -> Output | CenoteError:
    """Join the outputs of a sequence's tasks; an error if one of them is missing, for it was not finite."""
    if not outputs.keys() >= {sequence.task, *sequence.also}:
        return EngineFailed(
            "the model gave values that are not finite (NaN or infinity) for this input; "
            "a dtype with more range (bfloat16, float32) may help"
        )
    output = outputs[sequence.task]
    output.others = {task: outputs[task] for task in sequence.also}
    return output
