"""SPLADE: sparse embeddings off a masked-language-model head (arXiv:2109.10086).

Of inference-free models only documents are read so; a query's tokens have fixed weights (arXiv:2411.04403), which a
Router of Sentence-Transformers holds as a `SparseStaticEmbedding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from cenote.conventions import Sides
from cenote.errors import CheckpointError
from cenote.functions import coalesce
from cenote.models import classifiers
from cenote.models.convert import Head
from cenote.models.families.family import Family
from cenote.models.lexical import pruned
from cenote.models.modules import weights
from cenote.models.poolers import Rows
from cenote.models.reading import about
from cenote.tensors.heads import normalize

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.core import PoolingParams
    from cenote.models.classifiers import Logits
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.models.modules import Module
    from cenote.models.poolers import TaskOutput
    from cenote.models.sentence_transformers import SentenceTransformer
    from cenote.tensors.packing import Batch

CHUNK = 512
"""Rows whose logits over the vocabulary exist at once, more only for a single longer sequence."""


@dataclass(frozen=True)
class Splade(Family):
    """A checkpoint with a masked-language-model head that gives sparse embeddings.

    Attributes:
        settings: config of its SpladePooling module.
        max_active: how many weights of an embedding are kept; `None` = all.
        table: weights of vocabulary entries, by which queries are encoded without the model; `None` = they are read as
            documents are.
    """

    title: ClassVar[str] = "sparse (SPLADE)"
    modules = ("SpladePooling",)
    honours = "SpladePooling"
    compares = "sparse"
    head = Head("masked", name="its masked-language-model head (SPLADE)")

    settings: dict[str, Any]
    max_active: int | None = None
    table: Tensor | None = None

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Splade | None:
        """Recognise a SpladePooling module, an architecture called so, or the user's wish."""
        if options.convert == "embed":
            return None
        pooling, query = _modules(files.st)
        if pooling is None and options.convert != "sparse" and "Splade" not in files.architecture:
            return None
        return cls(
            settings={} if pooling is None else pooling.config,
            max_active=files.st.settings.get("max_active_dims"),
            table=None if query is None else _table(query, options.reads_pickles),
        )

    @classmethod
    def reads(cls, module: Module, st: SentenceTransformer) -> bool:
        """Return whether `module` is a SpladePooling, or the only one of queries and a table of weights."""
        if not module.side:
            return super().reads(module, st)
        return module.kind == "SparseStaticEmbedding" and sum(other.side != "" for other in st.special) == 1

    def sides(self, tokenizer: PreTrainedTokenizerBase) -> Sides | None:
        """Return how queries differ, where a table has their weights."""
        return None if self.table is None else Sides(by_table=True)

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return the sparse embedding, with and without its zeros; the head is proved against the model's logits."""
        name, probe = loaded.files.name, loaded.probe
        assert probe is not None
        strategy = self.settings.get("pooling_strategy", "max")
        activation = self.settings.get("activation_function", "relu")
        if strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
            raise CheckpointError(f"SpladePooling of {name} is not understood: {self.settings}")
        head = classifiers.of_tokens(loaded.full, probe)
        table_V = None
        if self.table is not None:
            table_V = _fitting(self.table, len(loaded.tokenizer.get_vocab()), probe.width, name).to(loaded.full.device)
        sparse = Sparse(head.rows, strategy, activation == "log1p_relu", table_V, self.max_active)
        return {
            "sparse": sparse,
            "embed": DenseSparse(sparse, probe.width, bool(loaded.options.pooler_config.use_activation)),
        }

    def score_types(self, tasks: Collection[str]) -> tuple[str, ...]:
        """Return the comparison of sparse embeddings, then the others."""
        return ("sparse", "late-interaction")


def _modules(st: SentenceTransformer) -> tuple[Module | None, Module | None]:
    """Return the SpladePooling, and the table of weights for queries alone.

    Raises:
        CheckpointError: there is the latter without the former.
    """
    by_kind = {module.kind: module for module in st.special}
    pooling, query = by_kind.get("SpladePooling"), by_kind.get("SparseStaticEmbedding")
    if query is not None and pooling is None:
        raise CheckpointError("the queries' SparseStaticEmbedding needs documents with a SpladePooling to compare with")
    return pooling, query


def _table(module: Module, allow_pickle: bool) -> Tensor:
    """Return the weights of a SparseStaticEmbedding.

    Raises:
        CheckpointError: they are not there.
    """
    with about(module.folder):
        return weights(module.folder, allow_pickle)["weight"]


def _fitting(table: Tensor, entries: int, width: int, name: str) -> Tensor:
    """Return the table of weights with one for each of the head's `width` columns.

    Raises:
        CheckpointError: it has fewer than the vocabulary has `entries`, or more than there are columns.
    """
    if table.dim() != 1 or not entries <= len(table) <= width:
        raise CheckpointError(
            f"the table for queries of {name} has the shape {tuple(table.shape)}, which does not fit a vocabulary of "
            f"{width}"
        )
    return torch.nn.functional.pad(table, (0, width - len(table)))


@dataclass(frozen=True)
class Sparse:
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

    @property
    def looks_up(self) -> bool:
        """Whether a table gives the weights of sequences that are `looked_up`."""
        return self.table_V is not None

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """The entries whose weight is not 0, `log(1 + relu(logit))` joined over all tokens, by rising id."""
        top_k = coalesce(params.top_k, self.top_k)
        return pruned(zip(self.dense(x_TD, batch, members), repeat(None), strict=False), top_k)

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
            rows = batch.index(np.concatenate(batch.host_rows(chunk)))
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
class DenseSparse:
    """`embed` of a SPLADE model: its sparse embedding with all of its zeros.

    Attributes:
        sparse: the same without zeros.
        dimension: size of the vocabulary.
        use_activation: whether vectors are normalised unless a request says otherwise.
    """

    sparse: Sparse
    dimension: int
    use_activation: bool = False

    @property
    def pooling(self) -> str:
        """How tokens become one vector."""
        return self.sparse.strategy

    @property
    def looks_up(self) -> bool:
        """As `Sparse.looks_up`."""
        return self.sparse.looks_up

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[B, V]`."""
        rows_BV = torch.stack(list(self.sparse.dense(x_TD, batch, members)))
        if self.sparse.top_k is not None:
            largest = rows_BV.topk(min(self.sparse.top_k, rows_BV.shape[1]))
            rows_BV = torch.zeros_like(rows_BV).scatter(1, largest.indices, largest.values)
        activate = coalesce(params.use_activation, self.use_activation)
        return Rows(normalize(rows_BV) if activate else rows_BV)


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
