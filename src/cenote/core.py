"""The nouns that every layer shares: parameters, sequences, outputs, and the seam to an engine.

No torch and no web here. Parameters carry the names that vLLM's offline API uses (`vllm/pooling_params.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cenote.errors import BadRequest
from cenote.functions import coalesce

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

UNLIMITED = 1 << 40
"""A limit that no input reaches."""


@dataclass(frozen=True, slots=True)
class LateChunkingParams:
    """How a document is cut after the model has read it as a whole.

    Attributes:
        chunk_size: tokens of a chunk, special tokens included; the last chunk may have fewer.
        ends: the token behind each chunk, rising, where Cenote has read chunks with
            lengths of their own; empty = `chunk_size` says.

    Raises:
        BadRequest: the size is not an integer from 1 to 2^63 - 1.
    """

    chunk_size: int
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        size = self.chunk_size
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**63:
            raise BadRequest(
                f"late_chunking_params.chunk_size must be an integer from 1 to 2^63 - 1, got {size!r}",
                param="late_chunking_params",
            )


@dataclass(frozen=True, slots=True)
class LateChunk:
    """One chunk of a document.

    Attributes:
        token_range: its tokens, `(first, end)`, special tokens counted.
        char_range: its characters in the caller's text, `(first, end)`; `None` if it has none.
    """

    token_range: tuple[int, int]
    char_range: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class LateChunkingMetadata:
    """The chunks that the rows of a late-chunked document stand for.

    Attributes:
        input_tokens: tokens of the whole document.
        chunks: one for each row.
    """

    chunk_size: int
    input_tokens: int
    chunks: list[LateChunk]
    strategy: str = "fixed_tokens"


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """Parameters of a request's task; `None` means the model's default.

    Attributes:
        use_activation: apply the task's activation (L2 normalisation for the embed tasks).
        dimensions: length to which vectors are cut before normalisation (Matryoshka models only).
        step_tag_id: of a process reward model: only tokens with this id are rated (STEP pooling).
        returned_token_ids: of a process reward model: columns of the head that are returned, in this order.
        top_k: number of the largest values of a sparse result that are kept.
        late_chunking_params: of `token_embed`: one row per chunk instead of one per token.
        task: filled in by the API; a caller may set it for `LLM.encode`.
        extra_kwargs: further arguments of `LLM.score` and `LLM.rerank`: `max_tokens_per_query`, `max_tokens_per_doc`,
            `instruction`, `chat_template_kwargs`.
        skip_reading_prefix_cache: without effect, as there is no such cache; nor has the next one.
        requires_token_ids: see before.

    Raises:
        BadRequest: a parameter has the wrong type, or `top_k` is below 1.
    """

    use_activation: bool | None = None
    dimensions: int | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    top_k: int | None = None
    late_chunking_params: LateChunkingParams | None = None
    task: str | None = None
    extra_kwargs: Mapping[str, Any] | None = field(default=None, compare=False)
    skip_reading_prefix_cache: bool | None = field(default=None, compare=False)
    requires_token_ids: bool | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.use_activation not in (None, True, False):
            raise BadRequest(
                f"use_activation must be true or false, got {self.use_activation!r}", param="use_activation"
            )
        for name in ("dimensions", "step_tag_id", "top_k"):
            value = getattr(self, name)
            if value is not None and not _is_integer(value):
                raise BadRequest(f"{name} must be an integer, got {value!r}", param=name)
        if self.top_k is not None and self.top_k < 1:
            raise BadRequest(f"top_k must be at least 1, got {self.top_k}", param="top_k")
        if self.returned_token_ids is not None:
            object.__setattr__(self, "returned_token_ids", _token_ids(self.returned_token_ids))
        late = self.late_chunking_params
        if not isinstance(late, LateChunkingParams | None):
            raise BadRequest(
                f"late_chunking_params must be a LateChunkingParams, got {late!r}", param="late_chunking_params"
            )

    def activates(self, default: bool) -> bool:
        """Return whether the task's activation is applied, by `default` unless the parameter says."""
        return coalesce(self.use_activation, default)

    def given(self) -> list[str]:
        """Return the names of the task parameters that are set."""
        return [f.name for f in fields(self) if f.name not in _NOT_OF_TASKS and getattr(self, f.name) is not None]


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _token_ids(values: Any) -> tuple[int, ...]:
    """Return `returned_token_ids` as integers of Python's.

    Raises:
        BadRequest: they are not a list of integers, or empty.
    """
    is_list = isinstance(values, Iterable) and not isinstance(values, (str, bytes))
    ids = tuple(values) if is_list else ()
    if not ids or not all(map(_is_integer, ids)):
        raise BadRequest(f"returned_token_ids must be a list of token ids, got {values!r}", param="returned_token_ids")
    return tuple(map(int, ids))


