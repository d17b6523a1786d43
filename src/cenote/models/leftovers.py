"""Tensors of a checkpoint besides the model's: those of families, those without effect, and those that nobody reads.

Transformers says after loading which tensors are missing, left over or of another shape. Every tensor is entered into
the audit here: used, left with the reason, or refused by name.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from cenote.errors import CheckpointError
from cenote.models import sizes
from cenote.models.audit import reason_in, shortened

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from cenote.models.facts import Files

BUFFER = "the model computes it"
LANGUAGE_MODEL = "its language-model head predicts tokens; hidden states are taken before it"
MASKED = "its masked-language-model head predicts tokens; hidden states are taken before it"
PRETRAINING = "a head of the training alone"

# fmt: off
BUFFERS: dict[str, str] = dict.fromkeys((
    "*position_ids", "*token_type_ids", "*inv_freq", "*.attn.bias", "*.attn.masked_bias", "*attention.bias",
    "*attention.masked_bias", "*rotary_emb.cos_cached", "*rotary_emb.sin_cached",
), BUFFER)
"""Names of buffers that old checkpoints carry, with the reason: a model may lack them, too."""

IDLE: dict[str, str] = {
    **BUFFERS,
    **dict.fromkeys(("*lm_head.*", "lm_head", "embed_out.*", "lm_loss.*", "*output_layer.*"), LANGUAGE_MODEL),
    **dict.fromkeys((
        "cls.predictions.*", "predictions.*", "generator_predictions.*", "generator_lm_head.*", "vocab_transform.*",
        "vocab_layer_norm.*", "vocab_projector.*", "lm_predictions.*", "mask_predictions.*", "pred_layer.*",
        "head.dense.weight", "head.dense.bias", "head.norm.weight", "head.norm.bias", "decoder.weight", "decoder.bias",
        "mlm_head.*", "mlm_predictions.*",
    ), MASKED),
    **dict.fromkeys((
        "cls.seq_relationship.*", "sop_classifier.*", "discriminator_predictions.*", "contact_head.*", "mtp.*",
        "final_logits_bias",
    ), PRETRAINING),
}
# fmt: on
"""Names of tensors of published checkpoints that change no answer, with the reason: buffers that old ones carry, and
heads beside the backbone."""

SHOWN = 3
"""Most names that a message lists."""

DECODER = "the encoder runs alone"
POOLER = "no task pools by it"
PASSED_OVER = "Transformers' class has no place for it, and passes over it"

LAYER = re.compile(r".*?\.\d+(?=\.)|.*")
"""The beginning of a tensor's name up to the first number; the whole name if it has none."""

TWINS = {
    "_orig_mod.": "torch.compile puts it there; save `model._orig_mod` or take it off the names",
    "base_model.model.": "PEFT puts it there; save what its `merge_and_unload` returns",
    "module.": "DataParallel and DDP put it there; save `model.module` or take it off the names",
}
"""Prefixes that wrappers of a model put before the names of all tensors, with the remedy."""


def check_names(name: str, tensors: Collection[str]) -> None:
    """Refuse a checkpoint that was saved with a wrapper around its model.

    Raises:
        CheckpointError: the names of all tensors begin with a prefix of `TWINS`.
    """
    common = os.path.commonprefix(list(tensors))  # noqa: RUF071 (of dotted names, not of paths)
    for prefix, remedy in TWINS.items():
        if common.startswith(prefix):
            raise CheckpointError(
                f"{name}: the names of all weights begin with {prefix!r}, expected those of the model; {remedy}"
            )


class Misshapen(NamedTuple):
    """A tensor of another shape than its model's.

    Attributes:
        name: in the model.
        stored: its shape.
        built: that of the model's.
    """

    name: str
    stored: tuple[int, ...]
    built: tuple[int, ...]


