"""The record of forwards that passes have put in place of modules' own."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    Forwards = dict[nn.Module, Callable[..., Any]]
    Hook = Callable[[Any, Any, Any, Any], Any]
    """`(module, args, kwargs, output) -> output`."""


class Patches:
    """The forwards and hooks that passes have given to the modules of a model.

    Passes change a model through this record only, each under its name, so that one finds the changes of another and
    can take its own back. Forwards and hooks that were there before belong to no pass.
    """

    def __init__(self) -> None:
        self._forwards: dict[nn.Module, tuple[str, Callable[..., Any]]] = {}
        self._hooks: defaultdict[str, list[RemovableHandle]] = defaultdict(list)

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Return whether `module` has another forward than its class."""
        return "forward" in vars(module)

    def is_free(self, module: nn.Module) -> bool:
        """Return whether `module` has the forward of its class and no hooks."""
        return not (self.replaces(module) or module._forward_hooks or module._forward_pre_hooks)

    def of(self, owner: str) -> Forwards:
        """Return the forwards of a pass, by module."""
        return {module: forward for module, (name, forward) in self._forwards.items() if name == owner}

    def put(self, owner: str, forwards: Mapping[nn.Module, Callable[..., Any]]) -> None:
        """Make these the forwards of a pass, in place of its earlier ones. Those of other passes give way."""
        for module in self.of(owner):
            del vars(module)["forward"], self._forwards[module]
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
            self._forwards[module] = (owner, forward)

    def hook(self, owner: str, module: nn.Module, hook: Hook) -> None:
        """Register a forward hook for a pass."""
        self._hooks[owner].append(module.register_forward_hook(hook, with_kwargs=True))

    def remove(self, owner: str) -> None:
        """Take back the forwards and hooks of a pass."""
        self.put(owner, {})
        for handle in self._hooks.pop(owner, []):
            handle.remove()
