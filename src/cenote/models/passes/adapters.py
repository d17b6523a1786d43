"""Task adapters: low-rank changes of a backbone's layers (LoRA, as PEFT saves it), one of which a sequence may choose.

Subfolders with an `adapter_config.json` hold them. The backbone's modules stay as they are: a forward hook adds the
active adapter's part to what a layer returns, and without an active adapter the backbone runs pure.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cenote.core import plain_name
from cenote.errors import BadRequest, CheckpointError, first_line
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, shortened_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.models.passes.subject import Subject

NAME = "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"}
    | {"lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
)
"""Entries that do not change the result; which modules have an adapter is read from its tensors."""
NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva")}
"""Values, besides empty ones, of entries that may change it: other initialisations change the backbone's weights."""
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")


def apply(subject: Subject) -> Outcome:
    """Hook the adapters in, and prove that the backbone without an active one is unchanged.

    Raises:
        CheckpointError: an adapter does not fit, or is of a kind that is not understood.
    """
    model, folders = subject.backbone, subject.settings.adapters
    if not folders:
        return Outcome()
    changes: dict[str, dict[str, Change]] = {}
    for name in sorted(folders):
        for path, change in _read(model, name, folders[name]).items():
            changes.setdefault(path, {})[name] = change
    for path, of_adapters in changes.items():
        subject.patches.hook(NAME, model.get_submodule(path), _hook(of_adapters))
    with shortened_windows(model):
        fault = fault_of(partial(subject.probe.fault, subject.layout))
    if fault:
        raise CheckpointError(f"{type(model).__name__} with adapters, of which none is active: {fault}")
    subject.adapters = tuple(sorted(folders))
    return Outcome()


def undo(subject: Subject) -> None:
    """Take the adapters away."""
    subject.patches.remove(NAME)
    subject.adapters = ()


class Change(NamedTuple):
    """The term that an adapter adds to the output of a module: `b(a(x))`.

    Attributes:
        a: `[R, in]` of a Linear, `[V, R]` of an Embedding.
        b: `[R, out]`, with the scale in it.
    """

    a: Tensor
    b: Tensor


def find(folders: Iterable[Path]) -> dict[str, Path]:
    """Find the adapters below `folders` and below their `adapters`, and return the folder of each by its name.

    Raises:
        CheckpointError: two have names that requests could not tell apart.
    """
    paths: dict[str, Path] = {}
    names: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        for file in sorted([*folder.glob(f"*/{CONFIG}"), *folder.glob(f"adapters/*/{CONFIG}")]):
            name = file.parent.name
            same = names.setdefault(plain_name(name), name)
            if paths.setdefault(same, file.parent) != file.parent:
                raise CheckpointError(f"the adapters {same!r} and {name!r} have the same name")
    return paths


_ACTIVE: ContextVar[str | None] = ContextVar("cenote_adapter", default=None)
"""Name of the adapter of the forward under way."""


@contextmanager
def active(name: str | None, names: tuple[str, ...]) -> Iterator[None]:
    """Run the forwards within with the adapter `name`; `None` = with none.

    Raises:
        BadRequest: it is not one of `names`.
    """
    if name is not None and name not in names:
        raise BadRequest(f"unknown adapter {name!r}. Supported values: {', '.join(names) or 'none'}")
    token = _ACTIVE.set(name)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _hook(changes: Mapping[str, Change]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that adds the change of the active adapter, by its name."""

    def add(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        change = changes.get(_ACTIVE.get() or "")
        if change is None:
            return y
        low = F.embedding(args[0], change.a) if isinstance(module, nn.Embedding) else F.linear(args[0], change.a)
        rows = y.view(-1, y.shape[-1])  # a layer's new output is nobody else's yet
        rows.addmm_(low.reshape(rows.shape[0], -1), change.b)
        return y

    return add


def _read(model: PreTrainedModel, name: str, folder: Path) -> dict[str, Change]:
    """Read the changes of the adapter in `folder`, by the path of the module."""
    config = _config(name, folder)
    modules = dict(model.named_modules())
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors(name, folder).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"adapter {name!r} has a tensor that is no part of LoRA: {key}")
        named, of_linear, of_embedding = match.groups()
        path = named if named in modules else named.removeprefix(f"{model.base_model_prefix}.")
        kind = nn.Linear if of_linear else nn.Embedding
        if type(modules.get(path)) is not kind:
            raise CheckpointError(f"adapter {name!r} changes {named}, which is no {kind.__name__} of the model")
        halves.setdefault(path, {})[of_linear or of_embedding] = tensor
    if not halves:
        raise CheckpointError(f"adapter {name!r} changes nothing: {WEIGHTS} is empty")
    return {path: _change(name, path, modules[path], pair, config) for path, pair in halves.items()}


def _tensors(name: str, folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"adapter {name!r} has no {WEIGHTS}")
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {WEIGHTS} of adapter {name!r}: {first_line(error)}") from error


def _change(name: str, path: str, module: nn.Module, halves: Mapping[str, Tensor], config: Mapping[str, Any]) -> Change:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    out, into = reversed(weight.shape) if isinstance(module, nn.Embedding) else weight.shape
    rank = _of_pattern(config.get("rank_pattern"), path, config["r"])
    shapes = {half: tuple(tensor.shape) for half, tensor in sorted(halves.items())}
    if shapes != {"A": (rank, into), "B": (out, rank)}:
        raise CheckpointError(
            f"adapter {name!r} does not fit {path}: its shapes are {shapes}, expected A {(rank, into)} and "
            f"B {(out, rank)}"
        )
    scale = _of_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    scale /= rank**0.5 if config.get("use_rslora") else rank
    a = halves["A"].t() if isinstance(module, nn.Embedding) else halves["A"]
    b = halves["B"].float().t() * scale
    return Change(*(half.to(weight.device, weight.dtype).contiguous() for half in (a, b)))


def _config(name: str, folder: Path) -> dict[str, Any]:
    """Return the adapter's settings, all of which are understood."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {CONFIG} of adapter {name!r}: {first_line(error)}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise CheckpointError(f"adapter {name!r} is of the type {kind}; only LORA is supported")
    for key in sorted(config.keys() - READ - WITHOUT_EFFECT):
        value = config[key]
        if value and value not in NEUTRAL.get(key, ()):
            raise CheckpointError(f"adapter {name!r} has {key} {value!r}, which is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    is_rank = isinstance(rank, int) and rank >= 1
    if not is_rank or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"adapter {name!r} has r {rank!r} and lora_alpha {alpha!r}, expected two numbers")
    return config


def _of_pattern(pattern: Mapping[str, float] | None, path: str, default: float) -> float:
    """Return the entry of `pattern` for a module; its keys are regular expressions of the ends of paths."""
    return next((v for key, v in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", path)), default)
