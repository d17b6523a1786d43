"""The outputs that a checkpoint offers: what its files and the user say of pooling, heads and steps."""

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

    from transformers import PreTrainedModel

    from cenote.config import ModelConfig
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.poolers import TaskOutput
    from cenote.models.probe import HeadProbe


@dataclass(frozen=True)
class Offer:
    """What a checkpoint can do.

    Attributes:
        outputs: by task; the one that it is made for comes first.
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
        CheckpointError: a head cannot be run, or the options ask for what there is not.
    """
    pooler, dimension = _pooler(checkpoint, full.base_model, options)  # type: ignore[arg-type]
    for step in pooler.steps:
        if isinstance(step, nn.Module):
            step.to(full.device)
    offered: dict[str, TaskOutput] = {"embed": Embed(pooler)}
    # Token rows pass the same head as pooled rows, so a head over concatenated modes fits no token.
    if len(pooler.modes) == 1 or not pooler.steps:
        offered["token_embed"] = TokenEmbed(pooler)
    loaded = Loaded(checkpoint, checkpoint.tokenizer, options, full, probe, pooler)
    special = checkpoint.family.outputs(loaded)
    offered = special | {task: output for task, output in offered.items() if task not in special}
    vectors = offered["embed"]
    if isinstance(vectors, OwnVectors):
        dimension = vectors.dimension
    classifier = checkpoint.family.classifier(loaded) or _classifier(checkpoint, full, probe)
    asks_for_steps = options.pooler_config.token_pooling == "STEP"
    if classifier is not None:
        offered = _class_outputs(checkpoint, options, classifier) | offered
    else:
        _refuse_calibration(checkpoint, options)
        if not asks_for_steps:
            _refuse_step_options(checkpoint, options)
    if asks_for_steps and "token_classify" not in offered:
        raise CheckpointError(f"pooling type STEP rates steps, but {checkpoint.name} has no head to rate them")
    return Offer(offered, pooler, dimension)


def _classifier(
    checkpoint: Checkpoint, full: PreTrainedModel, probe: HeadProbe | None
) -> classifiers.Classifier | None:
    """Return the classification head that was chosen for `checkpoint`, proved, if Transformers has a class for it."""
    head = checkpoint.head
    if head.kind == "sequence":
        return classifiers.of_sequences(full, _there(probe))
    if head.kind == "token":
        return classifiers.of_tokens(full, _there(probe))
    if head.kind == "vocabulary":
        return classifiers.of_vocabulary(full, _there(probe), head.columns or None, difference=head.difference)
    return None


def _there(probe: HeadProbe | None) -> HeadProbe:
    """Return the probe, which a model with a head of Transformers' has."""
    assert probe is not None
    return probe


def _class_outputs(
    checkpoint: Checkpoint, options: ModelConfig, classifier: classifiers.Classifier
) -> dict[str, TaskOutput]:
    """`classify` and `token_classify`, as far as the head can do them; the one that it is made for comes first."""
    head, asked = checkpoint.head, options.pooler_config
    tag, step = _step(checkpoint, options)
    returned = asked.returned_token_ids
    num_labels = len(returned) if step and returned else classifier.num_labels
    activate = asked.use_activation
    if activate is None:  # a reward is a number, not a probability; a step is rated by the softmax over its classes
        activate = head.kind != "reward" or step
    calibration = Calibration(
        activation_of(checkpoint, num_labels),
        activate,
        asked.logit_mean or 0.0,
        head.sigma if asked.logit_sigma is None else asked.logit_sigma,
    )
    modes = (MODE_OF_TYPE[asked.sequence_pooling],) if asked.sequence_pooling and classifier.per_token else ()
    columns = head.columns or range(classifier.num_labels)
    if unknown := [i for i in returned or () if i not in columns]:
        raise CheckpointError(
            f"pooler_config.returned_token_ids: {unknown[0]} is no column of {checkpoint.name}'s head"
        )
    outputs: dict[str, TaskOutput] = {}
    if classifier.whole is not None and not (step and head.kind == "vocabulary"):
        outputs["classify"] = Classify(classifier, calibration, modes)
    if classifier.per_token and (head.kind != "vocabulary" or step):
        outputs["token_classify"] = TokenClassify(classifier, calibration, columns, step, tag, returned)
    is_for_tokens = step or checkpoint.family.rates_tokens
    return dict(reversed(outputs.items())) if is_for_tokens else outputs


def _step(checkpoint: Checkpoint, options: ModelConfig) -> tuple[int | None, bool]:
    """The step tag and whether `token_classify` gives one row per step."""
    asked = options.pooler_config
    own_tag = checkpoint.family.step_tag
    step = asked.token_pooling == "STEP" or (own_tag is not None and asked.token_pooling is None)
    if not step:
        _refuse_step_options(checkpoint, options)
        return None, False
    tag = asked.step_tag_id
    if tag is None and own_tag is not None:
        tag = checkpoint.tokenizer.get_vocab().get(own_tag)
    if tag is None and own_tag is not None:
        raise CheckpointError(f"{checkpoint.name}: the vocabulary has no {own_tag!r}; set pooler_config.step_tag_id")
    return tag, True


def _refuse_calibration(checkpoint: Checkpoint, options: ModelConfig) -> None:
    for name in ("logit_mean", "logit_sigma"):
        if getattr(options.pooler_config, name) is not None:
            raise CheckpointError(
                f"pooler_config.{name} calibrates the logits of a classification head, which {checkpoint.name} has not"
                "; leave it out, or see convert: classify"
            )


def _refuse_step_options(checkpoint: Checkpoint, options: ModelConfig) -> None:
    for name in ("step_tag_id", "returned_token_ids"):
        if getattr(options.pooler_config, name) is not None:
            raise CheckpointError(
                f"pooler_config.{name} is for pooling type STEP, which {checkpoint.name} does not use"
            )


def _pooler(checkpoint: Checkpoint, model: PreTrainedModel, options: ModelConfig) -> tuple[Pooler, int]:
    """Per field: the user's pooler config, then Sentence-Transformers, then the architecture."""
    asked, st = options.pooler_config, checkpoint.st
    if asked.sequence_pooling:
        modes: tuple[str, ...] = (MODE_OF_TYPE[asked.sequence_pooling],)
    else:
        modes = st.modes if st and st.modes else (architecture_pooling(model),)
    activation = asked.use_activation
    if activation is None:
        activation = st.normalizes if st and st.modes else True
    steps = st.steps if st else ()
    width = int(checkpoint.config.get_text_config().hidden_size) * len(modes)
    if st and st.modes and len(st.modes) != len(modes) and steps:
        raise CheckpointError(
            f"the checkpoint's modules expect its own pooling, {'+'.join(st.modes)}; "
            f"{asked.sequence_pooling} gives vectors of another size"
        )
    dimension = st.dimension if st and st.dimension and steps else width
    return Pooler(modes, steps, activation, asked.dimensions), dimension
