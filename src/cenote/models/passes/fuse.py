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
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, filterfalse, product
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from cenote.models.layouts import forward
from cenote.models.passes.patches import Patches
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, shortened_windows, unchanged
from cenote.models.traits import noting, of_kind
from cenote.tensors import linear as multiplying
from cenote.tensors.linear import Narrow
from cenote.tensors.native import Chain, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

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
    """Observations of one probe forward. But for `linears`, they are of modules without patches and hooks.

    Attributes:
        linears: Linears that were called.
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
    paths = [weights.path for weights in packed(subject.patches).values() if isinstance(weights, Narrow)]
    if not paths:
        return Outcome()
    return Outcome(f"{len(paths)} of {count(model)} in {multiplying.PATHS[paths[0]].text}")


def undo(subject: Subject) -> None:
    """Give every Linear its matrix back."""
    _Matrices(subject.settings.products, packed(subject.patches)).unpack()
    subject.patches.remove(NAME)


def chains(patches: Patches) -> dict[nn.Module, Chain[Any]]:
    """Return the chains that fusing has made, by the module whose `forward` they are, or are remembered in."""
    forwards = {module: _without_memory(forward) for module, forward in patches.of(NAME).items()}
    return {module: forward for module, forward in forwards.items() if isinstance(forward, Chain)}


def packed(patches: Patches) -> dict[nn.Linear, Any]:
    """Return the packed weights of the Linears in all chains. A Linear may be in its block's chain and in its own."""
    steps = chain.from_iterable(x.steps for x in chains(patches).values())
    return {step.linear: step.weights for step in steps}  # type: ignore[misc]


def count(model: nn.Module) -> int:
    """Return the number of layers that multiply by a matrix."""
    return len(of_kind(model, nn.Linear)) + len(of_kind(model, Conv1D))


def uses(model: nn.Module) -> Counter[int]:
    """Count how many times the modules of a model hold each parameter, by its `id`."""
    counts: Counter[int] = Counter()
    for module in model.modules():
        counts.update(map(id, module._parameters.values()))
    return counts


def leave_file(model: nn.Module) -> None:
    """Copy all weights but those of Linears, which fusing copies: a single one left keeps the mapped file in memory."""
    for module in model.modules():
        tensors = dict(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
        if type(module) is nn.Linear:
            tensors.pop("weight", None)
        for tensor in tensors.values():
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
    patches = patches or Patches()
    rows, seen = _observe(model, probe, other, patches)
    check = partial(unchanged, probe, rows)
    matrices = _Matrices(products)
    matrices.pack(_packable(model, seen, patches))
    trials = _Trials(seen, matrices, kernels, patches, check)
    kept = trials.run(kinds)
    return trials.one_by_one(kinds) if kept is None else kept


@dataclass
class _Matrices:
    """The packed matrices of Linears.

    Attributes:
        products: multiplies by them; `None` = nothing is packed.
        weights: in the order of `products`.
    """

    products: Products[Any] | None
    weights: dict[nn.Linear, Any] = field(default_factory=dict)

    def pack(self, linears: Iterable[nn.Linear]) -> None:
        """Pack the matrices of `linears`, and leave only their shapes behind."""
        if self.products is None:
            return
        for linear in linears:
            self.weights[linear] = self.products.pack(linear.weight, linear.bias)
            linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)

    def unpack(self) -> None:
        """Give the Linears their matrices back."""
        for linear, weights in self.weights.items():
            assert self.products is not None
            linear.weight = nn.Parameter(self.products.unpack(weights), requires_grad=False)
        self.weights = {}

    def chain(self, steps: tuple[Step[Any], ...]) -> Chain[Any]:
        """Return a chain of Linears with packed matrices."""
        assert self.products is not None
        return self.products.chain(steps)


@dataclass
class _Trials:
    """Changes that are installed, and taken back where the output of the model moves.

    Attributes:
        check: returns a fault if the output has moved.
    """

    seen: Seen
    matrices: _Matrices
    kernels: Kernels | None
    patches: Patches
    check: Callable[[], str]

    def run(self, kinds: tuple[str, ...]) -> tuple[str, ...] | None:
        """Install changes of these kinds in place of others.

        Returns:
            The kinds of which the model has any; `None` if the output moved.
        """
        before = self.patches.of(NAME)
        plan = _Plan(self.seen, self.matrices, self.kernels)
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
                self.matrices.unpack()
        return kept


