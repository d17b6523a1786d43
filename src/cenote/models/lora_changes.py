"""The changes of a LoRA adapter to the modules of a model, read from its tensors.

Its settings say by how much each module is changed. All changes of a layer's output are one affine step,
`y * factor + shift + b(a(x))`, so that they can be merged into weights or added to the output of a layer:

- LoRA: `b` has the scale in it;
- biases of LoRA's own and trained biases of the layer: `shift`;
- DoRA: the rows of `W + BA` are divided by their norms and multiplied by trained magnitudes, which is `factor`.

Modules that were trained whole, as new heads are, are replaced.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from cenote.functions import coalesce
from cenote.models import weights
from cenote.models.lora import CONFIG, HEADS_OF_TASKS, WEIGHTS
from cenote.models.reading import about

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.models.audit import Audit
    from cenote.models.lora import Adapter


EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "tok_embeddings", "lm_head", "embed_out", "shared")
"""Modules whose whole weights PEFT saves, if the vocabulary was enlarged."""
NOT_RUN = frozenset({"lm_head", "embed_out", "cls", "generator_lm_head", "qa_outputs", "pooler"})
"""Heads and poolers of the class that was trained, which a model may lack because it does not run them."""

LOW_RANK = re.compile(
    r"(?P<path>.+)\.(?:lora_(?P<part>[AB])\.(?P<kind>weight|bias)|lora_embedding_(?P<half>[AB])|"
    r"lora_magnitude_vector(?:\.weight)?)"
)


class LowRank(NamedTuple):
    """The term `b(a(x))`.

    Attributes:
        a: `[in, R]`, of an Embedding `[V, R]`.
        b: `[R, out]`, with the scale in it.
    """

    a: Tensor
    b: Tensor


class Change(NamedTuple):
    """A change of a module's output `y`, to `y * factor + shift + b(a(x))`; each part is `None` if there is none.

    Attributes:
        low: of low rank.
        factor: `[out]`.
        shift: `[out]`.
    """

    low: LowRank | None = None
    factor: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class Changes:
    """All changes of one adapter, by the path of the module in the model.

    Attributes:
        outputs: changes of outputs.
        whole: tensors of modules that were trained whole, by their names in the module.
    """

    outputs: dict[str, Change]
    whole: dict[str, dict[str, Tensor]]


@dataclass
class _Parts:
    """Tensors of one module in the adapter's file.

    Attributes:
        named: the module's path in the model that was trained.
        low_rank: `A`, `B`, and if there are some, `B.bias` and `magnitude`.
        bias: the trained bias of the module itself.
    """

    named: str
    low_rank: dict[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None


def changes(model: PreTrainedModel, adapter: Adapter, audit: Audit, *, spares_head: bool = False) -> Changes:
    """Read the changes of `adapter` to the modules of `model`.

    Args:
        model: with its head, if it has one.
        adapter: its settings are read.
        audit: gets all its tensors.
        spares_head: a classification head that the model has not is left out.

    Raises:
        CheckpointError: the tensors cannot be read, do not fit, or are not honoured.
    """
    with about(adapter.file):
        return _Reader(model, adapter, audit, spares_head).changes()


class _Reader:
    """Reads the tensors of one adapter for one model."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, audit: Audit, spares_head: bool) -> None:
        self._model = model
        self._not_run = NOT_RUN.union(*HEADS_OF_TASKS.values()) if spares_head else NOT_RUN
        self._adapter = adapter
        self._audit = audit
        self._modules = dict(model.named_modules())
        self._parts: dict[str, _Parts] = {}
        self._whole: dict[str, dict[str, Tensor]] = {}

    def changes(self) -> Changes:
        """Sort all tensors, and return the changes that they make."""
        file = self._adapter.file
        if not file.is_file():
            raise self._adapter.fault(f"has no {WEIGHTS}")
        tensors = weights.read(file)
        place = self._adapter.place + file.name
        weights.check_values(place, tensors)
        unread = [key for key, tensor in tensors.items() if not self._sort(key, tensor)]
        remedy = f"the target_modules and modules_to_save in {CONFIG} name no such layers, so PEFT does not read it"
        self._audit.refuse(place, unread, remedy, noun="the tensor")
        outputs = {path: self._change(path, parts) for path, parts in self._parts.items()}
        if not outputs and not self._whole:
            raise self._adapter.fault(f"changes nothing: {file.name} has no tensors of layers that this model runs")
        self._check_ties([*outputs, *self._whole])
        kinds = dict.fromkeys(path.rpartition(".")[2] for path in (*outputs, *self._whole))
        self._audit.use(place, *kinds)
        return Changes(outputs, self._whole)

    def _sort(self, key: str, tensor: Tensor) -> bool:
        """Put a tensor where it belongs; returns whether anything reads it."""
        key = key.removeprefix("base_model.model.")
        match = LOW_RANK.fullmatch(key)
        if match:
            return self._sort_low_rank(match, tensor)
        key = re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", key)
        named, _, entry = key.rpartition(".")
        if self._is_whole(named, entry):
            path = self._path(named, key)
            if path is not None:
                self._whole.setdefault(path, {})[entry] = tensor
            return True
        if entry != "bias" or self._adapter.settings.bias == "none":
            return False
        self._parts_of(named, key).bias = tensor
        return True

    def _is_whole(self, named: str, entry: str) -> bool:
        """Return whether a tensor takes the place of the model's own."""
        if entry == "weight" and named.rpartition(".")[2] in EMBEDDINGS:
            return True
        return self._adapter.settings.trains_whole(named)

    def _sort_low_rank(self, match: re.Match[str], tensor: Tensor) -> bool:
        named = match["path"]
        if not self._adapter.settings.targets(named):
            return False
        part = match["half"] or match["part"] or "magnitude"
        name = f"{part}.bias" if match["kind"] == "bias" else part
        self._parts_of(named, match.string).low_rank[name] = tensor
        return True

    def _parts_of(self, named: str, key: str) -> _Parts:
        """Return the tensors of a module so far; of a head that is not run, some that are not kept."""
        path = self._path(named, key)
        return _Parts(named) if path is None else self._parts.setdefault(path, _Parts(named))

    def _path(self, named: str, key: str) -> str | None:
        """Return the path in this model of a module of the trained one; `None` if it is part of a head that is not run.

        Raises:
            CheckpointError: the model has no such module, and it is no part of a head.
        """
        prefix = f"{self._model.base_model_prefix}."
        for path in (named, prefix + named, named.removeprefix(prefix)):
            if path in self._modules:
                return path
        if not self._not_run.isdisjoint(named.split(".")):
            place = self._adapter.place + self._adapter.file.name
            self._audit.leave(place, [key], f"{type(self._model).__name__} has no such module, nor runs it")
            return None
        raise self._adapter.fault(f"changes {named}, which {type(self._model).__name__} has not{self._hint(named)}")

    def _hint(self, named: str) -> str:
        """Return the remedy for a head that the model lacks, if it is one."""
        is_head = not set(named.split(".")).isdisjoint(HEADS_OF_TASKS["SEQ_CLS"])
        return "; a head of an adapter needs a base with a head of the same kind" if is_head else ""

    def _change(self, path: str, parts: _Parts) -> Change:
        """Return the change of one module."""
        module = self._modules[path]
        change = self._low_rank(path, parts, module) if parts.low_rank else Change()
        if parts.bias is None:
            return change
        bias = getattr(module, "bias", None)
        if not isinstance(bias, torch.Tensor) or bias.shape != parts.bias.shape:
            raise self._adapter.fault(f"has a bias of {path}, which has none of this shape {tuple(parts.bias.shape)}")
        shift = parts.bias.to(device_of(bias), torch.float32) - bias.float()
        return change._replace(shift=shift if change.shift is None else change.shift + shift)

    def _low_rank(self, path: str, parts: _Parts, module: nn.Module) -> Change:
        """Return the low-rank change of one module, in float32."""
        if type(module).__name__ not in ("Linear", "Conv1D", "Embedding"):
            raise self._adapter.fault(
                f"changes {path}, a {type(module).__name__}; only Linear, Conv1D and Embedding can be changed"
            )
        settings, weight = self._adapter.settings, _columns(module)
        self._check_shapes(path, parts, module)
        scale = settings.scale(parts.named)
        halves = {name: tensor.to(device_of(weight), torch.float32) for name, tensor in parts.low_rank.items()}
        change = Change(LowRank(halves["A"].t(), halves["B"].t() * scale))
        if settings.lora_bias and "B.bias" in halves:
            change = change._replace(shift=halves["B.bias"] * scale)
        if not settings.use_dora:
            return change
        if weight.is_meta:
            raise self._adapter.fault(
                f"needs the weight of {path} (DoRA), which is packed by now; name it at load (lora_modules)"
            )
        return _with_norms(change, halves["magnitude"], module)

    def _check_shapes(self, path: str, parts: _Parts, module: nn.Module) -> None:
        """Refuse tensors that do not fit the layer at `path`."""
        settings, (out, into) = self._adapter.settings, _columns(module).shape
        rank = settings.rank(parts.named)
        expected: dict[str, tuple[int, ...]] = {"A": (rank, into), "B": (out, rank)}
        if settings.lora_bias and type(module) is not nn.Embedding:
            expected["B.bias"] = (out,)
        if settings.use_dora:
            expected["magnitude"] = (out,)
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(parts.low_rank.items())}
        if shapes != expected:
            raise self._adapter.fault(
                f"does not fit {path}: its shapes in {self._adapter.file.name} are {shapes}, expected {expected} by "
                f"the r of {CONFIG}"
            )

    def _check_ties(self, paths: Iterable[str]) -> None:
        """Refuse a change of weights that were tied in training and are tied here."""
        if not self._adapter.settings.ensure_weight_tying:
            return
        counts = Counter(id(weight) for module in self._model.modules() for weight in module._parameters.values())
        changed = [path for path in paths if counts[id(getattr(self._modules[path], "weight", None))] > 1]
        if changed:
            remedy = f"{changed[0]} shares its weight with another layer, and both would have to change"
            self._audit.refuse(self._adapter.place + CONFIG, ["ensure_weight_tying"], remedy)


