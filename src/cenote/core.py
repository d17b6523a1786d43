"""The nouns that every layer shares: parameters, sequences, outputs, and the seam to an engine.

No torch and no web here. Parameters carry the names that vLLM's offline API uses (`vllm/pooling_params.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np

from cenote.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

T = TypeVar("T")
U = TypeVar("U")
K = TypeVar("K")

Role = Literal["query", "document"]
"""A side of a search."""

UNLIMITED = 1 << 40
"""A limit that no input reaches."""


@dataclass(frozen=True, slots=True)
class LateChunkingParams:
    """How a document is cut after the model has read it as a whole.

    Attributes:
        chunk_size: tokens of a chunk, special tokens included; the last chunk may have fewer.
        ends: the token behind each chunk, rising, where chunks have lengths of their own; empty = `chunk_size` says.

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


def coalesce(value: T | None, default: T) -> T:
    """Return `value`, or `default` if it is `None`, as in SQL."""
    return default if value is None else value


def optional(function: Callable[[T], U], value: T | None) -> U | None:
    """Return `function(value)`, or `None` for `None`."""
    return None if value is None else function(value)


def places_by(keys: Iterable[K]) -> dict[K, list[int]]:
    """Return the places of each of `keys`, by its first one."""
    places: dict[K, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


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
        kind: "image".
        pixels: of the picture as it came, before it was resized.
    """

    key: bytes
    tokens: int
    patches: int
    grid: tuple[int, ...] = ()
    arrays: Arrays = field(default_factory=dict, compare=False)
    kind: str = "image"

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    pixels: int = field(default=0, compare=False)


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


@dataclass(frozen=True)
class Sides:
    """How a model encodes its two sides differently, in token ids: late interaction, or queries by a table.

    Attributes:
        lengths: tokens to which a side is cut.
        fill_to: tokens to which queries are filled up; 0 = they are not.
        fills_all: all texts are filled up, whatever their side.
        fill_id: id of the tokens added.
        fixed: queries are also cut to `fill_to`.
        attend: other tokens attend to the added ones.
        skipped: ids whose rows are left out.
        skipped_of: sides from which they are left out; an input without a side counts as a document.
        kept: ids of the only rows of inputs that are not queries; empty = all.
        pooled_of: sides whose token vectors are joined into fewer; likewise.
        by_table: sparse embeddings of queries come from a table of weights; their tokens are only those of the text.
        inserted: ids of the markers that stand behind the first token of a side.
    """

    lengths: Mapping[str, int] = field(default_factory=dict)
    fill_to: int = 0
    fill_id: int = 0
    fixed: bool = True
    attend: bool = False
    fills_all: bool = False
    skipped: frozenset[int] = frozenset()
    skipped_of: tuple[str, ...] = ("document",)
    pooled_of: tuple[str, ...] = ()
    by_table: bool = False
    inserted: Mapping[str, int] = field(default_factory=dict)
    kept: frozenset[int] = frozenset()

    def limit(self, role: Role | None, most: int) -> int | None:
        """Return the tokens to which an input is cut, at most `most`; `None` = the model names no length."""
        length = self.lengths.get(role or "")
        if role == "query" and self.fill_to and self.fixed:
            length = self.fill_to
        return optional(partial(min, most), length)

    def takes_special_tokens(self, role: Role | None) -> bool:
        """Return whether the tokenizer's special tokens belong to an input."""
        return not self._by_table(role)

    def _marked(self, ids: list[int], role: Role | None) -> list[int]:
        """Return `ids`, which begin with the marker of their side, with the marker in its place."""
        if len(ids) > 1 and ids[0] == self.inserted.get(role or ""):
            ids[:2] = ids[1], ids[0]
        return ids

    def of_ids(self, sequence: Sequence, role: Role | None) -> Sequence:
        """Return `sequence`, whose caller gave its ids, as the model takes its side."""
        if self.fills_all:
            return self.of_text(sequence, role)
        return replace(sequence, looked_up=True) if self._by_table(role) else sequence

    def of_text(self, sequence: Sequence, role: Role | None) -> Sequence:
        """Return `sequence`, made of a text, as the model takes its side: queries filled up, skipped tokens marked."""
        ids, types = self._marked(list(sequence.ids), role), sequence.type_ids
        is_filled = (role == "query" or self.fills_all) and not sequence.media
        added = max(0, self.fill_to - len(ids)) if is_filled else 0
        ids += [self.fill_id] * added
        return replace(
            sequence,
            ids=ids,
            type_ids=None if types is None else [*types, *[0] * added],
            hidden=0 if self.attend else added,
            keep=self._kept(ids, role),
            clusters=(role or "document") in self.pooled_of,
            looked_up=self._by_table(role),
        )

    def _by_table(self, role: Role | None) -> bool:
        return self.by_table and role == "query"

    def _kept(self, ids: Seq[int], role: Role | None) -> tuple[int, ...] | None:
        """Return which tokens' rows are kept; `None` = all."""
        left_out: set[int] = set()
        if (role or "document") in self.skipped_of:
            left_out.update(self.skipped.intersection(ids))
        if self.kept and role != "query":
            left_out.update(set(ids) - self.kept)
        return tuple(i for i, token in enumerate(ids) if token not in left_out) if left_out else None


@dataclass(frozen=True)
class Alike(Sides):
    """The sides of a model that encodes queries and documents alike."""

    def of_text(self, sequence: Sequence, role: Role | None) -> Sequence:
        """Return `sequence` as it is."""
        return sequence


Cuts = Literal["longest_first", "only_first", "only_second"]
"""Text of a pair that is cut where both are too long together, in the words of Transformers."""

MOST_PICTURES = 16
"""Maximum pictures of a prompt, unless an option says otherwise."""


@dataclass(frozen=True)
class Pictures:
    """How inputs of a model hold pictures: all that rendering needs to know.

    Attributes:
        folder: of the files of the image processor.
        layout: key of `cenote.pipeline.pictures.LAYOUTS`: how a processed picture becomes tokens.
        placeholder: id of the tokens that a picture takes the place of.
        markup: text that stands for a picture in a prompt; empty = a picture is an input of its own.
        spelled: another text that stands for the placeholder in templates; empty = there is none.
        tokens: tokens of every picture; 0 = as many as its patches say.
        patches: rows of the vision tower of every picture; 0 = as many as there are patches.
        merge: patches along a side that become one token.
        positions: "mrope" = a picture's tokens count rows and columns; "flat" = tokens count on.
        first_position: position of the first token.
        most_pixels: pixels to which larger pictures are shrunk, besides the image processor's own bound; 0 = that one.
        template: renders an input that is a picture, or pictures and texts; `None` = they stand side by side.
        blank: side of the black picture that stands in inputs of texts alone, in pixels; 0 = none does.
        rendered: beginning of texts that their clients have rendered, beside which it does not stand.
        kwargs: arguments of the image processor, of all requests.
        most: maximum pictures of a prompt.
        may_grow: arguments of a request may exceed the bounds of the image processor.
        refusal: why the model takes no pictures after all; empty = it does.
    """

    folder: str
    layout: str
    placeholder: int = 0
    markup: str = ""
    spelled: str = ""
    tokens: int = 0
    patches: int = 0
    merge: int = 1
    positions: str = "flat"
    first_position: int = 0
    most_pixels: int = 0
    template: MessageTemplate | None = None
    blank: int = 0
    rendered: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    most: int = MOST_PICTURES
    may_grow: bool = False
    refusal: str = ""


@dataclass(frozen=True)
class PairTemplate:
    """A Jinja template over two messages, roles `query` and `document`, that renders a pair for a reranker.

    Attributes:
        source: the template; `None` = the tokenizer's own chat template.
        kwargs: further variables.
        structured: message contents are lists of parts instead of text.
        add_special_tokens: whether the rendered text gets the tokenizer's special tokens besides its own.
        system: a message of that role before the two, which a request's `instruction` replaces; `None` = there is no
            such message.
        parts: templates in place of `source` whose texts are tokenised apart, without special tokens, and joined as
            ids; empty = `source` is tokenised as a whole.
        bos: the beginning-of-sequence token is put before the `parts`.
        prefix: text before the query.
        suffix: text after the document. A pair whose query begins with `prefix` and whose document ends with `suffix`
            is rendered already, and stays as it is; both empty = that is not looked for.
        cuts_whole: a prompt that is too long is cut like a text, not its document alone.
        restores: the end of the template is put back where a prompt was cut like a text.
        closing: ids behind every prompt.
    """

    source: str | None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = False
    add_special_tokens: bool = True
    system: str | None = None
    parts: tuple[str, ...] = ()
    bos: bool = False
    prefix: str = ""
    suffix: str = ""
    cuts_whole: bool = False
    restores: bool = True
    closing: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[str | None, ...]:
        """The templates whose texts are tokenised apart."""
        return self.parts or (self.source,)

    def is_rendered(self, query: str, document: str) -> bool:
        """Return whether a client has rendered the pair already."""
        is_known = bool(self.prefix and self.suffix)
        return is_known and query.startswith(self.prefix) and document.endswith(self.suffix)


LISTWISE_MARKERS = ("<|embed_token|>", "<|rerank_token|>")
"""Tokens after a document and after the query in a listwise prompt, whose states are compared."""


@dataclass(frozen=True)
class MessageTemplate:
    """A chat template that renders every text as a user's message, and its prompt as a system message.

    Attributes:
        source: the template; `None` = the tokenizer's own.
        kwargs: its further variables.
        structured: message contents are lists of parts instead of text.
        takes_task: the template gets "query" or "document" as its variable `task`, where the side is known.
        restores: the tokens that the template puts at the end are put back where an input was cut.
    """

    source: str | None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = False
    takes_task: bool = False
    restores: bool = True

    def variables(self, task: Role | None) -> Mapping[str, Any]:
        """Return the further variables for an input, whose side is `task` where it is known."""
        if task is None or not self.takes_task:
            return self.kwargs
        return {"task": task, **self.kwargs}


Pair = tuple[str, str]
"""Two texts that a model reads together."""


def plain_name(name: str) -> str:
    """Return the plain spelling of `name`: `retrieval.query`, `retrieval-query` and `retrieval_query` are one."""
    return name.lower().replace(".", "_").replace("-", "_").replace(" ", "_")


def template_text(source: str) -> str:
    """Return a Jinja template out of its text or the path of a file.

    Raises:
        ConfigError: it is neither: a text without braces would stand in place of every conversation.
    """
    if "{" in source:
        return source
    try:
        return Path(source).read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template is {source!r}, which has no braces as a Jinja template has, and is no file that can be "
            f"read: {error}; expected a template, or the path of one"
        ) from None


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
        score_types: ways in which the model can rate a pair, the default first: "cross-encoder", "bi-encoder",
            "late-interaction", "listwise".
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


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter that requests choose by its name, as if it were a model.

    Attributes:
        name: in requests.
        path: folder or hub id.
        base_model_name: name of the model that it changes, in `/v1/models`; `None` = the served one's.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: str
    path: str
    base_model_name: str | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.path:
            raise ValueError(
                f"got the name {self.name!r} and the path {self.path!r}, expected name=path or JSON of both"
            )


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """The choice of an adapter for inputs, in vLLM's spelling.

    Attributes:
        lora_name: its name.
        lora_int_id: its number, at least 1; the name is what tells adapters apart here.
        lora_path: folder or hub id.
        base_model_name: without effect.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise BadRequest(f"id must be > 0, got {self.lora_int_id}", param="lora_request")
        if not self.lora_name or not self.lora_path:
            raise BadRequest("a LoRARequest needs a name and a path", param="lora_request")


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
        finished. An engine in another process refuses by the future, not by raising.
        """

    def healthy(self) -> bool:
        """Return whether the last forward succeeded, or a new one does."""

    def close(self) -> None:
        """Refuse new work, finish what was accepted, and stop."""
