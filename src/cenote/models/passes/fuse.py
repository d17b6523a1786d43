"""Linear layers fused with the operations that follow them on a CPU, without knowing the model: less use of memory.

A probe forward shows where the output of each Linear goes: to an activation module, and from there to another Linear;
or to a block that adds it to a residual and normalises the sum. Changes of these kinds follow from that, each to the
`forward` of single modules, while classes stay as they are:

- *packed*: the matrix is kept in the order in which it is multiplied, which is worth most to small batches;
- *activated*: the Linear adds its bias and activates in one go, and the activation module passes its input on;
- *chained*: a Linear with an activated input runs the Linear before it as well, block of rows by block of rows, and
  that one passes its input on;
- *normalised*: a block of a Linear, a residual and a LayerNorm becomes the end of such a chain;
- *in one pass*: a module that divides rows by their root mean square (RMSNorm) writes no intermediate results;
- *in place*: activations that remain overwrite their input;
- *remembered*: a Linear that gets the same input in every forward, as those of DeBERTa's relative positions do, returns
  its earlier output.

Then the probe runs again; if its result has moved, kinds are tried one by one, and those that move it are undone.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

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

T = TypeVar("T")

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
    """Observations of one probe forward.

    Attributes:
        free: modules without patches and hooks.
        linears: Linears that were called.
        activations: activation modules whose every input is the untouched output of a Linear, with those Linears.
        next: the only Linear that takes the activated output of a Linear.
        norms: blocks that add a Linear's output to their second argument and normalise, with the Linear and the norm.
        scales: modules that divide rows by their root mean square, with the factors on the result, `[D]`.
        constants: Linears that were called with the same input when the tokens were others, and that input.
    """

    free: set[nn.Module] = field(default_factory=set)
    linears: list[nn.Linear] = field(default_factory=list)
    activations: dict[nn.Module, list[nn.Linear]] = field(default_factory=dict)
    next: dict[nn.Linear, nn.Linear] = field(default_factory=dict)
    norms: dict[nn.Module, tuple[nn.Linear, nn.LayerNorm]] = field(default_factory=dict)
    scales: dict[nn.Module, Tensor] = field(default_factory=dict)
    constants: dict[nn.Linear, Tensor] = field(default_factory=dict)


def apply(subject: Subject) -> Outcome:
    """Fuse the layers of a model on a CPU; the text says how the Linears run, if not by a BLAS."""
    if subject.full.device.type != "cpu":
        return Outcome()
    settings, model = subject.settings, subject.backbone
    if settings.products is not None:
        leave_file(subject.full)
    with shortened_windows(model):
        run, other = (partial(forward, subject.layout, batch) for batch in subject.probe.short)
        fuse(model, run, other, settings.kernels, settings.products, subject.patches, settings.fused or KINDS)
    paths = {step.linear: step.weights.path for step in steps(subject.patches) if isinstance(step.weights, Narrow)}
    if not paths:
        return Outcome()
    path = next(iter(paths.values()))
    return Outcome(f"{len(paths)} of {count(model)} in {multiplying.PATHS[path].text}")


def undo(subject: Subject) -> None:
    """Give every Linear its matrix back."""
    products = subject.settings.products
    weights = {step.linear: step.weights for step in steps(subject.patches)}
    for linear, packed in weights.items():
        if linear is not None and products is not None:
            _unpack(linear, packed, products)
    subject.patches.remove(NAME)


def chains(patches: Patches) -> dict[nn.Module, Chain[Any]]:
    """Return the chains that fusing has made, by the module whose `forward` they are, or are remembered in."""
    forwards = {module: _without_memory(forward) for module, forward in patches.of(NAME).items()}
    return {module: forward for module, forward in forwards.items() if isinstance(forward, Chain)}


def steps(patches: Patches) -> list[Step[Any]]:
    """Return the Linears of all chains. One that begins a block's chain is in the chain of its own module, too."""
    return [step for chain in chains(patches).values() for step in chain.steps]


def count(model: nn.Module) -> int:
    """Return the number of layers that multiply by a matrix."""
    return sum(isinstance(x, nn.Linear) or type(x).__name__ == "Conv1D" for x in model.modules())


def uses(model: nn.Module) -> Counter[int]:
    """Count how many times the modules of a model hold each parameter, by its `id`."""
    counts: Counter[int] = Counter()
    for module in model.modules():
        counts.update(map(id, module._parameters.values()))
    return counts


