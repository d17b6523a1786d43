"""The values that `LLM` returns.

Classes carry the names and fields that vLLM's offline API uses, so that code written for it reads on
(`vllm/outputs.py`). No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

    from cenote.core import LateChunkingMetadata

T = TypeVar("T")


class Numbers:
    """A field that is kept as an array and read as a list of Python's numbers, made anew at each access.

    A list takes eight times the memory of its array, and most are looked at once, if at all. What is returned is a
    list, so that every serialiser and library takes it; a change of it changes nothing here.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._slot = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> list[Any]:
        if instance is None:
            raise AttributeError("the field has no default")
        values: list[Any] = getattr(instance, self._slot).tolist()
        return values

    def __set__(self, instance: Any, values: Any) -> None:
        setattr(instance, self._slot, np.array(values))  # a copy: an engine's arrays are parts of a whole batch's


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


@dataclass
class EmbeddingOutput:
    """Result of `LLM.embed` for one prompt.

    Attributes:
        embedding: the vector, a list that is made at each access.
    """

    __slots__ = ("_embedding",)
    embedding: list[float] = Numbers()  # type: ignore[assignment] # a descriptor of lists

    @classmethod
    def of(cls, vector: np.ndarray) -> EmbeddingOutput:
        """Return the output of a vector, `[D]`, which is copied."""
        return cls(vector)  # type: ignore[arg-type] # the field is kept as an array

    @property
    def array(self) -> np.ndarray:
        """The vector as it is kept, `[D]`, float32."""
        return self._embedding  # type: ignore[attr-defined, no-any-return]

    @property
    def hidden_size(self) -> int:
        """Length of the vector."""
        return len(self.array)

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


@dataclass
class SparseEmbedding:
    """Result of `LLM.embed_sparse` for one prompt.

    Attributes:
        indices: ids of vocabulary entries, rising.
        values: their weights.
        tokens: the entries as text.
    """

    __slots__ = ("_indices", "_values", "tokens")
    indices: list[int] = Numbers()  # type: ignore[assignment] # a descriptor of lists
    values: list[float] = Numbers()  # type: ignore[assignment] # likewise
    tokens: list[str]  # type: ignore[misc] # the descriptors before it are no defaults

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices, int64, and values, float32, as they are kept: `[K]` each."""
        return self._indices, self._values  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"SparseEmbedding(entries={len(self.tokens)})"


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
        document: as the caller has it, a text or a picture.
    """

    index: int
    relevance_score: float
    document: Any
