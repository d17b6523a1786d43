"""From the hidden states of a batch to the output of each task: one class per row of the task table.

Each takes `[T, D]` hidden states, the batch, the numbers of the sequences with this task, and their parameters; all
tasks of a model share one forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from cenote.errors import CheckpointError
from cenote.functions import coalesce
from cenote.models.modules import activation
from cenote.tensors import heads
from cenote.tensors.pooling import place_of, pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from cenote.core import LateChunkingParams, PoolingParams
    from cenote.models.classifiers import Classifier
    from cenote.models.facts import Files
    from cenote.tensors.packing import Batch, Place
    from cenote.tensors.pooling import Clustering

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda y_RC: y_RC.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda y_RC: y_RC,
}
"""Activations that checkpoints do not have to bring."""

NAMES = {"Identity": "none"}
"""Names of activations of `torch.nn` that are not their own in lower case."""


class Rows(NamedTuple):
    """Outputs of several sequences, end to end.

    Attributes:
        values: rows, or single values of sparse outputs.
        lengths: number of rows or values of each sequence; `None` = one row each, which is the sequence's output.
        indices: vocabulary entries of the values of sparse outputs; as long as `values`.
    """

    values: Tensor
    lengths: list[int] | None = None
    indices: Tensor | None = None


class TaskOutput(Protocol):
    """Output of a task. One that depends on a single token of each sequence has a `place`, see `Embed.place`."""

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """Return the outputs of the sequences numbered `members`."""


@dataclass(frozen=True)
class Pooler:
    """The way from this model's hidden states to vectors.

    Attributes:
        modes: keys of `cenote.tensors.pooling.MODES`.
        steps: the checkpoint's modules after pooling.
        use_activation: whether vectors are normalised unless a request says otherwise.
        dimensions: length to which vectors are cut unless a request says otherwise.
        width: length of a pooled vector before any truncation.
    """

    modes: tuple[str, ...]
    steps: tuple[heads.Step, ...]
    use_activation: bool
    dimensions: int | None
    width: int = 0

    def finish(self, x_RD: Tensor, params: PoolingParams) -> Tensor:
        """Take rows through the modules, cut them and normalise them."""
        activate = coalesce(params.use_activation, self.use_activation)
        return heads.apply(self.steps, x_RD, dimensions=params.dimensions or self.dimensions, activate=activate)


@dataclass(frozen=True)
class Embed:
    """`embed`: one vector per sequence."""

    pooler: Pooler

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.pooler.width

    @property
    def pooling(self) -> str:
        """How tokens become one vector."""
        return "+".join(self.pooler.modes)

    @property
    def use_activation(self) -> bool:
        """Whether vectors are normalised unless a request says otherwise."""
        return self.pooler.use_activation

    def place(self, batch: Batch, members: list[int]) -> Place | None:
        """Return the only token of each member that the output depends on, if there is one."""
        return place_of(self.pooler.modes, batch)

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[B, D]`."""
        pooled_BD = pool(x_TD, batch, self.pooler.modes)
        if members != list(range(batch.size)):
            pooled_BD = pooled_BD[batch.index(members)]
        return Rows(self.pooler.finish(pooled_BD, params))


@dataclass(frozen=True)
class TokenEmbed:
    """`token_embed`: one vector per token, or with late chunking one per chunk.

    Attributes:
        clustering: joins the vectors of sequences with `clusters` into fewer.
    """

    pooler: Pooler
    clustering: Clustering | None = None

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """All tokens or chunks of the members, `[sum of T, D]`."""
        if params.late_chunking_params is not None:
            rows_RD, counts = _chunk_means(x_TD, batch, members, params.late_chunking_params)
            return Rows(self.pooler.finish(rows_RD, params), counts)
        rows, lengths = batch.rows_of(members)
        vectors_RD = self.pooler.finish(x_TD[rows], params)
        if self.clustering is None or not batch.clusters:
            return Rows(vectors_RD, lengths)
        by_member = zip(members, torch.split(vectors_RD, lengths), strict=True)
        parts = [self.clustering(part) if batch.sequences[i].clusters else part.cpu() for i, part in by_member]
        return Rows(torch.cat(parts), list(map(len, parts)))


def _chunk_means(x_TD: Tensor, batch: Batch, members: list[int], late: LateChunkingParams) -> tuple[Tensor, list[int]]:
    """Return the mean of the tokens of each chunk, `[R, D]` float32, and the number of chunks of each member."""
    chunks = [_chunk_sizes(batch.lengths[i], late) for i in members]
    members_TD = torch.cat([x_TD[batch.starts[i] : batch.starts[i + 1]] for i in members])
    sizes = batch.index(list(chain.from_iterable(chunks)))
    means_RD = torch.segment_reduce(members_TD.float(), "mean", lengths=sizes, axis=0, unsafe=True)
    return means_RD, list(map(len, chunks))


def _chunk_sizes(length: int, late: LateChunkingParams) -> list[int]:
    ends = late.ends or (*range(late.chunk_size, length, late.chunk_size), length)
    return [end - first for first, end in pairwise((0, *ends))]


