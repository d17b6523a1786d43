"""Pooling: packed hidden states to one row per sequence, without ever seeing padding.

Modes and their arithmetic are those of sentence-transformers' `Pooling` module; sums are accumulated in float32.
`skips` leaves out the leading tokens of a prompt, for models trained with `include_prompt: false`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from cenote.tensors.packing import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cenote.tensors.packing import Batch, Place

PART = 32


def cls(x_TD: Tensor, batch: Batch) -> Tensor:
    """The first token that is not skipped."""
    begins = batch.index(_begins(batch)) if batch.skips else batch.rows_at("first")
    return x_TD[begins].float()


def last(x_TD: Tensor, batch: Batch) -> Tensor:
    """The last token."""
    return x_TD[batch.rows_at("last")].float()


def mean(x_TD: Tensor, batch: Batch) -> Tensor:
    """Arithmetic mean over tokens."""
    return _joined(x_TD, batch, "sum") / _counts(batch)


def mean_sqrt_len(x_TD: Tensor, batch: Batch) -> Tensor:
    """Sum over tokens, divided by the square root of their number."""
    return _joined(x_TD, batch, "sum") / _counts(batch).sqrt()


def weighted_mean(x_TD: Tensor, batch: Batch) -> Tensor:
    """Mean in which the token at position p (from 1) weighs p (SGPT). Skipped tokens keep their positions."""
    weights_T1 = (batch.positions_T + 1).to(torch.float32)[:, None]
    weighted_BD = _joined(x_TD.float() * weights_T1, batch, "sum")
    return weighted_BD / _joined(weights_T1, batch, "sum").clamp(min=1e-9)


def max_(x_TD: Tensor, batch: Batch) -> Tensor:
    """Largest value of each dimension over tokens."""
    return _joined(x_TD, batch, "max")


MODES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "cls": cls,
    "max": max_,
    "mean": mean,
    "mean_sqrt_len_tokens": mean_sqrt_len,
    "weightedmean": weighted_mean,
    "lasttoken": last,
}


def pool(x_TD: Tensor, batch: Batch, modes: tuple[str, ...]) -> Tensor:
    """Pool by each of `modes` (keys of `MODES`) and concatenate: `[B, D * len(modes)]` in float32."""
    if len(modes) == 1:
        return MODES[modes[0]](x_TD, batch)
    return torch.cat([MODES[mode](x_TD, batch) for mode in modes], dim=-1)


PLACE_OF_MODES: dict[tuple[str, ...], Place] = {("cls",): "first", ("lasttoken",): "last"}
"""The only token that a way of pooling depends on; see `place_of`."""


def place_of(modes: tuple[str, ...], batch: Batch) -> Place | None:
    """Return the only token of each sequence that pooling by `modes` depends on, if there is one."""
    place = PLACE_OF_MODES.get(modes)
    return None if place == "first" and batch.skips else place


@dataclass(frozen=True)
class Clustering:
    """Token vectors joined into fewer: the mean of each of Ward's clusters (`HierarchicalTokenPooling`).

    Attributes:
        factor: number of vectors that are joined into one, on average.
        protected: number of leading vectors that stay as they are.
        normalizes: whether joined vectors are scaled to length 1.
    """

    factor: float = 1.0
    protected: int = 1
    normalizes: bool = True

    def __call__(self, x_TD: Tensor) -> Tensor:
        """`[T, D]`, float32 vectors of length 1 -> `[T', D]` on the host, T' at most T."""
        joined_TD = self._joined(x_TD.cpu())
        return F.normalize(joined_TD, dim=-1) if self.normalizes else joined_TD

    def _joined(self, x_TD: Tensor) -> Tensor:
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        free_TD = x_TD[self.protected :]
        count = max(int(len(free_TD) // self.factor), 1)
        if count >= len(free_TD):
            return x_TD
        distances_TT = (1 - free_TD @ free_TD.T).clamp(0, 2).numpy()
        tree = linkage(squareform(distances_TT, checks=False), method="ward")
        labels = np.unique(fcluster(tree, t=count, criterion="maxclust"), return_inverse=True)[1]
        members_CT = F.one_hot(torch.from_numpy(labels).long()).T.float()
        means_CD = members_CT @ free_TD / members_CT.sum(1, keepdim=True)
        return torch.cat([x_TD[: self.protected], means_CD])


def _begins(batch: Batch) -> list[int]:
    """Return the first row of each sequence that is not skipped. `cls` skips no prompt that is the whole input."""
    skips = [sequence.skip if sequence.skip < len(sequence) else 0 for sequence in batch.sequences]
    return [start + skip for start, skip in zip(batch.starts, skips, strict=False)]


def _counts(batch: Batch) -> Tensor:
    """Return the number of tokens that are not skipped, `[B, 1]`."""
    return batch.index(_lengths(batch)).float().clamp(min=1e-9)[:, None]


def _lengths(batch: Batch) -> np.ndarray:
    lengths = np.array(batch.lengths)
    if batch.skips:
        lengths -= np.array([sequence.skip for sequence in batch.sequences])
    return lengths.clip(min=0)


def _joined(x_TD: Tensor, batch: Batch, how: str) -> Tensor:
    """Return the sum or maximum over the tokens of each sequence that are not skipped, in float32.

    First within parts of `PART` tokens, then over parts: a GPU has one thread walk along each. Checking the lengths
    would wait for the device.
    """
    if batch.skips:
        bounds = zip(batch.starts, batch.starts[1:], batch.sequences, strict=False)
        kept = [np.arange(min(start + sequence.skip, stop), stop) for start, stop, sequence in bounds]
        x_TD = x_TD[batch.index(np.concatenate(kept))]
    lengths = _lengths(batch)
    parts_of = -(-lengths // PART)
    parts = np.full(parts_of.sum(), PART)
    parts[parts_of.cumsum()[lengths > 0] - 1] -= (-lengths % PART)[lengths > 0]
    x_RD = x_TD.float()
    for sizes in upload([parts, parts_of], batch.device):
        x_RD = torch.segment_reduce(x_RD, how, lengths=sizes, axis=0, unsafe=True)
    return x_RD
