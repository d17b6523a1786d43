"""Positions of tokens among which pictures stand. NumPy alone, for rendering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.conventions import Pictures
    from cenote.core import Media

    Positions = np.ndarray[Any, np.dtype[np.int64]]
    Span = tuple[int, int]


def positions_of(pictures: Pictures, length: int, media: Seq[Media], spans: Seq[Span]) -> Positions | None:
    """Return the positions of a sequence's tokens; `None` = they count from 0.

    Args:
        pictures: how the model's inputs hold pictures.
        length: of the sequence, L.
        media: its pictures.
        spans: first token of each picture, and the one behind its last.
    """
    if media and pictures.positions == "mrope":
        return mrope(length, spans, [medium.grid for medium in media], pictures.merge)
    return None


def mrope(length: int, spans: Seq[Span], grids: Seq[tuple[int, ...]], merge: int) -> Positions:
    """Return `[3, L]` positions: frame, row and column of a picture's tokens; text has the same number three times.

    Text counts on. A picture of h rows and w columns of tokens takes the numbers from where it begins, and text behind
    it goes on max(h, w) later (M-RoPE, arXiv:2409.12191; `get_rope_index` of `Qwen2VLModel`).

    Args:
        length: L.
        spans: first token of each picture, and the one behind its last.
        grids: frames, rows and columns of patches of each picture.
        merge: patches along a side that become one token.
    """
    positions = np.empty((3, length), dtype=np.int64)
    at = row = 0
    for (start, stop), (frames, height, width) in zip(spans, grids, strict=True):
        positions[:, row:start] = np.arange(at, at + start - row)
        at += start - row
        shape = (frames, height // merge, width // merge)
        positions[:, start:stop] = at + np.indices(shape).reshape(3, -1)
        at += max(shape[1:])
        row = stop
    positions[:, row:] = np.arange(at, at + length - row)
    return positions
