"""The outputs that a checkpoint offers, by its files and the user's options for pooling, heads and steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from cenote.errors import CheckpointError
from cenote.functions import coalesce
from cenote.models import classifiers, overrides
from cenote.models.convert import MODE_OF_TYPE, architecture_pooling, declared_tasks
from cenote.models.families.family import Loaded, Vectors
from cenote.models.model_outputs import OwnPooler
from cenote.models.poolers import Calibration, Classify, Embed, Pooler, TokenClassify, TokenEmbed, activation_of
from cenote.models.traits import of_kind
from cenote.tensors.heads import Cut

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Seq

    from transformers import PreTrainedModel

    from cenote.config import ModelConfig
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.poolers import TaskOutput
    from cenote.models.probe import HeadProbe
    from cenote.tensors.heads import Step


@dataclass(frozen=True)
class Offer:
    """Outputs of a checkpoint.

    Attributes:
        outputs: by task, the one that it is made for first.
        pooler: of its vectors.
    """

    outputs: Mapping[str, TaskOutput]
    pooler: Pooler

    @property
    def vectors(self) -> Vectors:
        """The output of `embed`."""
        output = self.outputs["embed"]
        assert isinstance(output, Vectors)
        return output

    @property
    def token_dimension(self) -> int:
        """Length of a token's vector: that of the last step over tokens that has one, if any does."""
        output = self.outputs.get("token_embed")
        width = self.vectors.dimension
        for step in output.pooler.steps if isinstance(output, TokenEmbed) else ():
            width = _width(step, width)
        return width


def _width(step: Step, width: int) -> int:
    """Return the length of vectors behind a step over those of length `width`."""
    if isinstance(step, Cut):
        return min(step.length, width)
    layers = of_kind(step, nn.Linear) if isinstance(step, nn.Module) else []
    return layers[-1].out_features if layers else width


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
    pooler = _pooler(checkpoint, checkpoint.family.backbone(full), options)
    loaded = Loaded(checkpoint, checkpoint.tokenizer, options, full, probe, pooler)
    loaded.place((*pooler.steps, *checkpoint.st.scoring))
    outputs = checkpoint.family.outputs(loaded)
    for task, output in _vectors(pooler, checkpoint).items():
        outputs.setdefault(task, output)
    classifier = checkpoint.family.classifier(loaded) or _classifier(checkpoint, full, probe)
    if classifier is not None:
        classes = _class_outputs(checkpoint, options, classifier)
        outputs = outputs | classes if _embeds_first(checkpoint, options) else classes | outputs
    _check_options(checkpoint, options, outputs, has_head=classifier is not None)
    first = filter(outputs.__contains__, checkpoint.family.tasks or declared_tasks(full))
    return Offer({task: outputs[task] for task in (*first, *outputs)}, pooler)


def _embeds_first(checkpoint: Checkpoint, options: ModelConfig) -> bool:
    """Return whether vectors come before the head: the user wants them, or the head is there for its training."""
    return options.convert == "embed" or checkpoint.head.kind == "tokens"


def _vectors(pooler: Pooler, checkpoint: Checkpoint) -> dict[str, TaskOutput]:
    """Return the outputs of every backbone.

    Token rows pass the same modules as pooled rows, so modules over concatenated modes fit no token.
    """
    outputs: dict[str, TaskOutput] = {"embed": Embed(pooler)}
    has_rows = checkpoint.family.embeds_tokens and not checkpoint.st.has_own_pooler
    if has_rows and (len(pooler.modes) == 1 or not pooler.steps):
        outputs["token_embed"] = TokenEmbed(pooler)
    return outputs


def _classifier(
    checkpoint: Checkpoint, full: PreTrainedModel, probe: HeadProbe | None
) -> classifiers.Classifier | None:
    """Return the head of `checkpoint`, proved, if it classifies and Transformers has a class for it."""
    head, st = checkpoint.head, checkpoint.st
    if head.kind == "modules":
        steps = (*_own_steps(checkpoint, checkpoint.family.backbone(full)), *st.scoring)
        return classifiers.of_pooled(st.modes, steps, st.dimension or 1)
    makers: dict[str, Callable[[PreTrainedModel, HeadProbe], classifiers.Classifier]] = {
        "sequence": classifiers.of_sequences,
        "token": classifiers.of_tokens,
        "tokens": classifiers.of_tokens,
        "vocabulary": partial(classifiers.of_vocabulary, columns=head.columns, difference=head.difference),
    }
    if head.kind not in makers:
        return None
    assert probe is not None
    return makers[head.kind](full, probe)


@dataclass(frozen=True)
class Steps:
    """STEP pooling of a head.

    Attributes:
        apply: whether tokens are steps at all.
        tag: id of the tokens that get a row; `None` = all do.
    """

    apply: bool
    tag: int | None = None