_NOT_OF_TASKS = ("task", "extra_kwargs", "skip_reading_prefix_cache", "requires_token_ids")


Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
"""Arrays by the names under which a model takes them."""


@dataclass(frozen=True, slots=True)
class Media:
    """One picture of an input, processed.

    Attributes:
        key: hash of the content and of the way in which it was processed: equal keys mean equal `arrays`.
        tokens: tokens that it takes the place of.
        patches: rows of the vision tower that it takes.
        grid: frames, rows and columns of patches; empty where all pictures have one size.
        arrays: the model's own inputs, without a dimension for the batch.
        pixels: of the picture as it came, before it was resized.
    """

    key: bytes
    tokens: int
    patches: int
    grid: tuple[int, ...] = ()
    arrays: Arrays = field(default_factory=dict, compare=False)
    pixels: int = field(default=0, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(slots=True, eq=False)
class Sequence:
    """One rendered input: the unit of scheduling. A request with n inputs is n sequences.

    Attributes:
        ids: token ids, special tokens included.
        task: name of a row in `cenote.tasks.TASKS`.
        params: parameters of the task.
        type_ids: token type ids, as long as `ids`; `None` means all zero.
        skip: number of leading tokens that pooling leaves out (a prompt, for models with `include_prompt: false`).
        hidden: number of trailing tokens that no token attends to (a ColBERT query's expansion).
        keep: positions of the tokens whose rows the token tasks return; `None` = all.
        also: further tasks to answer from the same forward.
        adapter: name of the adapter to run with; `None` = the pure backbone.
        looked_up: its sparse embedding comes from the model's table of weights (a query of an inference-free model).
        clusters: its token vectors are joined into fewer, as the model's token pooling says.
        late_chunking: the chunks that the rows stand for, where `params` ask for late chunking.
        salt: keeps results apart from those of sequences with another salt.
        priority: of its request; lower ones run first.
        media: its pictures, in order.
        spans: first token of each of `media`, and the one behind its last.
        positions: int64 `[L]` or `[3, L]` positions of the tokens, which follow from the other fields; `None` = they
            count from 0.
    """

    ids: Seq[int]
    task: str = "embed"
    params: PoolingParams = PoolingParams()
    type_ids: Seq[int] | None = None
    skip: int = 0
    hidden: int = 0
    keep: tuple[int, ...] | None = None
    also: tuple[str, ...] = ()
    adapter: str | None = None
    looked_up: bool = False
    clusters: bool = False
    late_chunking: LateChunkingMetadata | None = field(default=None, compare=False)
    salt: str | None = None
    priority: int = field(default=0, compare=False)
    media: tuple[Media, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    positions: np.ndarray[Any, np.dtype[np.int64]] | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def patches(self) -> int:
        """Rows of the vision tower that its pictures take."""
        return sum(medium.patches for medium in self.media)


@dataclass(slots=True)
class Output:
    """One sequence's result on the host.

    Attributes:
        data: float32, one row for sequence tasks and one per token for token tasks.
        indices: of sparse results: int64 vocabulary entries that the values stand for, rising.
        others: results of the tasks in `Sequence.also`, by name.
    """

    data: np.ndarray[Any, np.dtype[np.float32]]
    indices: np.ndarray[Any, np.dtype[np.int64]] | None = None
    others: dict[str, Output] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Similarity:
    """How a model's embeddings are compared, by their kind; see `cenote.tensors.similarity`.

    Attributes:
        vectors: "cosine", "dot", "euclidean" or "manhattan".
        sparse: likewise.
        tokens: "maxsim" or "meanmaxsim".
        is_apart: no bit of a document's score may depend on the others.
    """

    vectors: str = "cosine"
    sparse: str = "dot"
    tokens: str = "maxsim"
    is_apart: bool = False


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of one file of a checkpoint: keys, tensors, or the file itself.

    Attributes:
        file: relative to the checkpoint's folder.
        names: of the entries.
        reason: why they were left; empty if they were honoured.
    """

    file: str
    names: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {', '.join(self.names)}"


@dataclass(frozen=True, slots=True)
class Report:
    """Where a model comes from and how it runs, for the report at start. No request is validated against it.

    Attributes:
        source: folder or hub id that the model was loaded from.
        revision: commit on the hub; `None` = it comes from a folder.
        model_class: Transformers' class that runs.
        family: kind of checkpoint that is more than a backbone; empty = it is not.
        pooling: how rows become a vector.
        token_dimension: length of a token's vector.
        head: where the head comes from; empty if there is none.
        dtype: of weights and activations, without the "torch.".
        layout: how batches run ("packed", "padded", ...), as the probe at load found.
        linears: how the Linear layers run if not simply in `dtype`.
        shares_prefixes: whether common beginnings of a batch's sequences run once.
        company: how rows keep their bits whatever shares their batch; empty if they need not.
        streams: batches that run at a time, each on its part of the CPU's threads.
        batch_tokens: maximum tokens of a batch.
        warnings: for the user, a sentence each.
        used: entries of the checkpoint's files that were honoured.
        left: entries that were left, with the reason.
    """

    source: str = ""
    revision: str | None = None
    model_class: str = ""
    family: str = ""
    pooling: str = ""
    token_dimension: int = 0
    head: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    layout: str = "packed"
    linears: str = ""
    shares_prefixes: bool = False
    company: str = ""
    streams: int = 1
    batch_tokens: int = 768
    warnings: tuple[str, ...] = ()
    used: tuple[Entries, ...] = ()
    left: tuple[Entries, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The contract of a model, which requests are validated against, and the report of its start.

    Attributes:
        name: the model in error messages: its served name, or the last part of its folder.
        dimension: length of a vector before any truncation.
        max_model_len: maximum tokens that the model reads at once.
        vocab_size: rows of the token embedding: every smaller id can be looked up.
        type_vocab_size: rows of the table of token types; 0 = there is no such table.
        use_activation: whether vectors are normalised unless a request says otherwise.
        max_embed_len: maximum tokens of an `embed` input; 0 = `max_model_len`. Beyond the latter it is run in blocks.
        matryoshka: allowed `dimensions`: `None` = none, `()` = any up to `dimension`, else the listed ones.
        num_labels: classes of the classification head; 0 = there is none.
        labels: names of the classes in order; empty if the checkpoint names none.
        activation: function from a classifier's logits to its output: "softmax", "sigmoid" or "none".
        classifies: whether `activation` is applied unless a request says otherwise.
        vector_task: task of requests for embeddings that name none.
        score_types: ways in which the model can rate a pair, the default first: rows of
            `cenote.pipeline.ranking.WAYS`.
        similarity: how embeddings are compared where pairs are rated by them.
        reward: task that gives this model's reward; empty if it is not a reward model.
        activates_reward: whether `activation` is applied to a reward unless a request says otherwise.
        step: whether `token_classify` gives one row per step (STEP pooling) instead of one per token.
        columns: columns that `returned_token_ids` may name, with STEP pooling.
        adapters: names of the adapters that a sequence may choose from.
        patch_cost: cost of a patch of a picture, in tokens; 0 = the model takes no pictures.
    """

    name: str
    architecture: str
    tasks: tuple[str, ...]
    default_task: str
    dimension: int
    max_model_len: int
    vocab_size: int
    use_activation: bool
    type_vocab_size: int = 0
    max_embed_len: int = 0
    matryoshka: tuple[int, ...] | None = None
    num_labels: int = 0
    labels: tuple[str, ...] = ()
    activation: str = "none"
    classifies: bool = True
    vector_task: str = "embed"
    score_types: tuple[str, ...] = ()
    similarity: Similarity = Similarity()
    reward: str = ""
    activates_reward: bool = False
    step: bool = False
    columns: Seq[int] = ()
    adapters: tuple[str, ...] = ()
    patch_cost: float = 0.0
    report: Report = Report()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the start, a sentence each."""
        return self.report.warnings

    def limit(self, task: str) -> int:
        """Return the maximum tokens of an input of `task`."""
        if task == "embed" and self.max_embed_len:
            return self.max_embed_len
        return self.max_model_len

    def reported(self, **changes: Any) -> ModelInfo:
        """Return the same contract with changes to its report."""
        return replace(self, report=replace(self.report, **changes))


class Engine(Protocol):
    """The seam, which everything above talks to. `LocalEngine`, `RemoteEngine` and `FakeEngine` implement it."""

    info: ModelInfo

    @property
    def fault(self) -> str:
        """Reason why the engine can run nothing any more, so that its process should end; empty while it can."""

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """Accept all `sequences` as one request, or raise `Overloaded` or `Closed`.

        The future resolves to outputs in the order of `sequences`; cancelling it drops the work that has not
        begun. `progress` is called from a thread of the engine's, one at a time, with the number of sequences just
        finished. The future's own callbacks run in such a thread too, and may wait for nothing. An engine in another
        process refuses by the future, not by raising.
        """

    def healthy(self) -> bool:
        """Return whether the last forward succeeded, or a new one does."""

    def close(self) -> None:
        """Refuse new work, finish what was accepted, and stop."""
