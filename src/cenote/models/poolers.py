"""From the hidden states of a batch to the output of each task: one class per row of the task table.

Each takes `[T, D]` hidden states, the batch, the sequences that want this output, and their parameters; all tasks of
a model share one forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch

from cenote.errors import CheckpointError
from cenote.tensors import heads
from cenote.tensors.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from cenote.core import PoolingParams
    from cenote.models.classifiers import Classifier
    from cenote.models.facts import Files
    from cenote.tensors.packing import Batch, Place
    from cenote.tensors.pooling import Clustering

Activation = Literal["softmax", "sigmoid", "none"]


class Rows(NamedTuple):
    """Outputs of several sequences, end to end.

    Attributes:
        values: one row or value for each of theirs.
        lengths: how many each sequence has; `None` = one row each, which is the sequence's output.
        indices: what the values stand for, as vocabulary entries; as long as `values`.
    """

    values: Tensor
    lengths: list[int] | None = None
    indices: Tensor | None = None


class TaskOutput(Protocol):
    """What every task has. One that looks at a single token of each sequence says so, see `Embed.place`."""

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """Outputs of the sequences numbered `members`."""


@dataclass(frozen=True)
class Pooler:
    """How this model's hidden states become vectors.

    Attributes:
        modes: keys of `cenote.tensors.pooling.MODES`.
        steps: the checkpoint's modules after pooling.
        use_activation: whether vectors are normalised unless a request says otherwise.
        dimensions: length to which vectors are cut unless a request says otherwise.
    """

    modes: tuple[str, ...]
    steps: tuple[heads.Step, ...]
    use_activation: bool
    dimensions: int | None

    def finish(self, x_RD: Tensor, params: PoolingParams) -> Tensor:
        """Modules, cut and normalisation of rows."""
        activate = self.use_activation if params.use_activation is None else params.use_activation
        return heads.apply(self.steps, x_RD, dimensions=params.dimensions or self.dimensions, activate=activate)


def place_of(modes: tuple[str, ...], batch: Batch) -> Place | None:
    """The only token of each sequence that pooling by `modes` looks at, if there is one."""
    if modes == ("cls",) and not batch.skips:
        return "first"
    return "last" if modes == ("lasttoken",) else None


@dataclass(frozen=True)
class Embed:
    """`embed`: one vector per sequence."""

    pooler: Pooler

    def place(self, batch: Batch, members: list[int]) -> Place | None:
        """The only token of each member that is looked at, if there is one."""
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
        clustering: joins the vectors of sequences that want it into fewer.
    """

    pooler: Pooler
    clustering: Clustering | None = None

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """All tokens or chunks of the members, `[sum of T, D]`."""
        if params.late_chunking_params is not None:
            size = params.late_chunking_params.chunk_size
            lengths = [batch.lengths[i] for i in members]
            chunks = [[min(size, length - first) for first in range(0, length, size)] for length in lengths]
            own_TD = torch.cat([x_TD[batch.starts[i] : batch.starts[i + 1]] for i in members])
            sizes = batch.index([length for own in chunks for length in own])
            mean_RD = torch.segment_reduce(own_TD.float(), "mean", lengths=sizes, axis=0, unsafe=True)
            return Rows(self.pooler.finish(mean_RD, params), [len(own) for own in chunks])
        rows, lengths = batch.rows_of(members)
        found_RD = self.pooler.finish(x_TD[rows], params)
        if self.clustering is None or not any(sequence.clusters for sequence in batch.sequences):
            return Rows(found_RD, lengths)
        own = zip(members, torch.split(found_RD, lengths), strict=True)
        parts = [self.clustering(part) if batch.sequences[i].clusters else part.cpu() for i, part in own]
        return Rows(torch.cat(parts), [len(part) for part in parts])


@dataclass(frozen=True)
class Calibration:
    """What happens to logits.

    Attributes:
        activation: applied last, unless a request says otherwise.
        use_activation: default of that request parameter.
        mean: subtracted from the logits.
        sigma: by which they are divided then.
    """

    activation: Activation
    use_activation: bool = True
    mean: float = 0.0
    sigma: float = 1.0

    def finish(self, logits_RC: Tensor, params: PoolingParams) -> Tensor:
        """`activation((logits - mean) / sigma)`, in float32."""
        y_RC = logits_RC.float()
        if (self.mean, self.sigma) != (0.0, 1.0):
            y_RC = (y_RC - self.mean) / self.sigma
        activate = self.use_activation if params.use_activation is None else params.use_activation
        if not activate or self.activation == "none":
            return y_RC
        return y_RC.softmax(-1) if self.activation == "softmax" else y_RC.sigmoid()


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
        """The only token of each member that is looked at, if there is one."""
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
        columns: what the head's columns stand for: token ids, or their own numbers.
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
        kept = [np.arange(batch.starts[i], batch.starts[i + 1]) for i in members]
        tag = self.step_tag_id if params.step_tag_id is None else params.step_tag_id
        if self.step and tag is not None:
            kept = [rows[batch.host_ids_T[rows] == tag] for rows in kept]
        logits_RC = self.classifier.rows(x_TD[batch.index(np.concatenate(kept))])
        wanted = self.returned if params.returned_token_ids is None else params.returned_token_ids
        if self.step and wanted is not None:
            logits_RC = logits_RC[:, batch.index([self.columns.index(i) for i in wanted])]
        return Rows(self.calibration.finish(logits_RC, params), [len(rows) for rows in kept])


def activation_of(checkpoint: Files, num_labels: int) -> Activation:
    """The activation of a classifier: the config's `problem_type`, then Sentence-Transformers, then the count.

    Raises:
        CheckpointError: the checkpoint names an activation that is not honoured.
    """
    config = checkpoint.config
    by_count: Activation = "softmax" if num_labels > 1 else "sigmoid"
    by_problem: dict[str, Activation] = {
        "regression": "none",
        "single_label_classification": by_count,
        "multi_label_classification": "sigmoid",
    }
    problem = getattr(config, "problem_type", None)
    if problem is not None:
        if problem not in by_problem:
            raise CheckpointError(f"problem_type must be one of {', '.join(by_problem)}, got {problem!r}")
        return by_problem[problem]
    saved = checkpoint.st.activation
    saved = saved or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    saved = saved or getattr(config, "sbert_ce_default_activation_function", None)
    if saved is None:
        return by_count
    kind = saved.rpartition(".")[2]
    if not saved.startswith("torch.nn.modules.") or kind not in ("Identity", "Sigmoid", "Softmax"):
        raise CheckpointError(
            f"{checkpoint.name} was saved with the activation {saved!r}; honoured are torch.nn's Identity, Sigmoid "
            "and Softmax; hf_overrides problem_type can say which of them to use instead"
        )
    return "none" if kind == "Identity" else by_count