def leave_file(model: nn.Module) -> None:
    """Copy all weights but those of Linears, which fusing copies: a single one left keeps the mapped file in memory."""
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
    """Fuse the layers of `model`, and return the kinds of change that were kept, of `kinds`.

    The matrices of packed Linears move to the "meta" device: their memory is freed, and reading them past `forward`
    fails.

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
    check = partial(unchanged, probe, probe().clone())
    seen = _observe(model, probe, patches)
    seen.constants = _constants(model, probe, other)
    packed = {} if products is None else {x: _pack(x, products) for x in _packable(model, seen, patches)}
    trials = _Trials(seen, packed, kernels, products, patches, check)
    kept = trials.run(kinds)
    return trials.one_by_one(kinds) if kept is None else kept


@dataclass
class _Trials:
    """Changes that are installed, and taken back where the output of the model moves.

    Attributes:
        packed: weights of Linears, in the order of `products`.
        check: returns a fault if the output has moved.
    """

    seen: Seen
    packed: dict[nn.Linear, Any]
    kernels: Kernels | None
    products: Products[Any] | None
    patches: Patches
    check: Callable[[], str]

    def run(self, kinds: tuple[str, ...]) -> tuple[str, ...] | None:
        """Install changes of these kinds in place of others.

        Returns:
            The kinds of which the model has any; `None` if the output moved.
        """
        before = self.patches.of(NAME)
        plan = _Plan(self.seen, self.packed, self.kernels, self.products)
        plan.make(kinds)
        self.patches.put(NAME, plan.forwards)
        fault = fault_of(self.check) or fault_of(self.check)  # the second forward meets remains of the first
        if not fault:
            return tuple(kind for kind in kinds if plan.counts[kind])
        log.info("not fused: %s: %s", ", ".join(kinds), fault)
        self.patches.put(NAME, before)
        return None

    def one_by_one(self, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """Add one kind after the other, and return the kinds that were kept."""
        kept: tuple[str, ...] = ()
        for kind in kinds:
            tried = self.run((*kept, kind))
            if tried is not None:
                kept = tried
            elif kind == "packed":
                self._unpack_all()
        return kept

    def _unpack_all(self) -> None:
        if self.products is not None:
            for linear, weights in self.packed.items():
                _unpack(linear, weights, self.products)
        self.packed = {}


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
        """A Linear activates its output, and the activation module passes its input on."""
        fusible = self._seen.free & self._steps.keys()
        for activation, linears in self._seen.activations.items():
            name, _ = ACTIVATIONS[type(activation).__name__]
            if not name or not fusible.issuperset(linears):
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
            is_activated = first in steps and steps[first][-1].activation
            if is_activated and second in steps and second in self._seen.free:
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
        """A Linear that always gets the same input keeps its output."""
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
    """Return whether a change may concern `module`."""
    if type(module) in (nn.Linear, nn.LayerNorm) or type(module).__name__ in ACTIVATIONS:
        return True
    return _block(module) is not None or bool(_epsilon(module))


class _Watch:
    """Follows tensors through a forward, by the hooks `before` and `after`.

    Lists have an entry for each call of the module, `None` where that call rules a change out.
    """

    def __init__(self) -> None:
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of one of them
        self._outputs: dict[int, nn.Linear] = {}
        self._activated: dict[int, nn.Linear] = {}
        self._calls: Counter[nn.Linear] = Counter()
        self._activations: Counter[nn.Linear] = Counter()
        self._sources: dict[nn.Module, list[nn.Linear | None]] = {}
        self._targets: dict[nn.Linear, list[nn.Linear]] = {}
        self._inputs: dict[nn.Module, tuple[Any, ...]] = {}
        self._norms: dict[nn.Module, list[tuple[nn.Linear, nn.LayerNorm] | None]] = {}
        self._scales: dict[nn.Module, list[Tensor | None]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the input of a module."""
        self._inputs[module] = () if kwargs else args
        if isinstance(module, nn.Linear) and id(args[0]) in self._activated:
            self._targets.setdefault(self._activated[id(args[0])], []).append(module)
        elif type(module).__name__ in ACTIVATIONS:
            source = self._outputs.get(id(args[0])) if len(args) == 1 else None
            self._sources.setdefault(module, []).append(source)
            if source is not None:
                self._activations[source] += 1

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the output of a module."""
        if isinstance(module, nn.Linear):
            self._calls[module] += 1
            self._alive.append(output)
            self._outputs[id(output)] = module
        elif type(module).__name__ in ACTIVATIONS:
            source = self._sources[module][-1]
            if source is not None:
                self._alive.append(output)
                self._activated[id(output)] = source
        elif _epsilon(module):
            self._scales.setdefault(module, []).append(_scale(module, args, output))
        else:
            self._note_block(module, output)

    def _note_block(self, module: nn.Module, output: Any) -> None:
        pair = _block(module)
        if pair is not None:
            adds = _adds(self._inputs, module, *pair, output)
            self._norms.setdefault(module, []).append(pair if adds else None)

    def seen(self, free: set[nn.Module]) -> Seen:
        """Return the observations; `free` are the modules without patches and hooks."""
        seen = Seen(free, list(self._calls))
        for activation, linears in _complete(self._sources).items():
            is_only_use = all(self._activations[x] == self._calls[x] for x in linears)
            if is_only_use and activation in free:
                seen.activations[activation] = list(dict.fromkeys(linears))
        for first, seconds in self._targets.items():
            second = seconds[0]
            if set(seconds) == {second} and len(seconds) == self._calls[first] == self._calls[second]:
                seen.next[first] = second
        seen.norms = {block: pairs[0] for block, pairs in _complete(self._norms).items()}
        seen.scales = {module: factors[0] for module, factors in _complete(self._scales).items()}
        return seen


def _complete(calls: Mapping[nn.Module, list[T | None]]) -> dict[nn.Module, list[T]]:
    """Return the modules whose calls all have an entry, with those entries."""
    entries = {module: [x for x in values if x is not None] for module, values in calls.items()}
    return {module: values for module, values in entries.items() if len(values) == len(calls[module])}


class Remembered:
    """A Linear's `forward` that keeps its output for one input.

    Attributes:
        plain: the `forward` that computes it.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.plain = forward
        self._x = x.clone()
        self._y = forward(x)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape == self._x.shape and torch.equal(x, self._x):
            return self._y
        return self.plain(x)


