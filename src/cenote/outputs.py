"""The values that `LLM` returns.

Classes carry the names and fields that vLLM's offline API uses, so that code written for it reads on
(`vllm/outputs.py`). No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import torch

    from cenote.core import LateChunkingMetadata

T = TypeVar("T")


@dataclass(slots=True)
class PoolingOutput:
    """Result of `LLM.encode`.

    Attributes:
        data: float32 CPU tensor, `[D]` or `[T, D]`; `[K]` for sparse results.
        indices: of sparse results, the vocabulary entries of the values, int64 `[K]`, rising.
        others: results of further tasks of the same forward, by name.
    """

    data: torch.Tensor
    indices: torch.Tensor | None = None
    others: dict[str, PoolingOutput] = field(default_factory=dict)

    @property
    def embedding(self) -> list[float]:
        """`data` as a list: the spelling of older releases of vLLM, whose `encode` returned embeddings."""
        values: list[float] = self.data.tolist()
        return values


@dataclass(slots=True)
class EmbeddingOutput:
    """Result of `LLM.embed` for one prompt."""

    embedding: list[float] = field(repr=False)

    @property
    def hidden_size(self) -> int:
        """Length of the vector."""
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclass(slots=True)
class PoolingRequestOutput(Generic[T]):
    """Result of the offline API for one prompt.

    Attributes:
        request_id: the prompt's number since the `LLM` was made.
        outputs: the task's result.
        prompt_token_ids: the ids that were run, special tokens included.
        num_cached_tokens: always 0; kept for code written against vLLM.
        late_chunking: the chunks that the rows of a late-chunked document stand for.
    """

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
    late_chunking: LateChunkingMetadata | None = None


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """`PoolingRequestOutput` of `LLM.embed`."""


@dataclass(slots=True)
class SparseEmbedding:
    """Result of `LLM.embed_sparse` for one prompt.

    Attributes:
        indices: ids of vocabulary entries, rising.
        values: their weights.
        tokens: the entries as text.
    """

    indices: list[int] = field(repr=False)
    values: list[float] = field(repr=False)
    tokens: list[str] = field(repr=False)

    def __repr__(self) -> str:
        return f"SparseEmbedding(entries={len(self.indices)})"


@dataclass(slots=True)
class ClassificationOutput:
    """Result of `LLM.classify` for one prompt.

    Attributes:
        probs: one value per class: probabilities, or logits with `use_activation=False`.
        label: name of the class with the largest value; `None` if the checkpoint names none.
    """

    probs: list[float] = field(repr=False)
    label: str | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.probs)

    def __repr__(self) -> str:
        return f"ClassificationOutput(num_classes={self.num_classes}, label={self.label!r})"


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """`PoolingRequestOutput` of `LLM.classify`."""


@dataclass(slots=True)
class ScoringOutput:
    """Result of `LLM.score` for one pair."""

    score: float


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """`PoolingRequestOutput` of `LLM.score`."""


@dataclass(slots=True)
class RankedDocument:
    """One entry of `LLM.rerank`, whose list is sorted by falling score.

    Attributes:
        index: the document's place in the caller's list.
    """

    index: int
    relevance_score: float
    document: str
