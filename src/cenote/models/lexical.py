"""Sparse embeddings: hidden states to weights of vocabulary entries.

Two kinds: SPLADE reads them off the masked-language-model head (arXiv:2109.10086), bge-m3 gives each token of the input
a weight of its own (`sparse_linear.pt`; FlagEmbedding). Of inference-free SPLADE models only documents are read so; a
query's tokens have fixed weights (arXiv:2411.04403).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from cenote.models.poolers import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

    from cenote.core import PoolingParams
    from cenote.models.classifiers import Rows as Logits
    from cenote.tensors.packing import Batch

CHUNK = 512
"""Rows whose logits over the vocabulary exist at once, more only for a single longer sequence."""


LOOKED_UP = frozenset({"sparse", "embed"})
"""What the table of weights gives of a query, without the model."""


@dataclass(frozen=True)
class Splade:
    """`sparse` by the masked-language-model head.

    Attributes:
        logits: `[R, D] -> [R, V]`.
        strategy: how the tokens of a sequence are joined.
        twice: the logarithm is taken twice (OpenSearch's models, arXiv:2504.14839).
        table_V: weights by which queries are encoded without the model; `None` = queries are read as documents are.
        top_k: how many of the largest weights are kept unless a request says otherwise; `None` = all.
    """

    logits: Logits
    strategy: Literal["max", "sum"] = "max"
    twice: bool = False
    table_V: Tensor | None = None
    top_k: int | None = None

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """The entries whose weight is not 0, `log(1 + relu(logit))` joined over all tokens, by rising id."""
        top_k = self.top_k if params.top_k is None else params.top_k
        return pruned(((own, None) for own in self.dense(x_TD, batch, members)), top_k)

    def dense(self, x_TD: Tensor, batch: Batch, members: list[int]) -> Iterator[Tensor]:
        """The weight of every vocabulary entry, `[V]` for each sequence in turn."""
        if self.table_V is None:
            yield from self._read(x_TD, batch, members)
            return
        read = self._read(x_TD, batch, [i for i in members if not batch.sequences[i].looked_up])
        for i in members:
            if batch.sequences[i].looked_up:
                ids = batch.ids_T[batch.starts[i] : batch.starts[i + 1]]
                yield torch.zeros_like(self.table_V).index_copy(0, ids, self.table_V[ids])
            else:
                yield next(read)

    def _read(self, x_TD: Tensor, batch: Batch, members: list[int]) -> Iterator[Tensor]:
        for chunk in _chunks(batch, members):
            rows = batch.index(np.concatenate([np.arange(batch.starts[i], batch.starts[i + 1]) for i in chunk]))
            for logits_TV in torch.split(self.logits(x_TD[rows]), [batch.lengths[i] for i in chunk]):
                yield self._joined(logits_TV)

    def _joined(self, logits_TV: Tensor) -> Tensor:
        if self.strategy == "max":  # rising functions commute with the maximum
            return self._weight(logits_TV.amax(0))
        return self._weight(logits_TV).sum(0)

    def _weight(self, logits: Tensor) -> Tensor:
        weights = logits.relu().log1p()
        return weights.log1p() if self.twice else weights


@dataclass(frozen=True)
class TokenWeights:
    """`sparse` by a weight for each token of the input; of repeated tokens the largest counts.

    Attributes:
        linear: `[R, D] -> [R, 1]`.
        special: ids that have no weight.
    """

    linear: nn.Module
    special: tuple[int, ...]

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """The ids of a sequence with a weight above 0, by rising id."""
        special = batch.index(self.special)
        found: list[tuple[Tensor, Tensor | None]] = []
        for i in members:
            rows = slice(batch.starts[i], batch.starts[i + 1])
            known, places = torch.unique(batch.ids_T[rows], return_inverse=True)
            own_T = self.linear(x_TD[rows].float()).relu().squeeze(-1)
            largest = torch.zeros(len(known), device=x_TD.device).scatter_reduce(0, places, own_T, "amax")
            found.append((largest.masked_fill(torch.isin(known, special), 0.0), known))
        return pruned(found, params.top_k)


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


def _chunks(batch: Batch, members: list[int]) -> Iterator[list[int]]:
    chunk: list[int] = []
    rows = 0
    for i in members:
        if chunk and rows + batch.lengths[i] > CHUNK:
            yield chunk
            chunk, rows = [], 0
        chunk.append(i)
        rows += batch.lengths[i]
    yield chunk
