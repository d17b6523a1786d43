"""What start-up resolved about a model, as `ModelInfo`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cenote.core import UNLIMITED, ModelInfo
from cenote.errors import CheckpointError
from cenote.models import checkpoint as checkpoints
from cenote.models.families.family import OwnVectors
from cenote.models.poolers import Classify, TokenClassify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cenote.config import ModelConfig
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.offers import Offer
    from cenote.models.poolers import TaskOutput


def describe(checkpoint: Checkpoint, offer: Offer, options: ModelConfig, length: int, **running: Any) -> ModelInfo:
    """What a model is and offers.

    Args:
        checkpoint: it is of.
        offer: its outputs.
        options: the user's.
        length: maximum tokens that it reads at once.
        running: fields that say how it runs.

    Raises:
        CheckpointError: the options ask for a task, a length or dimensions that it does not have.
    """
    pooler, dense = offer.pooler, offer.outputs["embed"]
    matryoshka = _matryoshka(checkpoint)
    if pooler.dimensions is not None and (matryoshka is None or pooler.dimensions > offer.dimension):
        raise CheckpointError(
            f"pooler_config.dimensions is {pooler.dimensions}, but {checkpoint.name} does not declare Matryoshka "
            f"embeddings of that size (its vectors have {offer.dimension}); see hf_overrides is_matryoshka"
        )
    pooling, use_activation = "+".join(pooler.modes), pooler.use_activation
    if isinstance(dense, OwnVectors):
        pooling, use_activation = dense.pooling, dense.use_activation
    classes = _class_info(checkpoint, offer.outputs, options.pooler_config.use_activation)
    info = ModelInfo(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        tasks=tuple(offer.outputs),
        default_task=_default_task(checkpoint, offer, options, str(classes.get("reward") or "reward")),
        dimension=offer.dimension,
        max_model_len=length,
        max_embed_len=_embed_length(checkpoint, options, length),
        pooling=pooling,
        use_activation=use_activation,
        revision=checkpoint.revision,
        matryoshka=matryoshka,
        similarity=checkpoint.similarity,
        **running,
    )
    return replace(info, **classes)


def _default_task(checkpoint: Checkpoint, offer: Offer, options: ModelConfig, reward: str) -> str:
    """The task of requests that name none; `reward` is the one that gives the model's reward."""
    default = options.pooler_config.task or next(iter(offer.outputs))
    if options.task == "reward":
        default = reward
    if default not in offer.outputs:
        offered = ", ".join(offer.outputs)
        raise CheckpointError(f"the task asked for is {default!r}, but {checkpoint.name} offers {offered}")
    return default


def _embed_length(checkpoint: Checkpoint, options: ModelConfig, length: int) -> int:
    """Most tokens of an input of `embed`; 0 = `length`, which the model reads at once."""
    most = options.pooler_config.max_embed_len
    if options.pooler_config.enable_chunked_processing:
        return most or UNLIMITED
    if most is not None and most > length:
        raise CheckpointError(
            f"pooler_config.max_embed_len is {most}, but {checkpoint.name} reads at most {length} tokens at once; "
            "set enable_chunked_processing to run longer inputs in blocks"
        )
    return most or 0


def _class_info(checkpoint: Checkpoint, outputs: Mapping[str, TaskOutput], activates: bool | None) -> dict[str, Any]:
    """What `ModelInfo` says of the classification head and of scoring; `activates` is the user's wish."""
    vectors = checkpoint.family.score_types(outputs)
    found = outputs.get("classify") or outputs.get("token_classify")
    if not isinstance(found, (Classify, TokenClassify)):
        return {"score_types": vectors, "head": checkpoint.head.name}
    num_labels, head = found.classifier.num_labels, checkpoint.head
    rates = "classify" in outputs and num_labels == 1
    of_tokens = outputs.get("token_classify")
    columns = of_tokens.columns if isinstance(of_tokens, TokenClassify) and of_tokens.step else ()
    step = len(columns) > 0
    named = getattr(checkpoint.config, "id2label", None) or {}
    is_named = head.kind in ("sequence", "token") and len(named) == num_labels
    return {
        "num_labels": num_labels,
        "labels": tuple(str(named[i]) for i in range(num_labels)) if is_named else (),
        "activation": found.calibration.activation,
        "classifies": found.calibration.use_activation,
        "score_types": ("cross-encoder", *vectors) if rates else (),
        "reward": next(iter(outputs)) if head.kind == "reward" or step else "classify" if rates else "",
        "activates_reward": step if activates is None else activates,
        "step": step,
        "columns": columns,
        "head": head.name,
    }


def _matryoshka(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    listed = getattr(checkpoint.config, "matryoshka_dimensions", None)
    if listed:
        return tuple(int(d) for d in listed)
    declared = getattr(checkpoint.config, "is_matryoshka", None)
    if declared is None:  # Sentence-Transformers tags the card of a model with the losses that it was trained with
        declared = any("matryoshka" in tag.lower() for tag in checkpoints.card_tags(checkpoint.path))
    return () if declared else None
