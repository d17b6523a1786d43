"""Pooling: packed hidden states to one row per sequence, without ever seeing padding.

Modes and their arithmetic are those of sentence-transformers' `Pooling` module; sums are accumulated in float32.
`skips` leaves out the leading tokens of a prompt, for models trained with `include_prompt: false`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cenote.tensors.packing import Batch


def cls(x_TD: Tensor, batch: Batch) -> Tensor:
    """The first token that is not skipped."""
    return x_TD[_index(_begins(batch), x_TD)].float()


def last(x_TD: Tensor, batch: Batch) -> Tensor:
    """The last token."""
    return x_TD[_index([b - 1 for b in batch.starts[1:]], x_TD)].float()


def mean(x_TD: Tensor, batch: Batch) -> Tensor:
    """Arithmetic mean over tokens."""
    return _sum(x_TD, batch) / _counts(batch, x_TD)


def mean_sqrt_len(x_TD: Tensor, batch: Batch) -> Tensor:
    """Sum over tokens, divided by the square root of their number."""
    return _sum(x_TD, batch) / _counts(batch, x_TD).sqrt()


def weighted_mean(x_TD: Tensor, batch: Batch) -> Tensor:
    """Mean in which the token at position p (from 1) weighs p (SGPT). Skipped tokens keep their positions."""
    weights_T1 = (batch.positions_T + 1).to(torch.float32)[:, None]
    return _sum(x_TD.float() * weights_T1, batch) / _sum(weights_T1, batch).clamp(min=1e-9)


def max_(x_TD: Tensor, batch: Batch) -> Tensor:
    """Largest value of each dimension over tokens."""
    kept_TD, lengths = _kept(x_TD, batch)
    return torch.segment_reduce(kept_TD.float(), "max", lengths=lengths, axis=0)


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
    if batch.skips is None:
        return list(batch.starts[:-1])
    return [
        start + (skip if skip < length else 0)
        for start, skip, length in zip(batch.starts, batch.skips, batch.lengths, strict=False)
    ]


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=like.device)


def _kept(x_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows that are not skipped, and their number per sequence."""
    lengths = torch.tensor(batch.lengths, device=x_TD.device)
    if batch.skips is None:
        return x_TD, lengths
    skips = torch.tensor(batch.skips, device=x_TD.device)
    kept = batch.positions_T >= skips.repeat_interleave(lengths)
    return x_TD[kept], (lengths - skips).clamp(min=0)


def _sum(x_TD: Tensor, batch: Batch) -> Tensor:
    kept_TD, lengths = _kept(x_TD, batch)
    return torch.segment_reduce(kept_TD.float(), "sum", lengths=lengths, axis=0)


def _counts(batch: Batch, like: Tensor) -> Tensor:
    skips = batch.skips or (0,) * batch.size
    counts = [max(length - skip, 0) for length, skip in zip(batch.lengths, skips, strict=False)]
    return torch.tensor(counts, dtype=torch.float32, device=like.device).clamp(min=1e-9)[:, None]
