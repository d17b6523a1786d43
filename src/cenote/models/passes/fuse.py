"""Runs Linear layers with what follows them, without knowing the model: on a CPU, fewer passes over memory.

A probe forward shows what happens to the output of each Linear: an activation module takes it, whose output another
Linear takes; or a block adds it to a residual and normalises the sum. Changes of these kinds follow from that, each to
the `forward` of single modules, while classes stay as they are:

- *packed*: the matrix is kept in the order in which it is multiplied, which is worth most to small batches;
- *activated*: the Linear adds its bias and activates in one go, and the activation module passes its input on;
- *chained*: a Linear that takes what another has activated runs both, block of rows by block of rows, and the other
  passes its input on;
- *normalised*: a block of a Linear, a residual and a LayerNorm becomes the end of such a chain;
- *in one pass*: a module that divides rows by their root mean square (RMSNorm) does not write what is between;
- *in place*: activations that remain overwrite their input;
- *remembered*: a Linear that gets the same input in every forward, as those of DeBERTa's relative positions do, gives
  what it gave before.

Then the probe runs again; if its result has moved, one kind is tried after the other, and what moves it is taken back.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from cenote.models.layouts import forward
from cenote.models.passes.patches import Patches
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, shortened_windows, unchanged
from cenote.tensors import linear as multiplying
from cenote.tensors.linear import Narrow
from cenote.tensors.native import Chain, Step, W

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cenote.models.passes.patches import Forwards
    from cenote.models.passes.subject import Subject
    from cenote.tensors.native import Kernels, Products

log = logging.getLogger(__name__)

NAME = "fuse"
KINDS = ("packed", "activated", "chained", "normalised", "in one pass", "in place", "remembered")
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
"""By the class of an activation module: its name among `cenote.tensors.native.ACTIVATIONS`, and its in-place form. The
probe decides whether they are right."""


@dataclass
class Seen:
    """What one probe forward showed.

    Attributes:
        free: modules that nobody has patched or hooked.
        linears: those that were called.
        activations: activation modules whose every input is the untouched output of a Linear, with those Linears.
        next: the Linear that takes what a Linear gave and an activation changed, and nobody else does.
        constants: Linears that were called with the same input when the tokens were others, and that input.
        norms: blocks that add a Linear's output to their second argument and normalise, with the Linear and the norm.
        scales: modules that divide rows by their root mean square, with the factors on the result, `[D]`.
    """

    free: set[nn.Module] = field(default_factory=set)
    linears: list[nn.Linear] = field(default_factory=list)
    activations: dict[nn.Module, list[nn.Linear]] = field(default_factory=dict)
    next: dict[nn.Linear, nn.Linear] = field(default_factory=dict)
    norms: dict[nn.Module, tuple[nn.Linear, nn.LayerNorm]] = field(default_factory=dict)
    scales: dict[nn.Module, Tensor] = field(default_factory=dict)
    constants: dict[nn.Linear, Tensor] = field(default_factory=dict)


def apply(subject: Subject) -> Outcome:
    """Fuse what can be fused on a CPU; the text says how the Linears run, if not by a BLAS."""
    if subject.full.device.type != "cpu":
        return Outcome()
    settings, model = subject.settings, subject.backbone
    if settings.products is not None:
        leave_file(subject.full)
    with shortened_windows(model):
        run, other = (partial(forward, subject.layout, batch) for batch in subject.probe.short)
        fuse(model, run, other, settings.kernels, settings.products, subject.patches, settings.fused or KINDS)
    paths = {}
    for step in steps(subject.patches):
        if isinstance(step.weights, Narrow):
            paths[step.linear] = step.weights.path
    if not paths:
        return Outcome()
    path = next(iter(paths.values()))
    return Outcome(f"{len(paths)} of {count(model)} in {multiplying.PATHS[path].text}")


def undo(subject: Subject) -> None:
    """Give every Linear its matrix back."""
    products = subject.settings.products
    unpacked = {step.linear: step for step in steps(subject.patches)}
    for step in unpacked.values():
        if step.linear is not None and products is not None:
            step.linear.weight = nn.Parameter(products.unpack(step.weights), requires_grad=False)
    subject.patches.remove(NAME)


def chains(patches: Patches) -> dict[nn.Module, Chain[Any]]:
    """The chains that fusing has made, by the module whose `forward` they are, or are remembered in."""
    found = {}
    for module, own in patches.of(NAME).items():
        chain = own.plain if isinstance(own, Remembered) else own
        if isinstance(chain, Chain):
            found[module] = chain
    return found


def steps(patches: Patches) -> list[Step[Any]]:
    """The Linears of all chains. One that begins the chain of a block stands in that of its own module, too."""
    return [step for chain in chains(patches).values() for step in chain.steps]


def count(model: nn.Module) -> int:
    """Number of layers that multiply by a matrix."""
    return sum(isinstance(x, nn.Linear) or type(x).__name__ == "Conv1D" for x in model.modules())


def leave_file(model: nn.Module) -> None:
    """Copy all weights but those of Linears, which fusing copies: one that stays keeps the mapped file in memory."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (type(module) is not nn.Linear or name != "weight"):
                tensor.data = tensor.data.clone()