@dataclass(frozen=True)
class Misfits:
    """The tensors of a checkpoint and of its model that do not fit, as Transformers reports them.

    Attributes:
        missing: names of those of the model that the checkpoint has not.
        unexpected: names of those of the checkpoint that the model has not.
        misshapen: those of other shapes, by name.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    misshapen: tuple[Misshapen, ...]

    def without(self, *, of_model: Collection[str], of_checkpoint: Collection[str]) -> Misfits:
        """Return the others than these, which are accounted for: names in the model, and in the checkpoint."""
        return Misfits(
            self.missing.difference(of_model),
            self.unexpected.difference(of_checkpoint),
            tuple(entry for entry in self.misshapen if entry.name not in of_model),
        )


@dataclass(frozen=True)
class Names:
    """Names of tensors as a model sees them: without the prefix of a backbone that was saved with its head.

    Attributes:
        model: the backbone, or the model that holds it and its head.
        needs_pooler: its head runs the pooler.
    """

    model: PreTrainedModel
    needs_pooler: bool

    def plain(self, name: str) -> str:
        """Return a name without the prefix of the backbone."""
        return name.removeprefix(f"{self.model.base_model_prefix}.")

    def module(self, name: str) -> str:
        """Return the module of a tensor as the audit lists it: the first part of its name."""
        return self.plain(name).partition(".")[0]

    @cached_property
    def modules(self) -> frozenset[str]:
        """Names of the modules of the model and of its backbone."""
        children = chain(self.model.named_children(), self.model.base_model.named_children())
        return frozenset(dict(children))

    def layer(self, name: str) -> str:
        """Return the beginning of a tensor's name that is its layer; the whole name if it is in none."""
        layer = LAYER.match(self.plain(name))
        assert layer is not None
        return layer[0]

    @cached_property
    def layers(self) -> frozenset[str]:
        """The layers of the model, and the names of its tensors outside of any."""
        return frozenset(map(self.layer, self.model.state_dict()))

    def is_passed_over(self, name: str) -> bool:
        """Return whether Transformers passes over a tensor or a layer that the model lacks, without a word.

        In a layer that it has, tensors of other names become its own: matrices of experts are joined.
        """
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return self.layer(name) not in self.layers and any(re.search(pattern, name) for pattern in patterns)

    def listed(self, name: str) -> str:
        """Return the entry of the audit that a tensor is in: its module, or one layer of that, which is left alone."""
        module = self.module(name)
        return self.layer(name) if module in self.modules and self.is_passed_over(name) else module

    def is_needed(self, name: str) -> bool:
        """Return whether the model cannot do without a tensor of its own: a head that runs is no leftover."""
        idle = BUFFERS if self.needs_pooler else {**BUFFERS, "*pooler.*": POOLER}
        return self.module(name) in self.modules and not reason_in(idle, self.plain(name))

    def is_foreign(self, name: str) -> bool:
        """Return whether a tensor that the model lacks would belong to one of its modules and change its results."""
        return self.module(name) in self.modules and not self.reason(name)

    def reason(self, name: str) -> str:
        """Return why a tensor changes no answer; empty if that is not known."""
        plain = self.plain(name)
        if "pooler." in plain:
            return "" if self.needs_pooler else POOLER
        if plain.startswith("decoder.") and type(self.model).__name__.endswith("EncoderModel"):
            return DECODER
        return reason_in(IDLE, plain)


def check_tensors(files: Files, names: Names, misfits: Misfits, *, read: Collection[str], only_embeds: bool) -> None:
    """Enter all tensors of a checkpoint into its audit.

    Args:
        files: of the checkpoint.
        names: by the model with its weights.
        misfits: those that nothing has accounted for.
        read: names of the tensors that a family reads besides the model.
        only_embeds: the user wants the hidden states, so heads that are not known are left out.

    Raises:
        CheckpointError: the model lacks tensors, or the checkpoint has some that nothing reads.
    """
    _check_fit(files, names, misfits)
    default = _reason_of_all(files, only_embeds=only_embeds)
    reasons: dict[str, str | None] = {names.plain(name): names.reason(name) or default for name in misfits.unexpected}
    reasons |= dict.fromkeys(map(names.plain, read))
    files.audit.enter(
        label_of(files.folder),
        {name: _reason_to_leave(names, name, reasons) for name in files.tensors},
        f"the class that runs has no such weights; architectures in config.json is {files.architecture!r}. "
        "--convert embed leaves them out and serves the hidden states",
        noun="the tensor",
        listed=names.listed,
    )


