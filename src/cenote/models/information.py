"""The result of start-up about a model, as `ModelInfo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cenote.core import UNLIMITED, ModelInfo, Report
from cenote.errors import CheckpointError
from cenote.functions import coalesce
from cenote.models import card
from cenote.models.families.own import CLASSES
from cenote.models.poolers import Classify, TokenClassify
from cenote.tasks import KINDS, TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from cenote.config import ModelConfig
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.offers import Offer
    from cenote.models.poolers import TaskOutput


def describe(
    checkpoint: Checkpoint, offer: Offer, options: ModelConfig, length: int, running: Report, **of_backbone: Any
) -> ModelInfo:
    """Return the description of a model.

    Args:
        checkpoint: as it was read.
        offer: its outputs.
        options: the user's.
        length: maximum tokens that it reads at once.
        running: the part of the report that says how it runs.
        of_backbone: fields that its backbone gives.

    Raises:
        CheckpointError: the options ask for a task, a length or dimensions that it does not have.
    """
    vectors, dimensions = offer.vectors, offer.pooler.dimensions
    matryoshka = _matryoshka(checkpoint)
    longest = 0 if matryoshka is None else vectors.dimension
    if coalesce(dimensions, 0) > longest:
        raise CheckpointError(
            f"pooler_config.dimensions is {dimensions}, but {checkpoint.name} does not declare Matryoshka "
            f"embeddings of that size (its vectors have {vectors.dimension}); see hf_overrides is_matryoshka"
        )
    classes = _class_info(checkpoint, offer.outputs, options.pooler_config.use_activation)
    info = ModelInfo(
        name=_served_name(checkpoint, options),
        architecture=checkpoint.architecture,
        tasks=tuple(offer.outputs),
        default_task=_default_task(checkpoint, offer, options, str(classes.get("reward") or "reward")),
        vector_task=_vector_task(options.pooler_config.task, next(iter(offer.outputs))),
        dimension=vectors.dimension,
        max_model_len=length,
        max_embed_len=_embed_length(checkpoint, options, length),
        use_activation=vectors.use_activation,
        matryoshka=matryoshka,
        similarity=replace(checkpoint.similarity, is_apart=options.batch_invariant),
        report=_of_files(checkpoint, replace(running, pooling=vectors.pooling)),
        **of_backbone,
    )
    classes["score_types"] = _ordered(classes["score_types"], options.pooler_config.task)
    return replace(info, **classes)


def _of_files(checkpoint: Checkpoint, running: Report) -> Report:
    """Return the report with the part that the checkpoint's files say."""
    return replace(
        running,
        source=checkpoint.name,
        revision=checkpoint.revision,
        family=checkpoint.family.title,
        head=checkpoint.head.name,
        used=checkpoint.audit.used,
        left=checkpoint.audit.left,
    )


def _served_name(checkpoint: Checkpoint, options: ModelConfig) -> str:
    """Return the first served name for messages: of a folder its last part, as paths are not for strangers."""
    name = (*options.served_model_name, checkpoint.name)[0]
    path = Path(name).expanduser()
    return path.absolute().name if path.is_dir() else name


def _default_task(checkpoint: Checkpoint, offer: Offer, options: ModelConfig, reward: str) -> str:
    """Return the task of requests that name none; `reward` is the one that gives the model's reward."""
    default = options.pooler_config.task or next(iter(offer.outputs))
    if options.task == "reward":
        default = reward
    if default not in offer.outputs:
        offered = ", ".join(offer.outputs)
        raise CheckpointError(f"the task asked for is {default!r}, but {checkpoint.name} offers {offered}")
    return default


def _vector_task(*names: str | None) -> str:
    """Return the first of `names` that is a task of embeddings, else "embed"."""
    return next(filter(frozenset(KINDS.values()).__contains__, names), None) or "embed"


def _ordered(ways: tuple[str, ...], task: str | None) -> tuple[str, ...]:
    """Return ways to score, the one by the results of `task` first."""
    return tuple(sorted(ways, key=lambda way: task is None or TASKS[task].way != way))


def _embed_length(checkpoint: Checkpoint, options: ModelConfig, length: int) -> int:
    """Return the maximum tokens per input of `embed`; 0 = `length`, which the model reads at once."""
    limit = options.pooler_config.max_embed_len or 0
    if options.pooler_config.enable_chunked_processing:
        return limit or UNLIMITED
    if limit > length:
        raise CheckpointError(
            f"pooler_config.max_embed_len is {limit}, but {checkpoint.name} reads at most {length} tokens at once; "
            "set enable_chunked_processing to run longer inputs in blocks"
        )
    return limit


def _class_info(checkpoint: Checkpoint, outputs: Mapping[str, TaskOutput], activates: bool | None) -> dict[str, Any]:
    """Return the fields of `ModelInfo` about the classification head and about scoring.

    Args:
        checkpoint: as it was read.
        outputs: of the model.
        activates: whether the user wants the activation; `None` = as the kind of head.
    """
    vectors, head = checkpoint.family.score_types(outputs), checkpoint.head
    output = outputs.get("classify") or outputs.get("token_classify")
    if not isinstance(output, (Classify, TokenClassify)):
        return {"score_types": vectors}
    num_labels, columns = output.classifier.num_labels, _step_columns(outputs)
    step = len(columns) > 0
    score_types: tuple[str, ...] = vectors if head.kind == "tokens" else ()
    reward = ""
    if "classify" in outputs and num_labels == 1:
        score_types, reward = ("cross-encoder", *vectors), "classify"
    if head.kind == "reward" or step:
        reward = next(filter(CLASSES.__contains__, outputs))
    return {
        "num_labels": num_labels,
        "labels": _labels(checkpoint, num_labels),
        "activation": output.calibration.activation,
        "classifies": output.calibration.use_activation,
        "score_types": score_types,
        "reward": reward,
        "activates_reward": coalesce(activates, step),
        "step": step,
        "columns": columns,
    }


def _step_columns(outputs: Mapping[str, TaskOutput]) -> Seq[int]:
    """Return the columns of a head that rates steps; none if it does not."""
    output = outputs.get("token_classify")
    return output.columns if isinstance(output, TokenClassify) and output.step else ()


def _labels(checkpoint: Checkpoint, num_labels: int) -> tuple[str, ...]:
    """Return the names of the classes, if the checkpoint names them all."""
    names = getattr(checkpoint.config, "id2label", None) or {}
    if checkpoint.head.kind not in ("sequence", "token") or len(names) != num_labels:
        return ()
    if set(names) != set(range(num_labels)):
        raise CheckpointError(
            f"config.json: id2label names the classes {sorted(names)}, expected 0 to {num_labels - 1}, one a row "
            "of the head; correct it"
        )
    return tuple(str(names[i]) for i in range(num_labels))


def _matryoshka(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """Return the allowed `dimensions`, as in `ModelInfo.matryoshka`.

    Sentence-Transformers tags the card of a model with the losses that it was trained with.
    """
    listed = getattr(checkpoint.config, "matryoshka_dimensions", None)
    if listed:
        return tuple(map(int, listed))
    is_declared = getattr(checkpoint.config, "is_matryoshka", None)
    if is_declared is None:
        is_declared = "matryoshka" in " ".join(card.tags(checkpoint.path)).lower()
    return () if is_declared else None