@torch.inference_mode()
def fuse(
    model: nn.Module,
    probe: Callable[[], Tensor],
    other: Callable[[], Tensor],
    kernels: Kernels | None = None,
    products: Products[Any] | None = None,
    patches: Patches | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> tuple[str, ...]:
    """Fuse what can be fused; returns the kinds of change that were kept, of `kinds`.

    The matrices of packed Linears move to the "meta" device: their memory is freed, and whoever reads them past
    `forward` fails.

    Args:
        model: in eval mode, on the CPU.
        probe: runs the model over a fixed batch of a few sequences and returns its output.
        other: does so with other tokens.
        kernels: native kernels, if there are any.
        products: multiplies by packed matrices, if anything does.
        patches: the record of changes of `model`.
        kinds: those to try, of `KINDS`.
    """
    patches = patches or Patches(model)
    reference = probe().clone()
    seen = _observe(model, probe, patches)
    seen.constants = _constants(model, probe, other)
    packed: dict[nn.Linear, Any] = {}
    if products is not None:
        uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        plain = [x for x in seen.linears if _is_plain(x) and not patches.replaces(x) and uses[id(x.weight)] == 1]
        packed = {x: _pack(x, products) for x in plain}

    def attempt(tried: tuple[str, ...]) -> tuple[str, ...] | None:
        """Install changes of these kinds instead; those of them that there are, or `None` if the result moved."""
        before = patches.of(NAME)
        forwards, counts = _forwards(tried, seen, packed, kernels, products)
        patches.put(NAME, forwards)
        fault = ""
        for _ in range(2):  # the second time, what the first one left counts
            fault = fault or fault_of(partial(unchanged, probe, reference))
        if not fault:
            return tuple(kind for kind in tried if counts[kind])
        log.info("not fused: %s: %s", ", ".join(tried), fault)
        patches.put(NAME, before)
        return None

    kept = attempt(kinds)
    if kept is not None:
        return kept
    kept = ()
    for kind in kinds:
        found = attempt((*kept, kind))
        kept = kept if found is None else found
        if kind == "packed" and found is None and products is not None:
            for linear, own in packed.items():
                linear.weight = nn.Parameter(products.unpack(own), requires_grad=False)
            packed = {}
    return kept


def _forwards(
    kinds: tuple[str, ...],
    seen: Seen,
    packed: Mapping[nn.Linear, Any],
    kernels: Kernels | None,
    products: Products[Any] | None,
) -> tuple[Forwards, Counter[str]]:
    """The `forward` of each module that changes of these kinds replace, and how many changes of each kind those are."""
    forwards: Forwards = {}
    counts = Counter(packed=len(packed))
    steps: dict[nn.Linear, tuple[Step[Any], ...]] = {x: (Step(own, linear=x),) for x, own in packed.items()}
    if "activated" in kinds:
        for activation, linears in seen.activations.items():
            name, _ = ACTIVATIONS[type(activation).__name__]
            if name and all(x in steps and x in seen.free for x in linears):
                forwards[activation] = _identity
                steps |= {x: (replace(steps[x][0], activation=name),) for x in linears}
                counts["activated"] += 1
    if "chained" in kinds:
        for first, second in seen.next.items():
            if first in steps and second in steps and steps[first][-1].activation and second in seen.free:
                forwards[first] = _identity
                steps[second] = (*steps.pop(first), *steps[second])
                counts["chained"] += 1
    if products is not None:
        forwards |= {x: products.chain(own) for x, own in steps.items()}
        for block, (linear, norm) in seen.norms.items() if "normalised" in kinds else ():
            if linear in steps and not steps[linear][-1].activation and linear in seen.free:
                own = steps[linear]
                forwards[block] = products.chain((*own[:-1], replace(own[-1], norm=norm)))
                counts["normalised"] += 1
    if "in one pass" in kinds and kernels is not None:
        scales = {x: own for x, own in seen.scales.items() if x in seen.free}
        forwards |= {x: partial(kernels.rms_norm, gamma_D=own, epsilon=_epsilon(x)) for x, own in scales.items()}
        counts["in one pass"] = len(scales)
    if "in place" in kinds:
        rest = [x for x in seen.activations if x not in forwards and seen.free.issuperset(seen.activations[x])]
        forwards |= {x: ACTIVATIONS[type(x).__name__][1] for x in rest}
        counts["in place"] = len(rest)
    if "remembered" in kinds:
        forwards |= {
            x: Remembered(forwards.get(x, x.forward), x_1RI) for x, x_1RI in seen.constants.items() if x in seen.free
        }
        counts["remembered"] = len(seen.free & seen.constants.keys())
    return forwards, counts


def _observe(model: nn.Module, probe: Callable[[], Tensor], patches: Patches) -> Seen:
    """Watch one forward."""
    seen = Seen({x for x in model.modules() if patches.is_free(x)})
    held: list[Tensor] = []  # so that the id of a tensor stays its own
    made: dict[int, nn.Linear] = {}
    activated: dict[int, nn.Linear] = {}
    gave: Counter[nn.Linear] = Counter()
    taken: Counter[nn.Linear] = Counter()
    sources: dict[nn.Module, list[nn.Linear | None]] = {}
    targets: dict[nn.Linear, list[nn.Linear]] = {}
    inputs: dict[nn.Module, tuple[Any, ...]] = {}
    adds: dict[nn.Module, bool] = {}
    ratios: dict[nn.Module, list[Tensor | None]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module] = () if kwargs else args
        if isinstance(module, nn.Linear) and (source := activated.get(id(args[0]))) is not None:
            targets.setdefault(source, []).append(module)
        elif type(module).__name__ in ACTIVATIONS:
            source = made.get(id(args[0])) if len(args) == 1 else None
            sources.setdefault(module, []).append(source)
            if source is not None:
                taken[source] += 1

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Linear):
            if module not in gave:
                seen.linears.append(module)
            gave[module] += 1
            held.append(output)
            made[id(output)] = module
        elif type(module).__name__ in ACTIVATIONS:
            if (source := sources[module][-1]) is not None:
                held.append(output)
                activated[id(output)] = source
        elif _epsilon(module):
            ratios.setdefault(module, []).append(_scale(module, args, output))
        elif (pair := _block(module)) is not None:
            adds[module] = adds.get(module, True) and _adds(inputs, module, *pair, output)

    handles = []
    try:
        for module in model.modules():
            if (
                type(module) in (nn.Linear, nn.LayerNorm)
                or type(module).__name__ in ACTIVATIONS
                or _block(module) is not None
                or _epsilon(module)
            ):
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
        probe()
    finally:
        for handle in handles:
            handle.remove()
    for activation, linears in sources.items():
        if activation in seen.free and all(x is not None and taken[x] == gave[x] for x in linears):
            seen.activations[activation] = list(dict.fromkeys(x for x in linears if x is not None))
    for first, seconds in targets.items():
        second = seconds[0]
        if set(seconds) == {second} and len(seconds) == gave[first] == gave[second]:
            seen.next[first] = second
    seen.norms = {module: pair for module, yes in adds.items() if yes and (pair := _block(module))}
    seen.scales = {module: own[0] for module, own in ratios.items() if None not in own and own[0] is not None}
    return seen


