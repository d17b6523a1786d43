"""The adapters of a loaded model, one of which a sequence may choose: forward hooks of its modules.

The modules stay as they are. A hook adds the active adapter's change to the output of a layer, or runs a module that
was trained whole instead; without an active adapter the model runs pure.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from cenote.errors import BadRequest
from cenote.functions import optional
from cenote.models import lora_changes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.models.audit import Audit
    from cenote.models.lora import Adapter
    from cenote.models.lora_changes import Change
    from cenote.models.passes.patches import Hook, Patches

NAME = "adapters"
HOOKED = frozenset({"Linear", "Conv1D", "Embedding", "LayerNorm"})
"""Classes of modules whose outputs hooks can change as a change of their parameters would."""


class Shelf:
    """The adapters that are hooked into a model.

    Args:
        full: the model with its head, if it has one.
        backbone: without it.
        patches: the record of hooks.

    Attributes:
        names: of the adapters.
        is_reserved: every layer that an adapter may change is hooked, so that adapters can be added when passes have
            changed the others.
    """

    def __init__(self, full: PreTrainedModel, backbone: PreTrainedModel, patches: Patches) -> None:
        self.names: tuple[str, ...] = ()
        self.is_reserved = False
        self._full = full
        self._has_head = full is not backbone
        self._patches = patches
        self._of_modules: dict[str, dict[str, Change | nn.Module]] = {}

    def reserve(self) -> None:
        """Hook every layer that a later adapter may change, so that no pass replaces it."""
        for path, module in self._full.named_modules():
            if type(module).__name__ in HOOKED:
                self._hooked(path)
        self.is_reserved = True

    def add(self, adapter: Adapter, audit: Audit) -> None:
        """Hook an adapter in.

        Raises:
            CheckpointError: it does not fit.
        """
        changes = lora_changes.changes(self._full, adapter, audit)
        parts: dict[str, Change | nn.Module] = {
            path: _ready(self._changed(path, adapter), change) for path, change in changes.outputs.items()
        }
        for path, tensors in changes.whole.items():
            trained = _twin(self._changed(path, adapter))
            lora_changes.replace_whole(trained, path, tensors, adapter)
            parts[path] = trained
        for path, part in parts.items():
            self._hooked(path)[adapter.name] = part
        self.names = (*self.names, adapter.name)

    def _changed(self, path: str, adapter: Adapter) -> nn.Module:
        """Return the module at `path`, which `adapter` changes.

        Raises:
            CheckpointError: hooks cannot change its output as the adapter does.
        """
        module = self._full.get_submodule(path)
        if self._has_head and path.startswith(f"{self._full.base_model_prefix}.pooler."):
            raise adapter.fault(f"changes {path}, of which the head runs a copy; merge it into the model's weights")
        if type(module).__name__ not in HOOKED:
            raise adapter.fault(
                f"changes {path}, a {type(module).__name__}; only Linear, Conv1D, Embedding and LayerNorm can be "
                "changed by an adapter that requests choose; merge it into the model's weights"
            )
        return module

    def _hooked(self, path: str) -> dict[str, Change | nn.Module]:
        """Return the changes of the module at `path` by adapter, which its hook reads."""
        if path not in self._of_modules:
            self._of_modules[path] = {}
            self._patches.hook(NAME, self._full.get_submodule(path), _hook(self._of_modules[path]))
        return self._of_modules[path]


def _twin(module: nn.Module) -> nn.Module:
    """Return a module with the same parameters, the forward of its class, and no hooks."""
    twin = copy.copy(module)
    vars(twin).pop("forward", None)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._forward_hooks, twin._forward_hooks_with_kwargs = OrderedDict(), OrderedDict()
    return twin


def _ready(module: nn.Module, change: Change) -> Change:
    """Return `change` on the device and in the dtype of a module."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)

    def ready(tensor: Tensor) -> Tensor:
        return tensor.to(lora_changes.device_of(weight), weight.dtype).contiguous()

    low, factor, shift = change
    return lora_changes.Change(
        None if low is None else lora_changes.LowRank(*map(ready, low)),
        optional(ready, factor),
        optional(ready, shift),
    )


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


def _hook(of_adapters: Mapping[str, Change | nn.Module]) -> Hook:
    """Return a forward hook that makes the change of the active adapter, by its name."""

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        part = of_adapters.get(_ACTIVE.get() or "")
        if part is None:
            return y
        if isinstance(part, nn.Module):
            trained: Tensor = part(*args, **kwargs)
            return trained
        return _changed(module, part, y, *args, **kwargs)

    return run


def _changed(module: nn.Module, change: Change, y: Tensor, x: Tensor) -> Tensor:
    """Change the output `y` of a module in place: it is new, and nobody else's yet."""
    rows = y.view(-1, y.shape[-1])
    if change.factor is not None:
        rows.mul_(change.factor)
    if change.shift is not None:
        rows.add_(change.shift)
    if change.low is not None:
        a, b = change.low
        low = F.embedding(x, a) if isinstance(module, nn.Embedding) else x @ a
        rows.addmm_(low.reshape(rows.shape[0], -1), b)
    return y