def _with_norms(change: Change, magnitude: Tensor, module: nn.Module) -> Change:
    """Return `change` with rows of the changed weight divided by their norms and multiplied by `magnitude` `[out]`.

    The layer's own bias stays as it is.
    """
    assert change.low is not None
    low = change.low
    factor = magnitude / torch.linalg.vector_norm(_columns(module).float() + (low.a @ low.b).t(), dim=1)
    bias, shift = getattr(module, "bias", None), torch.zeros_like(factor)
    if change.shift is not None:
        shift = change.shift * factor
    if isinstance(bias, torch.Tensor):
        shift = shift + bias.float() * (1 - factor)
    return Change(LowRank(low.a, low.b * factor), factor, shift)


def device_of(weight: Tensor) -> torch.device:
    """Return the device that a layer runs on: weights that are packed for a CPU leave nothing behind."""
    return torch.device("cpu") if weight.is_meta else weight.device


def _columns(module: nn.Module) -> Tensor:
    """Return the weight of a layer as `[out, in]`, of an Embedding `[D, V]`."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight if type(module) is nn.Linear else weight.t()


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter, audit: Audit, *, spares_head: bool = False) -> None:
    """Make an adapter part of the weights of `model`; see `changes`.

    A weight that several modules hold is changed in those alone that the adapter names, as PEFT does.

    Raises:
        CheckpointError: see `changes`.
    """
    of_adapter = changes(model, adapter, audit, spares_head=spares_head)
    for path, tensors in of_adapter.whole.items():
        replace_whole(model.get_submodule(path), path, tensors, adapter)
    for path, change in of_adapter.outputs.items():
        module = model.get_submodule(path)
        _merge_weight(module, change)
        _merge_bias(module, change)


def _merge_weight(module: nn.Module, change: Change) -> None:
    if change.low is None:
        return
    columns = _columns(module).float()
    if change.factor is not None:
        columns = columns * change.factor[:, None]
    merged = columns + (change.low.a @ change.low.b).t()
    _set(module, "weight", merged if type(module) is nn.Linear else merged.t())


def _merge_bias(module: nn.Module, change: Change) -> None:
    if change.shift is None:
        return
    current = getattr(module, "bias", None)
    bias = coalesce(current, torch.zeros_like(change.shift)).float()
    if change.factor is not None:
        bias = bias * change.factor
    _set(module, "bias", bias + change.shift)


def replace_whole(module: nn.Module, path: str, tensors: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Give a module the tensors with which it was trained whole.

    Raises:
        CheckpointError: it has no tensors of these names and shapes.
    """
    for name, tensor in tensors.items():
        shape = getattr(module._parameters.get(name), "shape", None)
        if shape != tensor.shape:
            raise adapter.fault(f"has {path}.{name} of shape {tuple(tensor.shape)}, and the model's is {shape}")
        _set(module, name, tensor)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Give `module` a new parameter, of the weight's dtype: other modules that hold the old one keep it."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    value = value.to(device_of(weight), weight.dtype).contiguous()
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def trained_heads(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of heads that were trained whole, by their names in the model."""
    names = set(HEADS_OF_TASKS.get(adapter.settings.task_type, ()))
    shapes = {key.removeprefix("base_model.model."): tensor.shape for key, tensor in weights.read(adapter.file).items()}
    return {
        key: tuple(shape)
        for key, shape in shapes.items()
        if not LOW_RANK.fullmatch(key) and not names.isdisjoint(key.split("."))
    }