class Remembered:
    """A Linear's `forward` that keeps its answer to one input.

    Attributes:
        plain: the `forward` that does not.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.plain = forward
        self._x = x.clone()
        self._y = forward(x)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape == self._x.shape and torch.equal(x, self._x):
            return self._y
        return self.plain(x)


def _constants(model: nn.Module, probe: Callable[[], Tensor], other: Callable[[], Tensor]) -> dict[nn.Linear, Tensor]:
    """Linears that are called with the same input in both forwards, and that input."""

    def inputs(run: Callable[[], Tensor]) -> dict[nn.Linear, list[Tensor]]:
        found: dict[nn.Linear, list[Tensor]] = {}

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, nn.Linear)
            found.setdefault(module, []).append(args[0])

        handles = [x.register_forward_pre_hook(before) for x in model.modules() if type(x) is nn.Linear]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return found

    first, second = inputs(probe), inputs(other)
    same = {
        linear: next((a for a in own for b in second.get(linear, ()) if a.shape == b.shape and torch.equal(a, b)), None)
        for linear, own in first.items()
    }
    return {linear: x for linear, x in same.items() if x is not None}


def _block(module: nn.Module) -> tuple[nn.Linear, nn.LayerNorm] | None:
    """The Linear and the LayerNorm of a module that has one of each and otherwise nothing but dropout."""
    rest = [x for x in module.children() if not isinstance(x, (nn.Dropout, nn.Identity))]
    linears = [x for x in rest if type(x) is nn.Linear]
    norms = [x for x in rest if type(x) is nn.LayerNorm and x.weight is not None and x.bias is not None]
    return (linears[0], norms[0]) if len(rest) == 2 and linears and norms else None


def _adds(
    inputs: Mapping[nn.Module, tuple[Any, ...]], block: nn.Module, linear: nn.Linear, norm: nn.LayerNorm, output: Any
) -> bool:
    """Whether a block has just given `norm(linear(first argument) + second argument)`."""
    own, given, summed = (inputs.get(x, ()) for x in (block, linear, norm))
    return (
        (len(own), len(given), len(summed)) == (2, 1, 1)
        and given[0] is own[0]
        and torch.equal(summed[0], linear.forward(own[0]) + own[1])
        and torch.equal(output, norm.forward(summed[0]))
    )


def _epsilon(module: nn.Module) -> float:
    """What a module that has one vector as its only parameter calls its epsilon; 0 for any other module."""
    weights = [*module._parameters.values()]
    if len(weights) != 1 or weights[0] is None or weights[0].dim() != 1 or module._buffers or module._modules:
        return 0.0
    found = next((own for name in ("variance_epsilon", "eps") if (own := getattr(module, name, None))), 0.0)
    return found if isinstance(found, float) else 0.0


def _scale(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """The factors by which `module` has just given `args[0] / root mean square * factors`: its vector, or 1 + that."""
    (weight,) = module.parameters()
    if (
        len(args) != 1
        or weight.dtype != torch.float32
        or weight.device.type != "cpu"
        or args[0].shape[-1:] != weight.shape
    ):
        return None
    for gamma in (weight, 1 + weight):
        expected = F.rms_norm(args[0].double(), weight.shape, gamma.double(), _epsilon(module))
        if output.shape == expected.shape and torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-6):
            return gamma.detach().contiguous()
    return None


def _is_plain(linear: nn.Linear) -> bool:
    """Whether the native kernels take its weights."""
    own = [x for x in (linear.weight, linear.bias) if x is not None]
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in own)


def _pack(linear: nn.Linear, products: Products[W]) -> W:
    """Its weights, packed; what stays behind of the matrix is only a shape."""
    packed = products.pack(linear.weight, linear.bias)
    linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    return packed


def _identity(x: Tensor) -> Tensor:
    return x
