"""The record of what passes have put in place of modules' own forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    Forwards = dict[nn.Module, Callable[..., Any]]
    Hook = Callable[[Any, Any, Any], Any]


class Patches:
    """The forwards and hooks of a model's modules that are not those of their classes.

    Passes change a model through this record only, each under its name, so that one finds what another did and can take
    its own changes back. Forwards and hooks that were there before are nobody's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._foreign = {x for x in model.modules() if "forward" in vars(x)}
        self._hooked = {x for x in model.modules() if x._forward_hooks or x._forward_pre_hooks}
        self._forwards: dict[nn.Module, tuple[str, Callable[..., Any]]] = {}
        self._hooks: dict[str, list[tuple[nn.Module, RemovableHandle]]] = {}

    def replaces(self, module: nn.Module) -> bool:
        """Whether `module` has another forward than its class."""
        return module in self._foreign or module in self._forwards

    def is_free(self, module: nn.Module) -> bool:
        """Whether `module` has the forward of its class and no hooks."""
        hooked = any(module is own for hooks in self._hooks.values() for own, _ in hooks)
        return not (self.replaces(module) or module in self._hooked or hooked)

    def of(self, owner: str) -> Forwards:
        """The forwards of a pass, by module."""
        return {module: forward for module, (name, forward) in self._forwards.items() if name == owner}

    def put(self, owner: str, forwards: Mapping[nn.Module, Callable[..., Any]]) -> None:
        """Make these the forwards of a pass, instead of those that it had. Those of other passes give way."""
        for module in self.of(owner):
            del vars(module)["forward"], self._forwards[module]
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
            self._forwards[module] = (owner, forward)

    def hook(self, owner: str, module: nn.Module, hook: Hook) -> None:
        """Register a forward hook for a pass."""
        self._hooks.setdefault(owner, []).append((module, module.register_forward_hook(hook)))

    def remove(self, owner: str) -> None:
        """Take back the forwards and hooks of a pass."""
        self.put(owner, {})
        for _, handle in self._hooks.pop(owner, []):
            handle.remove()