class _Plan:
    """The `forward` of each module that changes replace; one method for each kind, see `CHANGES`.

    Attributes:
        forwards: by module.
        counts: number of changes of each kind.
    """

    def __init__(self, seen: Seen, matrices: _Matrices, kernels: Kernels | None) -> None:
        self._seen = seen
        self._matrices = matrices
        self._kernels = kernels
        self._steps: dict[nn.Linear, tuple[Step[Any], ...]] = {
            linear: (Step(weights, linear=linear),) for linear, weights in matrices.weights.items()
        }
        self.forwards: Forwards = {}
        self.counts = Counter(packed=len(matrices.weights))

    def make(self, kinds: tuple[str, ...]) -> None:
        """Plan changes of these kinds; Linears that are packed run packed whatever the kinds."""
        for kind, change in CHANGES.items():
            if kind in ("packed", *kinds):
                change(self)

    def activated(self) -> None:
        """A Linear activates its output, and the activation module passes its input on."""
        for activation, linears in self._seen.activations.items():
            name, _ = ACTIVATIONS[type(activation).__name__]
            if not name or not self._steps.keys() >= set(linears):
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
            if steps.keys() >= {first, second} and steps[first][-1].activation:
                self.forwards[first] = _identity
                self.counts["chained"] += 1
                steps[second] = (*steps.pop(first), *steps[second])

    def packed(self) -> None:
        """Linears, or chains of them, multiply by packed matrices."""
        for linear, steps in self._steps.items():
            self.forwards[linear] = self._matrices.chain(steps)

    def normalised(self) -> None:
        """A block ends its Linear's chain with its residual and its LayerNorm."""
        for block, (linear, norm) in self._seen.norms.items():
            steps = self._steps.get(linear)
            if steps is not None and not steps[-1].activation:
                self.forwards[block] = self._matrices.chain((*steps[:-1], replace(steps[-1], norm=norm)))
                self.counts["normalised"] += 1

    def in_one_pass(self) -> None:
        """RMSNorm by one kernel."""
        if self._kernels is None:
            return
        for module, gamma_D in self._seen.scales.items():
            self.forwards[module] = partial(self._kernels.rms_norm, gamma_D=gamma_D, epsilon=_epsilon(module))
            self.counts["in one pass"] += 1

    def in_place(self) -> None:
        """Activations that remain overwrite their input."""
        for activation in self._seen.activations:
            if activation not in self.forwards:
                self.forwards[activation] = ACTIVATIONS[type(activation).__name__][1]
                self.counts["in place"] += 1

    def remembered(self) -> None:
        """A Linear that always gets the same input keeps its output."""
        for linear, x_1RI in self._seen.constants.items():
            self.forwards[linear] = Remembered(self.forwards.get(linear, linear.forward), x_1RI)
            self.counts["remembered"] += 1


CHANGES: dict[str, Callable[[_Plan], None]] = {
    "activated": _Plan.activated,
    "chained": _Plan.chained,
    "packed": _Plan.packed,
    "normalised": _Plan.normalised,
    "in one pass": _Plan.in_one_pass,
    "in place": _Plan.in_place,
    "remembered": _Plan.remembered,
}
"""By kind, in the order in which they are planned: a Linear is packed with all that it runs."""


def _observe(
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
    seen = watch.seen(free)
    inputs = {linear: watch.inputs[linear] for linear in seen.linears if linear in free}
    seen.constants = _constants(inputs, rows.shape[:-1].numel(), other)
    return rows, seen


class _Watch:
    """Follows tensors through a forward, by hooks that note calls.

    Lists have an entry for each call of the module, `None` where that call rules a change out.

    Attributes:
        inputs: of each call of a Linear.
    """

    def __init__(self) -> None:
        self.inputs: defaultdict[nn.Linear, list[Tensor]] = defaultdict(list)
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
        if _epsilon(module):
            return self._scaling
        block = _block(module)
        return None if block is None else partial(self._block, *block)

    def _linear(self, module: nn.Linear, args: tuple[Any, ...], _: dict[str, Any], output: Tensor) -> None:
        self._last[module] = args
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
            linears=list(self._calls),
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
        if torch.equal(x, self._x):
            return self._y
        return self.plain(x)


def _without_memory(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward.plain if isinstance(forward, Remembered) else forward


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
        inputs[module].append(args[0])

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


def _epsilon(module: nn.Module) -> float:
    """Return the epsilon of a module that holds one vector and nothing else; 0 for any other module."""
    match [*module._parameters.values(), *module._buffers.values(), *module._modules.values()]:
        case [nn.Parameter(ndim=1)]:
            epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
            return epsilon if isinstance(epsilon, float) else 0.0
    return 0.0


def _scale(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """Return `factors` if `output` is `args[0] / root mean square * factors`: the module's vector, or 1 + that."""
    (weight,) = module.parameters()
    if len(args) != 1 or not _is_plain(module) or args[0].shape[-1:] != weight.shape:
        return None
    for gamma in (weight, 1 + weight):
        expected = F.rms_norm(args[0].double(), weight.shape, gamma.double(), _epsilon(module))
        if output.shape == expected.shape and torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-6):
            return gamma.detach().contiguous()
    return None


def _is_plain(module: nn.Module) -> bool:
    """Return whether the native kernels take the weights of `module`: all of them are float32 on the CPU."""
    return {(x.dtype, x.device.type) for x in module.parameters()} == {(torch.float32, "cpu")}


def _packable(model: nn.Module, seen: Seen, patches: Patches) -> list[nn.Linear]:
    """Return the Linears whose matrix nothing but their own, original `forward` reads."""
    times = uses(model)
    plain = filterfalse(patches.replaces, filter(_is_plain, seen.linears))
    return [linear for linear in plain if times[id(linear.weight)] == 1]


def _identity(x: Tensor) -> Tensor:
    return x
