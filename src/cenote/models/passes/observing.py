"""A forward observed by hooks: where the outputs of Linears go, and which modules normalise."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from cenote.models.traits import noting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from cenote.models.passes.patches import Patches


T = TypeVar("T")
ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "GELUActivation": ("gelu", torch.ops.aten.gelu_),
    "GELU": ("gelu", torch.ops.aten.gelu_),
    "GELUTanh": ("gelu_tanh", lambda x: torch.ops.aten.gelu_(x, approximate="tanh")),
    "NewGELUActivation": ("gelu_tanh", lambda x: torch.ops.aten.gelu_(x, approximate="tanh")),
    "FastGELUActivation": ("gelu_tanh", lambda x: torch.ops.aten.gelu_(x, approximate="tanh")),
    "ReLU": ("relu", torch.relu_),
    "SiLU": ("silu", torch.ops.aten.silu_),
    "SiLUActivation": ("silu", torch.ops.aten.silu_),
    "Tanh": ("", torch.tanh_),
}
"""By the class of an activation module: its name among `cenote.tensors.chains.ACTIVATIONS`, and its in-place form. The
probe decides whether they are right."""


@dataclass
class Seen:
    """Observations of one probe forward. But for `linears`, they are of modules without patches and hooks.

    Attributes:
        linears: Linears that were called, by no keyword.
        activations: activation modules whose every input is the untouched output of a Linear, with those Linears.
        next: the only Linear that takes the activated output of a Linear.
        norms: blocks that add a Linear's output to their second argument and normalise, with the Linear and the norm.
        scales: modules that divide rows by their root mean square, with the factors on the result, `[D]`.
        constants: Linears that were called with the same input when the tokens were others, and that input.
    """

    linears: list[nn.Linear]
    activations: dict[nn.Module, list[nn.Linear]] = field(default_factory=dict)
    next: dict[nn.Linear, nn.Linear] = field(default_factory=dict)
    norms: dict[nn.Module, tuple[nn.Linear, nn.LayerNorm]] = field(default_factory=dict)
    scales: dict[nn.Module, Tensor] = field(default_factory=dict)
    constants: dict[nn.Linear, Tensor] = field(default_factory=dict)


def observe(
    model: nn.Module, probe: Callable[[], Tensor], other: Callable[[], Tensor], patches: Patches
) -> tuple[Tensor, Seen]:
    """Watch the forward of `probe`, and that of `other` if there could be constants; return the output of the first."""
    watch = _Watch()
    with ExitStack() as hooks:
        for module in model.modules():
            hook = watch.hook(module)
            if hook is not None:
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        rows = probe().clone()
    free = set(filter(patches.is_free, model.modules()))
    seen = watch.seen(free - watch.by_keyword)
    inputs = {linear: watch.inputs[linear] for linear in seen.linears if linear in free}
    seen.constants = _constants(inputs, rows.shape[:-1].numel(), other)
    return rows, seen


class _Watch:
    """Follows tensors through a forward, by hooks that note calls.

    Lists have an entry for each call of the module, `None` where that call rules a change out.

    Attributes:
        inputs: of each call of a Linear.
        by_keyword: Linears whose input has its name in a call, which no other `forward` takes.
    """

    def __init__(self) -> None:
        self.inputs: defaultdict[nn.Linear, list[Tensor]] = defaultdict(list)
        self.by_keyword: set[nn.Module] = set()
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of one of them
        self._outputs: dict[int, nn.Linear] = {}
        self._activated: dict[int, nn.Linear | None] = {}
        self._calls: Counter[nn.Linear] = Counter()
        self._activations: Counter[nn.Linear | None] = Counter()
        self._sources: defaultdict[nn.Module, list[nn.Linear | None]] = defaultdict(list)
        self._targets: defaultdict[nn.Linear, list[nn.Linear]] = defaultdict(list)
        self._last: dict[nn.Module, tuple[Any, ...]] = {}
        self._norms: defaultdict[nn.Module, list[tuple[nn.Linear, nn.LayerNorm] | None]] = defaultdict(list)
        self._scales: defaultdict[nn.Module, list[Tensor | None]] = defaultdict(list)

    def hook(self, module: nn.Module) -> Callable[..., None] | None:
        """Return the hook that notes a call of `module`, if a change may concern it."""
        if type(module) is nn.Linear:
            return self._linear
        if type(module).__name__ in ACTIVATIONS:
            return self._activation
        if type(module) is nn.LayerNorm:
            return self._norm
        if epsilon_of(module):
            return self._scaling
        block = _block(module)
        return None if block is None else partial(self._block, *block)

    def _linear(self, module: nn.Linear, args: tuple[Any, ...], _: dict[str, Any], output: Tensor) -> None:
        self._last[module] = args
        if not args:
            self.by_keyword.add(module)
            return
        self.inputs[module].append(args[0])
        before = self._activated.get(id(args[0]))
        if before is not None:
            self._targets[before].append(module)
        self._calls[module] += 1
        self._alive.append(output)
        self._outputs[id(output)] = module

    def _activation(self, module: nn.Module, args: tuple[Any, ...], _: dict[str, Any], output: Tensor) -> None:
        source = self._outputs.get(id(args[0])) if len(args) == 1 else None
        self._sources[module].append(source)
        self._activations[source] += 1
        self._alive.append(output)
        self._activated[id(output)] = source

    def _norm(self, module: nn.LayerNorm, args: tuple[Any, ...], _: dict[str, Any], output: Tensor) -> None:
        self._last[module] = args

    def _scaling(self, module: nn.Module, args: tuple[Any, ...], _: dict[str, Any], output: Any) -> None:
        self._scales[module].append(_scale(module, args, output))

    def _block(
        self,
        linear: nn.Linear,
        norm: nn.LayerNorm,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Note whether the output is `norm(linear(first argument) + second argument)`."""
        of_linear, of_norm = self._last.get(linear, ()), self._last.get(norm, ())
        adds = (
            (len(args), len(kwargs), len(of_linear), len(of_norm)) == (2, 0, 1, 1)
            and of_linear[0] is args[0]
            and torch.equal(of_norm[0], linear.forward(args[0]) + args[1])
            and torch.equal(output, norm.forward(of_norm[0]))
        )
        self._norms[module].append((linear, norm) if adds else None)

    def seen(self, free: set[nn.Module]) -> Seen:
        """Return the observations; `free` are the modules without patches and hooks."""
        return Seen(
            linears=[linear for linear in self._calls if linear not in self.by_keyword],
            activations=self._only_activated(free),
            next=self._only_next(free),
            norms={block: pairs[0] for block, pairs in _complete(self._norms).items() if pairs[0][0] in free},
            scales={module: factors[0] for module, factors in _complete(self._scales).items() if module in free},
        )

    def _only_activated(self, free: set[nn.Module]) -> dict[nn.Module, list[nn.Linear]]:
        """Return the activations of Linears whose every output is activated, with those Linears."""
        fusible = free & {x for x, calls in self._calls.items() if self._activations[x] == calls}
        activations = {}
        for activation, linears in _complete(self._sources).items():
            if activation in free and fusible.issuperset(linears):
                activations[activation] = list(dict.fromkeys(linears))
        return activations

    def _only_next(self, free: set[nn.Module]) -> dict[nn.Linear, nn.Linear]:
        """Return the Linears whose every activated output goes to one other, which gets no other input."""
        pairs = {}
        for first, seconds in self._targets.items():
            second = seconds[0]
            is_pair = seconds.count(second) == len(seconds) == self._calls[first] == self._calls[second]
            if is_pair and second in free:
                pairs[first] = second
        return pairs


