"""Joins a Linear with the activation behind it, without knowing the model: on a CPU, one pass over memory less.

One probe forward shows which activation modules receive the very tensor that a Linear has just returned. Those work
in place from then on; or, with the native kernels and the exact GELU, the Linear adds its bias and activates in one
go, and the activation module passes its input on. After each kind of change the probe runs again, and what moved its
result is taken back. Weights and classes stay as they are; only `forward` of single modules is replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cenote.tensors.native import Kernels

    Pair = tuple[nn.Module, list[nn.Linear]]

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "GELUActivation": torch.ops.aten.gelu_,
    "GELU": torch.ops.aten.gelu_,
    "GELUTanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "NewGELUActivation": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "FastGELUActivation": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "ReLU": torch.relu_,
    "SiLU": torch.ops.aten.silu_,
    "SiLUActivation": torch.ops.aten.silu_,
    "Tanh": torch.tanh_,
}
"""In-place forms by the name of the module's class; the probe decides whether they are right."""
EXACT_GELU = frozenset({"GELUActivation", "GELU"})


@torch.inference_mode()
def fuse_epilogues(model: nn.Module, probe: Callable[[], Tensor], kernels: Kernels | None = None) -> int:
    """Fuse what can be fused; returns the number of activation modules concerned.

    Args:
        model: in eval mode, on the CPU.
        probe: runs the model over a fixed batch of a few sequences and returns its output.
        kernels: native kernels, if there are any.
    """
    reference = probe().clone()

    def settle(modules: list[nn.Module]) -> int:
        """Keep the change if the probe's result stayed, else take it back."""
        if not modules or _same(reference, probe()):
            return sum(not isinstance(module, nn.Linear) for module in modules)
        for module in modules:
            vars(module).pop("forward", None)
        return 0

    pairs = [(activation, linears) for activation, linears in _pairs(model, probe) if _untouched(activation, linears)]
    count = settle(_join(pairs, kernels)) if kernels is not None else 0
    rest = [activation for activation, _ in pairs if "forward" not in vars(activation)]
    for activation in rest:
        vars(activation)["forward"] = _in_place(activation)
    return count + settle(rest)


def _join(pairs: list[Pair], kernels: Kernels) -> list[nn.Module]:
    """Let the Linears of exact GELUs activate by themselves; returns the modules that were changed."""
    joined: list[nn.Module] = []
    for activation, linears in pairs:
        fits = all(
            x.bias is not None
            and x.weight.dtype == torch.float32
            and x.weight.device.type == "cpu"
            and x.out_features % kernels.width == 0
            for x in linears
        )
        if fits and type(activation).__name__ in EXACT_GELU:
            vars(activation)["forward"] = _identity
            for linear in linears:
                vars(linear)["forward"] = _linear_gelu(linear, kernels)
            joined += [activation, *linears]
    return joined


def _pairs(model: nn.Module, probe: Callable[[], Tensor]) -> list[Pair]:
    """Activation modules whose every input is the untouched output of a Linear, with those Linears."""
    produced: dict[int, tuple[nn.Linear, Tensor]] = {}  # holds the tensor, so that its id stays its own
    sources: dict[nn.Module, list[nn.Linear | None]] = {}
    taken: dict[nn.Linear, int] = {}
    made: dict[nn.Linear, int] = {}

    def after_linear(module: nn.Module, _: Any, output: Any) -> None:
        assert isinstance(module, nn.Linear)
        produced[id(output)] = (module, output)
        made[module] = made.get(module, 0) + 1

    def before_activation(module: nn.Module, args: tuple[Any, ...]) -> None:
        found = produced.get(id(args[0])) if len(args) == 1 else None
        sources.setdefault(module, []).append(found[0] if found else None)
        if found:
            taken[found[0]] = taken.get(found[0], 0) + 1

    handles = []
    try:
        for module in model.modules():
            if type(module) is nn.Linear:
                handles.append(module.register_forward_hook(after_linear))
            elif type(module).__name__ in IN_PLACE:
                handles.append(module.register_forward_pre_hook(before_activation))
        probe()
    finally:
        for handle in handles:
            handle.remove()
    return [
        (activation, list(dict.fromkeys(x for x in linears if x is not None)))
        for activation, linears in sources.items()
        if all(x is not None and taken[x] == made[x] for x in linears)
    ]


def _untouched(activation: nn.Module, linears: list[nn.Linear]) -> bool:
    """Nobody else has patched or hooked these modules."""
    return not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in (activation, *linears))


def _in_place(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    original, apply = activation.forward, IN_PLACE[type(activation).__name__]

    def forward(x: Tensor) -> Tensor:
        return original(x) if torch.is_grad_enabled() else apply(x)

    return forward


def _linear_gelu(linear: nn.Linear, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = linear.weight, linear.bias
        if torch.is_grad_enabled() or x.dtype != torch.float32:
            return F.gelu(F.linear(x, weight, bias))
        y_RD = torch.mm(x.reshape(-1, x.shape[-1]), weight.t())
        return kernels.bias_gelu_(y_RD, bias).view(*x.shape[:-1], -1)

    return forward


def _identity(x: Tensor) -> Tensor:
    return x


def _same(a: Tensor, b: Tensor) -> bool:
    allowed = 2e-6 * max(1.0, float(a.abs().max()))
    return a.shape == b.shape and bool(torch.isfinite(b).all()) and torch.allclose(a, b, atol=allowed, rtol=1e-5)
