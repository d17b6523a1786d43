"""Model classes of your own that say what they offer: their tasks, how they pool, and their head.

A class that is registered with `cenote.register_model` is a backbone like any other. One that has `tasks` is a
`ModelForPooling`, whose results are made by its own methods. An example is in docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch

from cenote.errors import CheckpointError
from cenote.models.classifiers import Classifier
from cenote.models.convert import Head
from cenote.models.families.family import Family
from cenote.models.poolers import Embed, Rows, TokenEmbed
from cenote.tensors.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cenote.config import ModelConfig
    from cenote.core import PoolingParams
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.models.poolers import Pooler, TaskOutput
    from cenote.tensors.packing import Batch, Place

    OneVector = Callable[[Tensor, Batch, list[int]], Tensor]
    """Rows of whole sequences: `([T, D], batch, members) -> [B, D]`."""

VECTORS = ("embed", "token_embed")
CLASSES = ("classify", "token_classify")


@runtime_checkable
class ModelForPooling(Protocol):
    """A `PreTrainedModel` with `tasks`, and with those of the methods below that differ from the usual.

    `pool(states, token_ids)`: a sequence's last hidden states `[T, D]` and ids `[T]` to its row `[D]`. Without it a
    sequence is pooled as `default_pooling_type` or the options say.
    `project(rows)`: `[R, D]` to vectors `[R, V]`, which are cut and normalised behind it as requests say. Without it
    rows are vectors.
    `head(rows)`: `[R, D]` to logits `[R, C]`, which go through the activation behind it as requests say. "classify" and
    "token_classify" need it.

    Attributes:
        tasks: of "embed", "token_embed", "classify" and "token_classify"; requests that name none get the first.
    """

    tasks: ClassVar[tuple[str, ...]]


@dataclass(frozen=True)
class OwnModel(Family):
    """A checkpoint whose registered class is a `ModelForPooling`."""

    title: ClassVar[str] = "a model class of your own"
    head = Head()

    tasks: tuple[str, ...] = ()

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> OwnModel | None:
        """Recognise a config whose registered class has `tasks`.

        Raises:
            CheckpointError: one of them is not a task that a class can give, or needs a method that it has not.
        """
        from transformers import MODEL_MAPPING

        model = MODEL_MAPPING.get(type(files.config), None)
        if not isinstance(model, type) or not isinstance(model, ModelForPooling):
            return None
        tasks = tuple(model.tasks)
        if not tasks or not set(tasks) <= {*VECTORS, *CLASSES}:
            raise CheckpointError(
                f"{model.__name__}.tasks is {tasks!r}; expected some of {', '.join((*VECTORS, *CLASSES))}, the one of "
                "requests that name none first"
            )
        if not set(tasks).isdisjoint(CLASSES) and not hasattr(model, "head"):
            raise CheckpointError(
                f"{model.__name__}.tasks names {', '.join(set(tasks) & set(CLASSES))}, which needs a method "
                "`head(rows)`: [R, D] -> [R, C]"
            )
        return cls(tasks)

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return vectors, by the class's own pooling and projection."""
        pooler = _projected(loaded)
        pooled = _own_pooling(loaded)
        embed = Embed(pooler) if pooled is None else OwnEmbed(pooler, pooled)
        return {"embed": embed, "token_embed": TokenEmbed(pooler)}

    def classifier(self, loaded: Loaded) -> Classifier | None:
        """Return the class's head, if it has a task of classes."""
        if set(self.tasks).isdisjoint(CLASSES):
            return None
        pooled = _own_pooling(loaded) or partial(_pooled_by, modes=loaded.pooler.modes)
        rows = _in_its_dtype(loaded, "head")

        def whole(x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
            return rows(pooled(x_TD, batch, members))

        return Classifier(
            rows=rows,
            whole=whole if "classify" in self.tasks else None,
            per_token="token_classify" in self.tasks,
            num_labels=rows(_blank(loaded)).shape[-1],
            place=lambda batch, members: None,
        )


@dataclass(frozen=True)
class OwnEmbed(Embed):
    """`embed` of a class with its own pooling.

    Attributes:
        pooled: one row of each sequence.
    """

    pooled: OneVector

    @property
    def pooling(self) -> str:
        """How tokens become one vector."""
        return "by its class"

    def place(self, batch: Batch, members: list[int]) -> Place | None:
        """Return `None`: every token may count."""
        return None

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[B, V]`."""
        return Rows(self.pooler.finish(self.pooled(x_TD, batch, members), params))


def _own_pooling(loaded: Loaded) -> OneVector | None:
    """Return the class's pooling of whole sequences; `None` if it has none, or the user chose another."""
    pool: Any = getattr(loaded.full, "pool", None)
    if pool is None or loaded.options.pooler_config.sequence_pooling:
        return None

    def pooled(x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        bounds = [(batch.starts[i], batch.starts[i + 1]) for i in members]
        return torch.stack([pool(x_TD[first:end], batch.ids_T[first:end]) for first, end in bounds])

    return pooled


def _pooled_by(x_TD: Tensor, batch: Batch, members: list[int], *, modes: tuple[str, ...]) -> Tensor:
    return pool(x_TD, batch, modes)[batch.index(members)]


def _projected(loaded: Loaded) -> Pooler:
    """Return the pooler with the class's projection."""
    if not hasattr(loaded.full, "project"):
        return loaded.pooler
    project = _in_its_dtype(loaded, "project")
    width = project(_blank(loaded)).shape[-1]
    return replace(loaded.pooler, steps=(*loaded.pooler.steps, project), width=width)


def _in_its_dtype(loaded: Loaded, name: str) -> Callable[[Tensor], Tensor]:
    """Return the class's method `name` over rows of any dtype, with float32 results."""
    method: Any = getattr(loaded.full, name)

    def run(x_RD: Tensor) -> Tensor:
        result_RC: Tensor = method(x_RD.to(loaded.full.dtype))
        return result_RC.float()

    return run


def _blank(loaded: Loaded) -> Tensor:
    """Return a row of zeros, `[1, D]`, to learn the width of results by."""
    return torch.zeros(1, loaded.files.width, dtype=torch.float32, device=loaded.full.device)