def _class_outputs(
    checkpoint: Checkpoint, options: ModelConfig, classifier: classifiers.Classifier
) -> dict[str, TaskOutput]:
    """Return `classify` and `token_classify`, as far as the head can do them, the one that it is made for first."""
    head, config = checkpoint.head, options.pooler_config
    steps = _steps(checkpoint, options)
    calibration = _calibration(checkpoint, options, classifier, steps)
    columns = head.columns or range(classifier.num_labels)
    _check_columns(checkpoint, config.returned_token_ids or (), columns)
    rates_inputs, rates_tokens = classifier.whole is not None, classifier.per_token
    if head.kind == "vocabulary":  # a language model's logits rate inputs, or else steps
        rates_inputs, rates_tokens = not steps.apply, steps.apply
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
            step=steps.apply,
            step_tag_id=steps.tag,
            returned=config.returned_token_ids,
        )
    if steps.apply or checkpoint.family.rates_tokens:
        return dict(reversed(outputs.items()))
    return outputs


def _calibration(
    checkpoint: Checkpoint, options: ModelConfig, classifier: classifiers.Classifier, steps: Steps
) -> Calibration:
    """Return the way from logits to values, by the pooler config, else by the checkpoint.

    A reward is a number and no probability; a step is rated by the softmax over its classes.
    """
    head, config = checkpoint.head, options.pooler_config
    activate = coalesce(config.use_activation, head.kind != "reward" or steps.apply)
    num_labels = len(config.returned_token_ids or range(classifier.num_labels))
    by_user = "problem_type" in overrides.mapping(options)
    activation, function = activation_of(checkpoint, num_labels, by_user=by_user)
    sigma = coalesce(config.logit_sigma, head.sigma)
    return Calibration(activation, activate, config.logit_mean or 0.0, sigma, function)


def _check_columns(checkpoint: Checkpoint, returned: Seq[int], columns: Seq[int]) -> None:
    """Refuse `returned` that are not among the `columns` of the head."""
    unknown = set(returned).difference(columns)
    if unknown:
        raise CheckpointError(
            f"pooler_config.returned_token_ids: {min(unknown)} is no column of {checkpoint.name}'s head"
        )


def _steps(checkpoint: Checkpoint, options: ModelConfig) -> Steps:
    """Return the STEP pooling that the options, or else the family, ask for.

    Raises:
        CheckpointError: neither does, but an option is about it, or the vocabulary lacks the family's step tag.
    """
    config, tag = options.pooler_config, checkpoint.family.step_tag
    usual = "ALL" if tag is None else "STEP"
    if (config.token_pooling or usual) != "STEP":
        _refuse(checkpoint, options, STEP_OPTIONS)
        return Steps(apply=False)
    if config.step_tag_id is not None or tag is None:
        return Steps(True, config.step_tag_id)
    tag_id = checkpoint.tokenizer.get_vocab().get(tag)
    if tag_id is None:
        raise CheckpointError(f"{checkpoint.name}: the vocabulary has no {tag!r}; set pooler_config.step_tag_id")
    return Steps(True, tag_id)


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


def _pooler(checkpoint: Checkpoint, model: PreTrainedModel, options: ModelConfig) -> Pooler:
    """Return the pooler.

    Each of its fields is as the pooler config says, else as Sentence-Transformers, else as the architecture.
    """
    config, st = options.pooler_config, checkpoint.st
    modes = st.modes or (architecture_pooling(model),)
    if config.sequence_pooling:
        modes = (MODE_OF_TYPE[config.sequence_pooling],)
    if st.steps and len(st.modes) not in (0, len(modes)):
        raise CheckpointError(
            f"the checkpoint's modules expect its own pooling, {'+'.join(st.modes)}; "
            f"{config.sequence_pooling} gives vectors of another size"
        )
    first, row = _projection(checkpoint, model, options, modes)
    width = row * len(modes)
    if st.steps and st.dimension:
        width = st.dimension
    activation = coalesce(config.use_activation, st.normalizes or not st.modes)
    pooling = () if config.sequence_pooling else _own_steps(checkpoint, model)
    return Pooler(modes, (*first, *pooling, *st.steps), activation, config.dimensions, width)


def _own_steps(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[Step, ...]:
    """Return the model's own pooler, if the checkpoint's files say that it makes the vector."""
    return (OwnPooler(model),) if checkpoint.st.has_own_pooler else ()


def _projection(
    checkpoint: Checkpoint, model: PreTrainedModel, options: ModelConfig, modes: tuple[str, ...]
) -> tuple[tuple[nn.Linear, ...], int]:
    """Return the layer of a family over hidden states, if it has one, and the size of its rows.

    Raises:
        CheckpointError: the layer, which comes before pooling, gives something else behind it.
    """
    projector = None if hasattr(model, "linear") else checkpoint.family.projector(checkpoint, options)
    if projector is None:
        return (), checkpoint.family.width(checkpoint)
    if len(modes) > 1 or modes[0] in NOT_LINEAR:
        raise CheckpointError(f"a projection of hidden states comes before pooling by {'+'.join(modes)}")
    return (projector,), projector.out_features


NOT_LINEAR = ("max",)
"""Pooling modes before which a projection gives something else than behind them."""