def _complete(calls: Mapping[nn.Module, list[T | None]]) -> dict[nn.Module, list[T]]:
    """Return the modules whose calls all have an entry, with those entries."""
    return {module: values for module, values in calls.items() if None not in values}  # type: ignore[misc]


def _constants(
    inputs: Mapping[nn.Linear, list[Tensor]], tokens: int, other: Callable[[], Tensor]
) -> dict[nn.Linear, Tensor]:
    """Return the Linears that are called with the same input whatever the tokens are, and that input.

    Args:
        inputs: of each Linear in a forward.
        tokens: of that forward. Inputs with a row for each of them depend on them.
        other: runs a forward over other tokens, if any input has another number of rows.
    """
    first = {linear: [x for x in calls if x.shape[:-1].numel() != tokens] for linear, calls in inputs.items()}
    candidates = list(filter(first.get, first))
    second = _linear_inputs(candidates, other) if candidates else {}
    constants = {}
    for linear in candidates:
        equal = [x for x, y in product(first[linear], second[linear]) if torch.equal(x, y)]
        if equal:
            constants[linear] = equal[0]
    return constants


def _linear_inputs(linears: Iterable[nn.Linear], run: Callable[[], Tensor]) -> dict[nn.Linear, list[Tensor]]:
    """Return the inputs that each Linear gets in a forward."""
    inputs: defaultdict[nn.Linear, list[Tensor]] = defaultdict(list)

    def note(module: nn.Linear, args: tuple[Any, ...], _: dict[str, Any]) -> None:
        inputs[module] += args[:1]

    with noting(linears, note):
        run()
    return inputs


def _block(module: nn.Module) -> tuple[nn.Linear, nn.LayerNorm] | None:
    """Return the Linear and the LayerNorm of a module that has one of each and otherwise nothing but dropout."""
    parts = [x for x in module.children() if not isinstance(x, (nn.Dropout, nn.Identity))]
    if Counter(map(type, parts)) != Counter((nn.Linear, nn.LayerNorm)):
        return None
    linear, norm = sorted(parts, key=lambda x: type(x) is nn.LayerNorm)
    return None if norm.bias is None else (linear, norm)  # type: ignore[return-value]


def epsilon_of(module: nn.Module) -> float:
    """Return the epsilon of a module that holds one vector and nothing else; 0 for any other module."""
    match [*module._parameters.values(), *module._buffers.values(), *module._modules.values()]:
        case [nn.Parameter(ndim=1)]:
            epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
            return epsilon if isinstance(epsilon, float) else 0.0
    return 0.0


def _scale(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """Return `factors` if `output` is `args[0] / root mean square * factors`: the module's vector, or 1 + that."""
    (weight,) = module.parameters()
    if len(args) != 1 or not is_plain(module) or args[0].shape[-1:] != weight.shape:
        return None
    for gamma in (weight, 1 + weight):
        expected = F.rms_norm(args[0].double(), weight.shape, gamma.double(), epsilon_of(module))
        if output.shape == expected.shape and torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-6):
            return gamma.detach().contiguous()
    return None


def is_plain(module: nn.Module) -> bool:
    """Return whether the native kernels take the weights of `module`: all of them are float32 on the CPU."""
    return {(x.dtype, x.device.type) for x in module.parameters()} == {(torch.float32, "cpu")}
