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
from itertools import chain, filterfalse
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cenote.models.layouts import forward
from cenote.models.passes.observing import ACTIVATIONS, Seen, epsilon_of, is_plain, observe
from cenote.models.passes.patches import Patches
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, shortened_windows, unchanged
from cenote.models.traits import of_kind
from cenote.tensors import linear as multiplying
from cenote.tensors.chains import Chain, Step
from cenote.tensors.linear import Narrow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from cenote.models.passes.patches import Forwards
    from cenote.models.passes.subject import Subject
    from cenote.tensors.chains import Products
    from cenote.tensors.native import Kernels

log = logging.getLogger(__name__)

NAME = "fuse"
KINDS = ("packed", "activated", "chained", "normalised", "in one pass", "in place", "remembered")


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
    rows, seen = observe(model, probe, other, patches)
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
            self.forwards[module] = partial(self._kernels.rms_norm, gamma_D=gamma_D, epsilon=epsilon_of(module))
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


def _packable(model: nn.Module, seen: Seen, patches: Patches) -> list[nn.Linear]:
    """Return the Linears whose matrix nothing but their own, original `forward` reads."""
    times = uses(model)
    plain = filterfalse(patches.replaces, filter(is_plain, seen.linears))
    return [linear for linear in plain if times[id(linear.weight)] == 1]


def _identity(x: Tensor) -> Tensor:
    return x