def _without_memory(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward.plain if isinstance(forward, Remembered) else forward


def _constants(model: nn.Module, probe: Callable[[], Tensor], other: Callable[[], Tensor]) -> dict[nn.Linear, Tensor]:
    """Return the Linears that are called with the same input in both forwards, and that input."""
    first, second = _linear_inputs(model, probe), _linear_inputs(model, other)
    constants = {}
    for linear, inputs in first.items():
        same = [x for x in inputs if any(_are_equal(x, y) for y in second.get(linear, ()))]
        if same:
            constants[linear] = same[0]
    return constants


def _linear_inputs(model: nn.Module, run: Callable[[], Tensor]) -> dict[nn.Linear, list[Tensor]]:
    """Return the inputs that each Linear gets in a forward."""
    inputs: dict[nn.Linear, list[Tensor]] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Linear)
        inputs.setdefault(module, []).append(args[0])

    handles = [x.register_forward_pre_hook(before) for x in model.modules() if type(x) is nn.Linear]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _are_equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y)


def _block(module: nn.Module) -> tuple[nn.Linear, nn.LayerNorm] | None:
    """Return the Linear and the LayerNorm of a module that has one of each and otherwise nothing but dropout."""
    parts = [x for x in module.children() if not isinstance(x, (nn.Dropout, nn.Identity))]
    if len(parts) != 2:
        return None
    linear, norm = sorted(parts, key=lambda x: type(x) is nn.LayerNorm)
    if type(linear) is not nn.Linear or type(norm) is not nn.LayerNorm:
        return None
    is_affine = norm.weight is not None and norm.bias is not None
    return (linear, norm) if is_affine else None


def _adds(
    inputs: Mapping[nn.Module, tuple[Any, ...]], block: nn.Module, linear: nn.Linear, norm: nn.LayerNorm, output: Any
) -> bool:
    """Return whether the last output of a block is `norm(linear(first argument) + second argument)`."""
    of_block, of_linear, of_norm = (inputs.get(x, ()) for x in (block, linear, norm))
    return (
        (len(of_block), len(of_linear), len(of_norm)) == (2, 1, 1)
        and of_linear[0] is of_block[0]
        and torch.equal(of_norm[0], linear.forward(of_block[0]) + of_block[1])
        and torch.equal(output, norm.forward(of_norm[0]))
    )


def _epsilon(module: nn.Module) -> float:
    """Return the epsilon of a module that has one vector as its only parameter; 0 for any other module."""
    parameters = list(module._parameters.values())
    dimensions = [x.dim() for x in parameters if x is not None]
    if len(parameters) != 1 or dimensions != [1] or module._buffers or module._modules:
        return 0.0
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    return epsilon if isinstance(epsilon, float) else 0.0


def _scale(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """Return `factors` if `output` is `args[0] / root mean square * factors`: the module's vector, or 1 + that."""
    (weight,) = module.parameters()
    if len(args) != 1 or not _is_plain(weight) or args[0].shape[-1:] != weight.shape:
        return None
    for gamma in (weight, 1 + weight):
        expected = F.rms_norm(args[0].double(), weight.shape, gamma.double(), _epsilon(module))
        if output.shape == expected.shape and torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-6):
            return gamma.detach().contiguous()
    return None


def _is_plain(x: Tensor | None) -> bool:
    """Return whether the native kernels take these weights: float32 on the CPU, or none."""
    return x is None or (x.dtype, x.device.type) == (torch.float32, "cpu")


def _packable(model: nn.Module, seen: Seen, patches: Patches) -> list[nn.Linear]:
    """Return the Linears whose matrix nothing but their own, original `forward` reads."""
    times = uses(model)
    linears = [x for x in seen.linears if times[id(x.weight)] == 1 and not patches.replaces(x)]
    return [x for x in linears if _is_plain(x.weight) and _is_plain(x.bias)]


def _pack(linear: nn.Linear, products: Products[W]) -> W:
    """Return the packed weights of `linear`, and leave only the shape of its matrix behind."""
    packed = products.pack(linear.weight, linear.bias)
    linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    return packed


def _unpack(linear: nn.Linear, packed: W, products: Products[W]) -> None:
    """Give `linear` its matrix back."""
    linear.weight = nn.Parameter(products.unpack(packed), requires_grad=False)


def _identity(x: Tensor) -> Tensor:
    return x
