"""Sparse embeddings: weights of vocabulary entries as rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cenote.models.poolers import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def pruned(weights: Iterable[tuple[Tensor, Tensor | None]], top_k: int | None) -> Rows:
    """Return the `top_k` largest weights above 0 of each sequence, by rising id.

    Args:
        weights: of each sequence `[N]`, with their rising ids `[N]`; `None` = ids are the places.
        top_k: how many are kept; `None` = all.
    """
    values, indices = [], []
    for weights_N, ids_N in weights:
        places_K = weights_N.nonzero().squeeze(-1)
        if top_k is not None and len(places_K) > top_k:
            places_K = weights_N.topk(top_k).indices.sort().values
        values.append(weights_N[places_K])
        indices.append(places_K if ids_N is None else ids_N[places_K])
    return Rows(torch.cat(values), list(map(len, values)), torch.cat(indices))
