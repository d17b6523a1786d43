"""The nouns that every layer shares: parameters, sequences, outputs, and the seam to an engine.

No torch and no web here. Output classes carry the names and fields that vLLM's offline API uses, so that code
written for it reads on (`vllm/outputs.py`, `vllm/pooling_params.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq
    from concurrent.futures import Future

    import numpy as np
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """What one request may ask of its task; `None` means the model's default.

    Attributes:
        use_activation: apply the task's activation (L2 normalisation for the embed tasks).
        dimensions: length to which vectors are cut before normalisation (Matryoshka models only).
        task: filled in by the API; a caller may set it for `LLM.encode`.
    """

    use_activation: bool | None = None
    dimensions: int | None = None
    task: str | None = None

    def given(self) -> list[str]:
        """Names of the task parameters that are set."""
        return [f.name for f in fields(self) if f.name != "task" and getattr(self, f.name) is not None]


@dataclass(slots=True, eq=False)
class Sequence:
    """One rendered input: the unit of scheduling. A request with n inputs is n sequences.

    Attributes:
        ids: token ids, special tokens included.
        task: name of a row in `cenote.tasks.TASKS`.
        params: what the request asked of the task.
        type_ids: token type ids, as long as `ids`; `None` means all zero.
        skip: leading tokens that pooling leaves out (a prompt, for models with `include_prompt: false`).
    """

    ids: Seq[int]
    task: str = "embed"
    params: PoolingParams = PoolingParams()
    type_ids: Seq[int] | None = None
    skip: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(slots=True)
class Output:
    """One sequence's result on the host: float32, `[D]` for sequence tasks and `[T, D]` for token tasks."""

    data: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What start-up resolved about a model; printed at start and used to validate requests.

    Attributes:
        dimension: length of a vector before any truncation.
        layout: how batches are run ("packed", "padded", ...), as the probe at load found.
        matryoshka: allowed `dimensions`: `None` = none, `()` = any up to `dimension`, else the listed ones.
        max_model_len: most tokens an input may have.
    """

    name: str
    architecture: str
    tasks: tuple[str, ...]
    default_task: str
    dimension: int
    max_model_len: int
    vocab_size: int
    dtype: str
    device: str
    layout: str
    pooling: str
    use_activation: bool
    revision: str | None = None
    matryoshka: tuple[int, ...] | None = None
    warnings: tuple[str, ...] = ()


class Engine(Protocol):
    """The seam. Everything above talks to this; `LocalEngine` and `FakeEngine` implement it."""

    info: ModelInfo

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """Accept all `sequences` as one request, or raise `Overloaded` or `Closed`.

        The future resolves to outputs in the order of `sequences`; cancelling it drops the work that has not
        begun. `progress` is called from the device thread with the number of sequences just finished.
        """

    def healthy(self) -> bool:
        """True if the last forward succeeded, or a new one does."""

    def close(self) -> None:
        """Refuse new work, finish what was accepted, and stop."""


@dataclass(slots=True)
class PoolingOutput:
    """Result of `LLM.encode`. `data` is a float32 CPU tensor, `[D]` or `[T, D]`."""

    data: torch.Tensor

    @property
    def embedding(self) -> list[float]:
        """The spelling of older releases of vLLM, whose `encode` returned embeddings."""
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
    """What the offline API returns per prompt.

    Attributes:
        request_id: the prompt's number since the `LLM` was made.
        outputs: the task's result.
        prompt_token_ids: the ids that were run, special tokens included.
        num_cached_tokens: always 0; kept for code written against vLLM.
    """

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """`PoolingRequestOutput` of `LLM.embed`."""
