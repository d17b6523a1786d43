"""From a checkpoint to Transformers' model with its weights.

A tensor that is missing or left over inside the backbone is an error.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from cenote.errors import CheckpointError
from cenote.models import (
    adapted,
    configs,
    leftovers,
    lora_changes,
    overrides,
    remote_code,
    renamed,
    sizes,
    stacked_lora,
    weights,
)
from cenote.models.leftovers import Misfits, Misshapen
from cenote.models.reading import about, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from cenote.config import ModelConfig
    from cenote.models.checkpoint import Checkpoint


def build(checkpoint: Checkpoint, options: ModelConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the backbone of `checkpoint`, or the model that holds it and its head, in eval mode on `device`.

    Raises:
        CheckpointError: weights are missing, read by nothing, of the wrong shape, or only there as pickles.
    """
    leftovers.check_names(checkpoint.name, checkpoint.tensors)
    model, misfits = _loaded(checkpoint, options, dtype)
    heads = set(chain.from_iterable(map(lora_changes.trained_heads, checkpoint.base.adapters)))
    num_labels = 0 if heads else _labels_of_head(checkpoint, misfits, options)
    if num_labels:
        checkpoint.config.num_labels = num_labels
        model, misfits = _loaded(checkpoint, options, dtype)
    misfits = misfits.without(
        of_model={*heads, *_fill_absent(checkpoint, model, misfits)},
        of_checkpoint={*stacked_lora.parts(misfits.unexpected), *_take_bias(checkpoint, model, misfits, options)},
    )
    needs_pooler = checkpoint.head.kind == "sequence" or checkpoint.st.has_own_pooler
    names = leftovers.Names(model, needs_pooler=needs_pooler)
    leftovers.check_tensors(
        checkpoint, names, misfits, read=checkpoint.family.tensors, only_embeds=options.convert == "embed"
    )
    leftovers.check_dtypes(checkpoint, names)
    for adapter in checkpoint.base.adapters:
        lora_changes.merge(model, adapter, checkpoint.audit, spares_head=options.convert == "embed")
    _check_values(checkpoint, model)
    on_device: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return on_device


def _loaded(checkpoint: Checkpoint, options: ModelConfig, dtype: torch.dtype) -> tuple[Any, Misfits]:
    """Return Transformers' model of `checkpoint`, and its report on tensors that did not fit."""
    import transformers

    place = leftovers.label_of(checkpoint.folder)
    with about(f"{place} of {checkpoint.name} as config.json describes it", content=checkpoint.config.to_dict):
        tensors = renamed.tensors(checkpoint.folder, checkpoint.config, pickles=options.reads_pickles)
        bounded = sizes.Bounded(configs.CONFIG, checkpoint.config.to_dict(), checkpoint.stored)
        with _quiet(), bounded, adapted.without_adapter(checkpoint.folder) as shown:
            kind = _auto_class(checkpoint, transformers)
            if tensors is not None:
                with torch.device("meta"):
                    kind = type(kind.from_config(checkpoint.config))
            model, report = kind.from_pretrained(
                shown if tensors is None else None,
                state_dict=tensors,
                config=checkpoint.config,
                dtype=dtype,
                trust_remote_code=options.trust_remote_code,
                use_safetensors=None if options.reads_pickles else True,
                weights_only=True,
                output_loading_info=True,
                key_mapping=stacked_lora.PLAIN,
                **checkpoint.st.transformer.init_kwargs,
                ignore_mismatched_sizes=True,  # `leftovers` refuses them by name; Transformers' error has no names
            )
    return model, Misfits(
        frozenset(report["missing_keys"]),
        frozenset(report["unexpected_keys"]),
        tuple(sorted(Misshapen(str(name), *shapes) for name, *shapes in report["mismatched_keys"])),
    )


def _check_values(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse weights with values that are not finite, but for those that the user lets go unread.

    Raises:
        CheckpointError: there are some.
    """
    label = leftovers.label_of(checkpoint.folder)
    plain = leftovers.Names(model, needs_pooler=True).plain
    files = {plain(name): tensor.file.name for name, tensor in checkpoint.stored.items()}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not checkpoint.audit.allows(label, name):
            weights.check_values(f"{files.get(plain(name), label)} of {checkpoint.name}", {name: weight})


def _fill_absent(checkpoint: Checkpoint, model: PreTrainedModel, misfits: Misfits) -> set[str]:
    """Set to zero the tensors that Transformers' class has and the checkpoint's code has not; return their names."""
    absent = remote_code.absent(checkpoint.config) & misfits.missing
    for name in absent:
        torch.nn.init.zeros_(model.get_parameter(name))
    return absent


def _take_bias(checkpoint: Checkpoint, model: Any, misfits: Misfits, options: ModelConfig) -> set[str]:
    """Give a score layer the bias that vLLM's conversion writes, and Transformers' class has not; return its name."""
    name = "score.bias"
    if checkpoint.head.kind != "sequence" or name not in misfits.unexpected:
        return set()
    bias = weights.tensors(checkpoint.folder, [name], pickles=options.reads_pickles)[name]
    model.score.bias = torch.nn.Parameter(bias.to(model.score.weight.dtype))
    return {name}


LABEL_KEYS = frozenset({"num_labels", "id2label", "label2id", "_num_labels"})
"""Keys by which a config says how many classes its head has."""


def _labels_of_head(checkpoint: Checkpoint, misfits: Misfits, options: ModelConfig) -> int:
    """Return the number of classes of the head's tensors, where the config says none and they have another; else 0."""
    if callable(options.hf_overrides) or checkpoint.head.kind not in ("sequence", "token"):
        return 0
    written = {*load(checkpoint.folder / "config.json"), *overrides.mapping(options)}
    sizes = {(*stored[:1], *built[:1]) for _, stored, built in misfits.misshapen}
    if written & LABEL_KEYS or len(sizes) != 1:
        return 0
    labels, *built = sizes.pop()
    return int(labels) if built == [checkpoint.config.num_labels] else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Run the block without Transformers' progress bars and its report on weights, which is checked here."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


AUTO_CLASSES = {
    "none": "AutoModel",
    "modules": "AutoModel",
    "reward": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "vocabulary": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "tokens": "AutoModelForMaskedLM",
}
"""Kinds of heads to the class that loads a checkpoint with one."""


def _auto_class(checkpoint: Checkpoint, transformers: Any) -> Any:
    """Return the class to load: of encoder-decoder models without a head the encoder alone.

    The config of an encoder that was saved by itself no longer says `is_encoder_decoder`.
    """
    config, kind = checkpoint.config, checkpoint.head.kind
    if checkpoint.family.model_class:
        return getattr(transformers, checkpoint.family.model_class)
    if kind in ("none", "modules"):
        mapping = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        name = mapping.get(config.model_type, "")
        if name.endswith("EncoderModel"):
            return getattr(transformers, name)
    if kind == "vocabulary" and getattr(config, "vision_config", None) is not None:
        return transformers.AutoModelForImageTextToText
    auto_map = getattr(config, "auto_map", None) or {}
    if auto_map and AUTO_CLASSES[kind] not in auto_map:
        raise CheckpointError(
            f"the code of {checkpoint.name} has {', '.join(auto_map)}, and {AUTO_CLASSES[kind]} is needed here; "
            "without --trust-remote-code Transformers' own class is asked for"
        )
    return getattr(transformers, AUTO_CLASSES[kind])