@dataclass(frozen=True)
class Calibration:
    """The way from logits to class values.

    Attributes:
        activation: name of the function that is applied last, unless a request says otherwise.
        use_activation: default of that request parameter.
        function: the function.
        mean: subtracted from the logits.
        sigma: divides them then.
    """

    activation: str
    use_activation: bool = True
    mean: float = 0.0
    sigma: float = 1.0
    function: Callable[[Tensor], Tensor] = ACTIVATIONS["none"]

    def finish(self, logits_RC: Tensor, params: PoolingParams) -> Tensor:
        """Return `activation((logits - mean) / sigma)`, in float32."""
        y_RC = logits_RC.float()
        if (self.mean, self.sigma) != (0.0, 1.0):
            y_RC = (y_RC - self.mean) / self.sigma
        activate = coalesce(params.use_activation, self.use_activation)
        return self.function(y_RC) if activate else y_RC


@dataclass(frozen=True)
class Classify:
    """`classify`: one row of class values per sequence.

    Attributes:
        modes: pooling that the user chose instead of the head's own rows.
    """

    classifier: Classifier
    calibration: Calibration
    modes: tuple[str, ...] = ()

    def place(self, batch: Batch, members: list[int]) -> Place | None:
        """Return the only token of each member that the output depends on, if there is one."""
        return place_of(self.modes, batch) if self.modes else self.classifier.place(batch, members)

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[B, C]`."""
        if self.modes:
            logits_BC = self.classifier.rows(pool(x_TD, batch, self.modes)[batch.index(members)])
        else:
            assert self.classifier.whole is not None
            logits_BC = self.classifier.whole(x_TD, batch, members)
        return Rows(self.calibration.finish(logits_BC, params))


@dataclass(frozen=True)
class TokenClassify:
    """`token_classify`: one row of class values per token, or per step.

    Attributes:
        columns: token ids of the head's columns, or their numbers.
        step: keep only the rows whose token is the step tag (STEP pooling), if there is a tag.
        step_tag_id: default of the request parameter.
        returned: default of the request parameter `returned_token_ids`, out of `columns`.
    """

    classifier: Classifier
    calibration: Calibration
    columns: Seq[int]
    step: bool = False
    step_tag_id: int | None = None
    returned: tuple[int, ...] | None = None

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """Rows of the members, `[sum of rows, C]`."""
        kept = batch.host_rows(members)
        tag = coalesce(params.step_tag_id, self.step_tag_id)
        if self.step and tag is not None:
            kept = [rows[batch.host_ids_T[rows] == tag] for rows in kept]
        logits_RC = self.classifier.rows(x_TD[batch.index(np.concatenate(kept))])
        token_ids = coalesce(params.returned_token_ids, self.returned)
        if self.step and token_ids is not None:
            logits_RC = logits_RC[:, batch.index(list(map(self.columns.index, token_ids)))]
        return Rows(self.calibration.finish(logits_RC, params), list(map(len, kept)))


def activation_of(
    checkpoint: Files, num_labels: int, *, by_user: bool = False
) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the activation of a classifier, its name and the function.

    A CrossEncoder of Sentence-Transformers has the one that it was saved with, else that library's default. Of other
    checkpoints the config's `problem_type` counts, then one that an old CrossEncoder was saved with, then the number
    of labels.

    Args:
        checkpoint: as it was read.
        num_labels: of the classifier.
        by_user: the user sets `problem_type`, which counts then of every checkpoint.

    Raises:
        CheckpointError: the checkpoint names an activation that is not honoured.
    """
    saved = _saved_activation(checkpoint)
    problem = getattr(checkpoint.config, "problem_type", None)
    is_one = checkpoint.st.is_cross_encoder and not by_user
    if saved is not None and (problem is None or is_one):
        return _of_torch(saved, num_labels, checkpoint.name)
    by_count = "softmax" if num_labels > 1 else "sigmoid"
    by_problem = {
        None: "none" if is_one and num_labels > 1 else by_count,
        "regression": "none",
        "single_label_classification": by_count,
        "multi_label_classification": "sigmoid",
    }
    if problem not in by_problem:
        expected = ", ".join(filter(None, by_problem))
        raise CheckpointError(f"config.json: problem_type must be one of {expected}, got {problem!r}")
    name = by_problem[None if is_one else problem]
    return name, ACTIVATIONS[name]


def _of_torch(path: str, num_labels: int, name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the name and the function of an activation of `torch.nn`, by its import path.

    Raises:
        CheckpointError: it is no function of rows of `num_labels` values, of which each gives as many.
    """
    try:
        module = activation(path).eval()
    except CheckpointError as error:
        raise CheckpointError(
            f"{name} was saved with the activation {path!r}; honoured are modules of torch.nn that need no arguments; "
            "hf_overrides problem_type can say which of Sigmoid, Softmax and none to use instead"
        ) from error
    if getattr(module, "dim", 0) is None:
        module.dim = -1  # type: ignore[assignment] # Softmax and its kin choose the labels themselves, with a warning
    rows_RC = torch.zeros(2, num_labels, dtype=torch.float32)
    try:
        fits = module(rows_RC).shape == rows_RC.shape
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{name} was saved with the activation {path!r}, which rows refuse: {error}") from error
    if not fits:
        raise CheckpointError(f"{name} was saved with the activation {path!r}, which gives another number of values")
    kind = type(module).__name__
    name_of_kind = NAMES.get(kind, kind.lower())
    return name_of_kind, ACTIVATIONS.get(name_of_kind, module)


def _saved_activation(checkpoint: Files) -> str | None:
    """Return the path of the activation's class, by whichever release of Sentence-Transformers saved it."""
    config = checkpoint.config
    places = (
        checkpoint.st.activation,
        (getattr(config, "sentence_transformers", None) or {}).get("activation_fn"),
        getattr(config, "sbert_ce_default_activation_function", None),
    )
    return next(filter(None, places), None)
