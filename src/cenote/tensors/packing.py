"""A batch is sequences laid end to end: no padding, one row per real token.

Shapes are in the names, here and everywhere in Cenote: T tokens of the whole batch, B sequences, D hidden size,
N attention heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from cenote.types import Sequence


class Run(NamedTuple):
    """Neighbouring sequences of one length: rows `start` to `start + size * length`."""

    start: int
    size: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Sequences end to end. Sequence `i` owns the rows `starts[i]:starts[i + 1]`.

    Attributes:
        ids_T: int64 token ids.
        positions_T: int64 position of each token in its own sequence, from 0.
        type_ids_T: int64 token type ids, or `None` when no sequence carries any.
        starts: B + 1 offsets, on the host.
        skips: per sequence, leading tokens that pooling leaves out; `None` when all are 0.
    """

    ids_T: Tensor
    positions_T: Tensor
    type_ids_T: Tensor | None
    starts: tuple[int, ...]
    skips: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of sequences, B."""
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.starts[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per sequence, on the host."""
        return tuple(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`starts` as int32 on the batch's device, as varlen kernels take it."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.ids_T.device)

    @cached_property
    def offsets(self) -> Tensor:
        """`starts` as an int64 tensor on the host."""
        return torch.tensor(self.starts)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The batch as runs of equal length. Sequences sorted by length make few runs."""
        runs: list[Run] = []
        for start, length in zip(self.starts, self.lengths, strict=False):
            if runs and runs[-1].length == length:
                runs[-1] = Run(runs[-1].start, runs[-1].size + 1, length)
            else:
                runs.append(Run(start, 1, length))
        return tuple(runs)

    def select(self, members: Seq[int]) -> tuple[Batch, Tensor]:
        """The batch of the sequences numbered `members`, in that order, and which rows of this one they are."""
        rows = torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in members]).to(self.ids_T.device)
        starts = [0]
        for i in members:
            starts.append(starts[-1] + self.lengths[i])
        part = Batch(
            ids_T=self.ids_T[rows],
            positions_T=self.positions_T[rows],
            type_ids_T=None if self.type_ids_T is None else self.type_ids_T[rows],
            starts=tuple(starts),
            skips=None if self.skips is None else tuple(self.skips[i] for i in members),
        )
        return part, rows

    def split(self, x_T: Tensor) -> list[Tensor]:
        """Cut a tensor with T rows into one view per sequence."""
        return list(torch.split(x_T, list(self.lengths)))


def pack(sequences: Seq[Sequence], device: torch.device | str = "cpu") -> Batch:
    """Lay `sequences` end to end, in the order given. None may be empty."""
    lengths = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=len(sequences))
    if not len(lengths) or not lengths.all():
        raise ValueError("a batch needs at least one sequence, and none may be empty")
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids_T = np.concatenate([np.asarray(s.ids, dtype=np.int64) for s in sequences])
    positions_T = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    type_ids_T = None
    if any(s.type_ids is not None for s in sequences):
        type_ids_T = np.concatenate(
            [np.asarray(s.type_ids if s.type_ids is not None else [0] * len(s), dtype=np.int64) for s in sequences]
        )
    return Batch(
        ids_T=_to_device(ids_T, device),
        positions_T=_to_device(positions_T, device),
        type_ids_T=None if type_ids_T is None else _to_device(type_ids_T, device),
        starts=tuple(starts.tolist()),
        skips=tuple(s.skip for s in sequences) if any(s.skip for s in sequences) else None,
    )


def _to_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
