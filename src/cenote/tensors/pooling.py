"""Pooling: packed hidden states to one row per sequence, without ever seeing padding.

Modes and their arithmetic are those of sentence-transformers' `Pooling` module; sums are accumulated in float32.
`skips` leaves out the leading tokens of a prompt, for models trained with `include_prompt: false`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cenote.tensors.packing import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cenote.tensors.packing import Batch

PART = 32


def cls(x_TD: Tensor, batch: Batch) -> Tensor:
    """The first token that is not skipped."""
    begins = batch.rows_at("first") if batch.skips is None else batch.index(_begins(batch))
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


def _begins(batch: Batch) -> list[int]:
    """First row of each sequence that pooling looks at. A prompt that is the whole input is not skipped by `cls`."""
    return [
        start + (skip if skip < length else 0)
        for start, skip, length in zip(batch.starts, batch.skips or (), batch.lengths, strict=False)
    ]


def _counts(batch: Batch) -> Tensor:
    """Number of tokens that are not skipped, `[B, 1]`."""
    return batch.index(_lengths(batch)).float().clamp(min=1e-9)[:, None]


def _lengths(batch: Batch) -> np.ndarray:
    lengths: np.ndarray = np.maximum(np.array(batch.lengths) - np.array(batch.skips or 0), 0)
    return lengths


def _joined(x_TD: Tensor, batch: Batch, how: str) -> Tensor:
    """Sum or maximum over the tokens of each sequence that are not skipped, in float32.

    First within parts of `PART` tokens, then over parts: a GPU has one thread walk along each. Checking the lengths
    would wait for the device.
    """
    if batch.skips is not None:
        bounds = zip(batch.starts, batch.starts[1:], batch.skips, strict=False)
        kept = [np.arange(min(start + skip, stop), stop) for start, stop, skip in bounds]
        x_TD = x_TD[batch.index(np.concatenate(kept))]
    lengths = _lengths(batch)
    parts_of = -(-lengths // PART)
    parts = np.full(parts_of.sum(), PART)
    parts[parts_of.cumsum()[lengths > 0] - 1] -= (-lengths % PART)[lengths > 0]
    x_RD = x_TD.float()
    for own in upload([parts, parts_of], batch.device):
        x_RD = torch.segment_reduce(x_RD, how, lengths=own, axis=0, unsafe=True)
    return x_RD
