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
        plan = _Plan(seen, packed, kernels, products)
        plan.make(tried)
        patches.put(NAME, plan.forwards)
        fault = ""
        for _ in range(2):  # the second time, what the first one left counts
            fault = fault or fault_of(partial(unchanged, probe, reference))
        if not fault:
            return tuple(kind for kind in tried if plan.counts[kind])
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


class _Plan:
    """The `forward` of each module that changes replace; one method for each kind, in the order of `KINDS`.

    Attributes:
        forwards: by module.
        counts: number of changes of each kind.
    """

    def __init__(
        self,
        seen: Seen,
        packed: Mapping[nn.Linear, Any],
        kernels: Kernels | None,
        products: Products[Any] | None,
    ) -> None:
        self._seen = seen
        self._kernels = kernels
        self._products = products
        self._steps: dict[nn.Linear, tuple[Step[Any], ...]] = {
            linear: (Step(weights, linear=linear),) for linear, weights in packed.items()
        }
        self.forwards: Forwards = {}
        self.counts = Counter(packed=len(packed))

    def make(self, kinds: tuple[str, ...]) -> None:
        """Plan changes of these kinds."""
        for kind in ("activated", "chained"):
            if kind in kinds:
                getattr(self, kind)()
        if self._products is not None:
            for linear, steps in self._steps.items():
                self.forwards[linear] = self._products.chain(steps)
        for kind in ("normalised", "in one pass", "in place", "remembered"):
            if kind in kinds:
                getattr(self, kind.replace(" ", "_"))()

    def activated(self) -> None:
        """A Linear activates what it gives, and the activation module passes its input on."""
        for activation, linears in self._seen.activations.items():
            name, _ = ACTIVATIONS[type(activation).__name__]
            if not name or not self._seen.free.issuperset(linears) or not self._steps.keys() >= set(linears):
                continue
            self.forwards[activation] = _identity
            self.counts["activated"] += 1
            for linear in linears:
                (step,) = self._steps[linear]
                self._steps[linear] = (replace(step, activation=name),)

    def chained(self) -> None:
        """A Linear runs the activated one before it, which passes its input on."""
        steps = self._steps
        for first, second in self._seen.next.items():
            if first not in steps or second not in steps or second not in self._seen.free:
                continue
            if steps[first][-1].activation:
                self.forwards[first] = _identity
                self.counts["chained"] += 1
                steps[second] = (*steps.pop(first), *steps[second])

    def normalised(self) -> None:
        """A block ends its Linear's chain with its residual and its LayerNorm."""
        if self._products is None:
            return
        for block, (linear, norm) in self._seen.norms.items():
            steps = self._steps.get(linear)
            if steps is None or steps[-1].activation or linear not in self._seen.free:
                continue
            self.forwards[block] = self._products.chain((*steps[:-1], replace(steps[-1], norm=norm)))
            self.counts["normalised"] += 1

    def in_one_pass(self) -> None:
        """RMSNorm by one kernel."""
        if self._kernels is None:
            return
        for module, gamma_D in self._seen.scales.items():
            if module in self._seen.free:
                self.forwards[module] = partial(self._kernels.rms_norm, gamma_D=gamma_D, epsilon=_epsilon(module))
                self.counts["in one pass"] += 1

    def in_place(self) -> None:
        """Activations that remain overwrite their input."""
        for activation, linears in self._seen.activations.items():
            if activation not in self.forwards and self._seen.free.issuperset(linears):
                self.forwards[activation] = ACTIVATIONS[type(activation).__name__][1]
                self.counts["in place"] += 1

    def remembered(self) -> None:
        """A Linear that always gets the same input keeps its answer."""
        for linear, x_1RI in self._seen.constants.items():
            if linear in self._seen.free:
                self.forwards[linear] = Remembered(self.forwards.get(linear, linear.forward), x_1RI)
                self.counts["remembered"] += 1


def _observe(model: nn.Module, probe: Callable[[], Tensor], patches: Patches) -> Seen:
    """Watch one forward."""
    watch, handles = _Watch(), []
    try:
        for module in model.modules():
            if _is_watched(module):
                handles.append(module.register_forward_pre_hook(watch.before, with_kwargs=True))
                handles.append(module.register_forward_hook(watch.after))
        probe()
    finally:
        for handle in handles:
            handle.remove()
    return watch.seen({module for module in model.modules() if patches.is_free(module)})


def _is_watched(module: nn.Module) -> bool:
    """Whether a change may concern `module`."""
    if type(module) in (nn.Linear, nn.LayerNorm) or type(module).__name__ in ACTIVATIONS:
        return True
    return _block(module) is not None or bool(_epsilon(module))


class _Watch:
    """Follows tensors through a forward, by the hooks `before` and `after`."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []  # so that the id of a tensor stays its own
        self._given: dict[int, nn.Linear] = {}
        self._activated: dict[int, nn.Linear] = {}
        self._calls: Counter[nn.Linear] = Counter()
        self._taken: Counter[nn.Linear] = Counter()
        self._sources: dict[nn.Module, list[nn.Linear | None]] = {}
        self._targets: dict[nn.Linear, list[nn.Linear]] = {}
        self._inputs: dict[nn.Module, tuple[Any, ...]] = {}
        self._adds: dict[nn.Module, bool] = {}
        self._scales: dict[nn.Module, list[Tensor | None]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a module takes."""
        self._inputs[module] = () if kwargs else args
        if isinstance(module, nn.Linear) and id(args[0]) in self._activated:
            self._targets.setdefault(self._activated[id(args[0])], []).append(module)
        elif type(module).__name__ in ACTIVATIONS:
            source = self._given.get(id(args[0])) if len(args) == 1 else None
            self._sources.setdefault(module, []).append(source)
            if source is not None:
                self._taken[source] += 1

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what a module gives."""
        if isinstance(module, nn.Linear):
            self._calls[module] += 1
            self._held.append(output)
            self._given[id(output)] = module
        elif type(module).__name__ in ACTIVATIONS:
            source = self._sources[module][-1]
            if source is not None:
                self._held.append(output)
                self._activated[id(output)] = source
        elif _epsilon(module):
            self._scales.setdefault(module, []).append(_scale(module, args, output))
        else:
            pair = _block(module)
            if pair is not None:
                adds = _adds(self._inputs, module, *pair, output)
                self._adds[module] = self._adds.get(module, True) and adds

    def seen(self, free: set[nn.Module]) -> Seen:
        """What the forward showed; `free` are the modules that nobody has patched or hooked."""
        seen = Seen(free, list(self._calls))
        for activation, sources in self._sources.items():
            linears = [linear for linear in dict.fromkeys(sources) if linear is not None]
            is_plain = None not in sources and all(self._taken[x] == self._calls[x] for x in linears)
            if is_plain and activation in free:
                seen.activations[activation] = linears
        for first, seconds in self._targets.items():
            second = seconds[0]
            if set(seconds) == {second} and len(seconds) == self._calls[first] == self._calls[second]:
                seen.next[first] = second
        for block, adds in self._adds.items():
            pair = _block(block)
            if adds and pair is not None:
                seen.norms[block] = pair
        for module, scales in self._scales.items():
            first_scale = scales[0]
            if None not in scales and first_scale is not None:
                seen.scales[module] = first_scale
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
