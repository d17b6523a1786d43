"""The task table: the tasks, the granularity of each, and the parameters that it takes.

A new task is a row here. Validation of parameters, the routes' checks and the start-up report read this table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import filterfalse
from typing import TYPE_CHECKING, Literal

from cenote.errors import BadRequest, TaskNotOffered

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cenote.core import PoolingParams


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the table.

    Attributes:
        name: the name used in requests and in `PoolerConfig.task`.
        granularity: "sequence" gives one row per input, "token" one row per token.
        params: names of the `PoolingParams` fields that the task takes.
        doc: the result, in words.
        way: name of the way to score pairs by its results (`cenote.pipeline.ranking.WAYS`); empty = there is none.
        kind: name of its results as a kind of embeddings, as requests spell it; empty = they are none.
    """

    name: str
    granularity: Literal["sequence", "token"]
    params: tuple[str, ...]
    doc: str
    way: str = ""
    kind: str = ""


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("embed", "sequence", ("dimensions", "use_activation"), "one vector [D] per input", "bi-encoder", "dense"),
        Task(
            "token_embed",
            "token",
            ("dimensions", "use_activation", "late_chunking_params"),
            "one matrix [T, D] per input; with late chunking one row per chunk",
            "late-interaction",
            "colbert",
        ),
        Task(
            "sparse", "sequence", ("top_k",), "vocabulary entries and their weights [K] per input", "sparse", "sparse"
        ),
        Task("classify", "sequence", ("use_activation",), "probabilities or scores [C] per input", "cross-encoder"),
        Task(
            "token_classify",
            "token",
            ("use_activation", "step_tag_id", "returned_token_ids"),
            "one matrix [T, C] per input; with STEP pooling one row per step",
        ),
    )
}

KINDS: dict[str, str] = {task.kind: task.name for task in TASKS.values() if task.kind}
"""Kinds of embeddings that requests may name, and the task of each."""

REMOVED: dict[str, str] = {
    "score": "`score` task was removed; use `classify` instead.",
    "encode": "`encode` task was removed; use `token_embed` or `token_classify` instead.",
    "reward": "`reward` task was removed; use `classify` (one reward per input) or `token_classify` (one per token "
    "or step) instead.",
}
"""Names of tasks that older releases of vLLM had, and the error message for each."""

PLUGIN = "plugin"
"""Task of requests whose input and output are an IO-processor plugin's; it runs no model of its own."""

HOW_TO_GET: dict[str, str] = {
    "classify": "Classification API is not supported by this model. It needs a checkpoint with a classification head "
    "(*ForSequenceClassification), or a language model and `--convert classify`.",
    "token_classify": "Classification API is not supported by this model. It needs a checkpoint with a head for tokens "
    "(*ForTokenClassification, *RewardModel), or a language model and `--convert classify`.",
    "sparse": "It needs a SPLADE or bge-m3 checkpoint, or a masked language model and `--convert sparse`.",
    "embed": "Embedding API is not supported by this model. Try converting the model using `--convert embed`.",
}
"""Why a model may not offer a task, and the remedy."""


def check_task(name: str, offered: Collection[str]) -> Task:
    """Return the row of task `name`.

    Raises:
        TaskNotOffered: it is not among the tasks that the model offers.
    """
    if name in REMOVED:
        raise TaskNotOffered(REMOVED[name], param="task")
    if name in offered and name in TASKS:
        return TASKS[name]
    message = f"Unsupported task: {name!r} Supported tasks: ({', '.join(map(repr, offered))})"
    if name in HOW_TO_GET:
        message += f". {HOW_TO_GET[name]}"
    raise TaskNotOffered(message, param="task")


def check_named(params: PoolingParams, tasks: Sequence[str]) -> None:
    """Raise `BadRequest` if `params` names a task that is none of those of its call."""
    if params.task not in (None, *tasks):
        raise BadRequest(
            f"pooling_params name the task {params.task!r}, and the call has {tasks[0]!r}; leave one of them out",
            param="task",
        )


def check_params(task: Task, params: PoolingParams) -> None:
    """Raise `BadRequest` if `params` sets a field that `task` does not take."""
    foreign = _foreign(task, params)
    if foreign:
        raise BadRequest(
            f"Task {task.name!r} only supports {list(task.params)} parameters, does not support {foreign} parameters",
            param=foreign[0],
        )


def only_of(task: Task, params: PoolingParams) -> PoolingParams:
    """Return `params` without the fields that `task` does not take."""
    return replace(params, task=task.name, **dict.fromkeys(_foreign(task, params)))


def _foreign(task: Task, params: PoolingParams) -> list[str]:
    return list(filterfalse(task.params.__contains__, params.given()))