def _reason_to_leave(names: Names, name: str, reasons: Mapping[str, str | None]) -> str | None:
    """Return why a tensor is left, empty if nobody knows; `None` = it is read, by the model or a family.

    Transformers passes over some tensors without a word: those are not among `reasons`, its own and the family's.
    Others that the model lacks by their name become some of its own.
    """
    plain = names.plain(name)
    if plain in reasons:
        return reasons[plain]
    is_elsewhere = "pooler." in plain or names.module(plain) not in names.modules
    reason = names.reason(plain) if is_elsewhere else ""
    if not reason and names.is_passed_over(name):
        return PASSED_OVER
    return reason or None


def _check_fit(files: Files, names: Names, misfits: Misfits) -> None:
    """Refuse weights that are missing, unknown or of another shape in the modules of the model."""
    faults = {
        "lacks": filter(names.is_needed, misfits.missing),
        "has unknown": filter(names.is_foreign, misfits.unexpected),
        "has misshapen": (entry.name for entry in misfits.misshapen),
    }
    for verb, tensors in faults.items():
        faulty = sorted(tensors)
        if faulty:
            label = label_of(files.folder)
            shape = _shape(files, misfits.misshapen[0]) if verb == "has misshapen" else ""
            shown = shortened(faulty, SHOWN)
            raise CheckpointError(
                f"{files.name} {verb} weights for {type(names.model).__name__}: {shown}, in {label}; "
                f"{shape}{_cause(names.model, verb, faulty)}"
            )


def _shape(files: Files, misshapen: Misshapen) -> str:
    """Return how the shape of a tensor differs, and the keys of the config that may say so."""
    name, stored, built = misshapen
    by = sizes.keys_of(files.config.to_dict(), {*built} - {*stored})
    return f"{name} is {list(stored)}, and {list(built)} by config.json{by}; "


def check_dtypes(files: Files, names: Names) -> None:
    """Refuse weights that are stored as integers or truth values where the model computes with floating-point numbers.

    Raises:
        CheckpointError: there are some.
    """
    floating = {names.plain(name) for name, weight in names.model.named_parameters() if weight.is_floating_point()}
    for name, tensor in files.stored.items():
        if names.plain(name) in floating and not tensor.is_floating:
            raise CheckpointError(
                f"{tensor.file.name} of {files.name}: {name} is {tensor.dtype}, expected floating-point numbers; "
                "download it again, or save it from a model"
            )


def _cause(model: PreTrainedModel, verb: str, faulty: list[str]) -> str:
    """Return the likely cause of weights that do not fit."""
    beside = dict(model.named_children()).keys() - {model.base_model_prefix}
    is_headless = model.base_model is not model and beside >= {name.partition(".")[0] for name in faulty}
    if verb == "lacks" and is_headless:
        return (
            "the checkpoint was saved without its head, or with one of another name; "
            "--convert embed serves its hidden states"
        )
    return "config.json names another architecture or other sizes than the weights have"


def _reason_of_all(files: Files, *, only_embeds: bool) -> str:
    """Return why tensors of an unknown head change no answer; empty if they might.

    Sentence-Transformers runs a class of Transformers' without its head, and its modules over the hidden states.
    """
    if only_embeds:
        return "left out by --convert embed"
    has_modules = bool(files.st.modes or files.st.special)
    if has_modules and not getattr(files.config, "auto_map", None):
        return "its Sentence-Transformers modules take the hidden states"
    return ""


def label_of(folder: Path) -> str:
    """Return the name by which the audit lists tensors: the file of weights, or a pattern of several."""
    names = sorted(path.name for path in folder.glob("*.safetensors")) or ["pytorch_model.bin"]
    return names[0] if len(names) == 1 else "*.safetensors"
