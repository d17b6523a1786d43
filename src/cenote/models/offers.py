"""The outputs that a checkpoint offers, by its files and the user's options for pooling, heads and steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from cenote.errors import CheckpointError
from cenote.models import classifiers
from cenote.models.convert import MODE_OF_TYPE, architecture_pooling
from cenote.models.families.family import Loaded, OwnVectors
from cenote.models.poolers import Calibration, Classify, Embed, Pooler, TokenClassify, TokenEmbed, activation_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from transformers import PreTrainedModel

    from cenote.config import ModelConfig, PoolerConfig
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.poolers import TaskOutput
    from cenote.models.probe import HeadProbe


@dataclass(frozen=True)
class Offer:
    """Outputs of a checkpoint.

    Attributes:
        outputs: by task, the one that it is made for first.
        pooler: of its vectors.
        dimension: length of a vector before any truncation.
    """

    outputs: Mapping[str, TaskOutput]
    pooler: Pooler
    dimension: int


def offer(checkpoint: Checkpoint, options: ModelConfig, full: PreTrainedModel, probe: HeadProbe | None) -> Offer:
    """Put together the outputs of a checkpoint; heads are proved by `probe`.

    Args:
        checkpoint: as it was read.
        options: the user's.
        full: its model, with the head if that is one of Transformers'.
        probe: of `full`, if it has a head.

    Raises:
        CheckpointError: a head cannot be run, or the options ask for an output that the checkpoint cannot give.
    """
    pooler, dimension = _pooler(checkpoint, full.base_model, options)  # type: ignore[arg-type]
    for step in pooler.steps:
        if isinstance(step, nn.Module):
            step.to(full.device)
    loaded = Loaded(checkpoint, checkpoint.tokenizer, options, full, probe, pooler)
    outputs = checkpoint.family.outputs(loaded)
    outputs = outputs | _missing(_vectors(pooler), outputs)
    vectors = outputs["embed"]
    if isinstance(vectors, OwnVectors):
        dimension = vectors.dimension
    classifier = checkpoint.family.classifier(loaded) or _classifier(checkpoint, full, probe)
    if classifier is not None:
        outputs = _class_outputs(checkpoint, options, classifier) | outputs
    _check_options(checkpoint, options, outputs, has_head=classifier is not None)
    return Offer(outputs, pooler, dimension)


def _vectors(pooler: Pooler) -> dict[str, TaskOutput]:
    """Return the outputs of every backbone.

    Token rows pass the same modules as pooled rows, so modules over concatenated modes fit no token.
    """
    outputs: dict[str, TaskOutput] = {"embed": Embed(pooler)}
    if len(pooler.modes) == 1 or not pooler.steps:
        outputs["token_embed"] = TokenEmbed(pooler)
    return outputs


def _missing(outputs: Mapping[str, TaskOutput], there: Mapping[str, TaskOutput]) -> dict[str, TaskOutput]:
    """Return those of `outputs` whose task is not `there`."""
    return {task: output for task, output in outputs.items() if task not in there}


def _classifier(
    checkpoint: Checkpoint, full: PreTrainedModel, probe: HeadProbe | None
) -> classifiers.Classifier | None:
    """Return the head of `checkpoint`, proved, if it classifies and Transformers has a class for it."""
    head = checkpoint.head
    if head.kind not in ("sequence", "token", "vocabulary"):
        return None
    assert probe is not None
    if head.kind == "sequence":
        return classifiers.of_sequences(full, probe)
    if head.kind == "token":
        return classifiers.of_tokens(full, probe)
    return classifiers.of_vocabulary(full, probe, head.columns or None, difference=head.difference)


@dataclass(frozen=True)
class Steps:
    """STEP pooling of a head.

    Attributes:
        tag: id of the tokens that get a row; `None` = all do.
    """

    tag: int | None


def _class_outputs(
    checkpoint: Checkpoint, options: ModelConfig, classifier: classifiers.Classifier
) -> dict[str, TaskOutput]:
    """Return `classify` and `token_classify`, as far as the head can do them, the one that it is made for first."""
    head, config = checkpoint.head, options.pooler_config
    steps = _steps(checkpoint, options)
    calibration = _calibration(checkpoint, config, classifier, steps)
    columns = head.columns or range(classifier.num_labels)
    _check_columns(checkpoint, config.returned_token_ids or (), columns)
    rates_inputs, rates_tokens = classifier.whole is not None, classifier.per_token
    if head.kind == "vocabulary":  # a language model's logits rate inputs, or else steps
        rates_inputs, rates_tokens = steps is None, steps is not None
    modes: tuple[str, ...] = ()
    if config.sequence_pooling and classifier.per_token:
        modes = (MODE_OF_TYPE[config.sequence_pooling],)
    outputs: dict[str, TaskOutput] = {}
    if rates_inputs:
        outputs["classify"] = Classify(classifier, calibration, modes)
    if rates_tokens:
        outputs["token_classify"] = TokenClassify(
            classifier,
            calibration,
            columns,
            step=steps is not None,
            step_tag_id=steps.tag if steps else None,
            returned=config.returned_token_ids,
        )
    if steps or checkpoint.family.rates_tokens:
        return dict(reversed(outputs.items()))
    return outputs


def _calibration(
    checkpoint: Checkpoint, config: PoolerConfig, classifier: classifiers.Classifier, steps: Steps | None
) -> Calibration:
    """Return the way from logits to values, by the pooler config, else by the checkpoint.

    A reward is a number and no probability; a step is rated by the softmax over its classes.
    """
    head = checkpoint.head
    activate, sigma = config.use_activation, config.logit_sigma
    if activate is None:
        activate = head.kind != "reward" or steps is not None
    if sigma is None:
        sigma = head.sigma
    num_labels = len(config.returned_token_ids or range(classifier.num_labels))
    return Calibration(activation_of(checkpoint, num_labels), activate, config.logit_mean or 0.0, sigma)


def _check_columns(checkpoint: Checkpoint, returned: Seq[int], columns: Seq[int]) -> None:
    """Refuse `returned` that are not among the `columns` of the head."""
    for column in returned:
        if column not in columns:
            raise CheckpointError(
                f"pooler_config.returned_token_ids: {column} is no column of {checkpoint.name}'s head"
            )


def _steps(checkpoint: Checkpoint, options: ModelConfig) -> Steps | None:
    """Return the STEP pooling that the options or the family ask for.

    Raises:
        CheckpointError: neither does, but an option is about it, or the vocabulary lacks the family's step tag.
    """
    config, tag = options.pooler_config, checkpoint.family.step_tag
    if config.token_pooling != "STEP" and (tag is None or config.token_pooling is not None):
        _refuse(checkpoint, options, STEP_OPTIONS)
        return None
    if config.step_tag_id is not None or tag is None:
        return Steps(config.step_tag_id)
    tag_id = checkpoint.tokenizer.get_vocab().get(tag)
    if tag_id is None:
        raise CheckpointError(f"{checkpoint.name}: the vocabulary has no {tag!r}; set pooler_config.step_tag_id")
    return Steps(tag_id)


def _check_options(
    checkpoint: Checkpoint, options: ModelConfig, outputs: Mapping[str, TaskOutput], *, has_head: bool
) -> None:
    """Refuse options for heads that there are not."""
    asks_for_steps = options.pooler_config.token_pooling == "STEP"
    if not has_head:
        _refuse(checkpoint, options, HEAD_OPTIONS)
        if not asks_for_steps:
            _refuse(checkpoint, options, STEP_OPTIONS)
    if asks_for_steps and "token_classify" not in outputs:
        raise CheckpointError(f"pooling type STEP rates steps, but {checkpoint.name} has no head to rate them")


HEAD_OPTIONS = dict.fromkeys(
    ("logit_mean", "logit_sigma"),
    "calibrates the logits of a classification head, which {name} has not; leave it out, or see convert: classify",
)
STEP_OPTIONS = dict.fromkeys(
    ("step_tag_id", "returned_token_ids"), "is for pooling type STEP, which {name} does not use"
)


def _refuse(checkpoint: Checkpoint, options: ModelConfig, reasons: Mapping[str, str]) -> None:
    """Refuse fields of the pooler config that are set, each for its reason."""
    for field, reason in reasons.items():
        if getattr(options.pooler_config, field) is not None:
            raise CheckpointError(f"pooler_config.{field} {reason.format(name=checkpoint.name)}")


def _pooler(checkpoint: Checkpoint, model: PreTrainedModel, options: ModelConfig) -> tuple[Pooler, int]:
    """Return the pooler and the length of its vectors.

    Each of its fields is as the pooler config says, else as Sentence-Transformers, else as the architecture.
    """
    config, st = options.pooler_config, checkpoint.st
    modes = st.modes or (architecture_pooling(model),)
    if config.sequence_pooling:
        modes = (MODE_OF_TYPE[config.sequence_pooling],)
    if st.modes and st.steps and len(st.modes) != len(modes):
        raise CheckpointError(
            f"the checkpoint's modules expect its own pooling, {'+'.join(st.modes)}; "
            f"{config.sequence_pooling} gives vectors of another size"
        )
    activation = config.use_activation
    if activation is None:
        activation = st.normalizes or not st.modes
    dimension = checkpoint.width * len(modes)
    if st.steps and st.dimension:
        dimension = st.dimension
    return Pooler(modes, st.steps, activation, config.dimensions), dimension
