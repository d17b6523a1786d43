"""Sparse embeddings: weights of vocabulary entries as rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cenote.models.poolers import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def pruned(found: Iterable[tuple[Tensor, Tensor | None]], top_k: int | None) -> Rows:
    """Of each sequence's weights and ids (`None` = all in order) those above 0, the `top_k` largest, by rising id."""
    values, indices = [], []
    for own, known in found:
        places = own.nonzero().squeeze(-1)
        if top_k is not None and len(places) > top_k:
            places = own.topk(top_k).indices.sort().values
        values.append(own[places])
        indices.append(places if known is None else known[places])
    return Rows(torch.cat(values), [len(own) for own in values], torch.cat(indices))
