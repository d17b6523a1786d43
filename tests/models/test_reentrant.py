"""Which models several threads may run at a time, and that those who may give what they give alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cenote.core import Sequence
from cenote.models.layouts import forward
from cenote.models.passes.subject import Settings
from cenote.models.passes.table import prepared
from cenote.models.probe import stable
from cenote.tensors import native
from cenote.tensors.packing import pack
from material.zoo import FIRST_TOKEN, ZOO, Architecture, build

STATEFUL = {"funnel", "llama-dynamic-rope", "phi3-longrope", "recurrent-gemma"}
"""Architectures whose modules remember something between forwards."""
LENGTHS = ((9, 4), (17, 3, 12), (30,), (5, 5, 5, 22))


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("architecture", ZOO, ids=lambda a: a.name)
def test_forwards_beside_each_other_give_what_each_gives_alone(architecture: Architecture, hasty: None) -> None:
    model, kernels = build(architecture), native.load()
    products = kernels if kernels and kernels.can_chain else None
    layout = prepared(model, Settings(kernels=kernels, products=products)).layout
    generator = torch.Generator().manual_seed(3)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    batches = [
        pack([Sequence(torch.randint(FIRST_TOKEN, vocabulary, (n,), generator=generator).tolist()) for n in lengths])
        for lengths in LENGTHS
    ]

    def run(number: int) -> list[Tensor]:
        with torch.inference_mode():
            return [forward(layout, batches[number]).clone()]

    fault = stable(model, [partial(run, number) for number in range(2)])
    assert bool(fault) == (architecture.name in STATEFUL), fault
    if fault:
        return
    alone = [run(number)[0] for number in range(len(batches))]
    found: list[tuple[int, Tensor]] = []

    def work(start: int) -> None:
        for number in range(start, start + 6):
            found.append((number % len(batches), run(number % len(batches))[0]))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    for number, hidden_TD in found:
        scale = max(1.0, float(alone[number].abs().max()))
        assert torch.allclose(hidden_TD, alone[number], rtol=0, atol=1e-5 * scale)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("table", torch.arange(6.0))
        self.calls, self.seen, self.longest = 0, [0], {"most": 1}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def counts(module: Plain, x: Tensor) -> None:
    module.calls += 1


def writes(module: Plain, x: Tensor) -> None:
    module.table.mul_(2)


def replaces(module: Plain, x: Tensor) -> None:
    module.table = module.table * 2


def notes(module: Plain, x: Tensor) -> None:
    module.seen[0] = len(x)


def grows(module: Plain, x: Tensor) -> None:
    module.longest["most"] = len(x)


def adds(module: Plain, x: Tensor) -> None:
    vars(module)[f"of_{len(x)}_{module.calls}"] = x
    module.calls = 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (counts, "calls"),
        (writes, "table"),
        (replaces, "table"),
        (notes, "seen"),
        (grows, "longest"),
        (adds, "of_"),
        (lambda *_: None, ""),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_forward_leaves_behind_is_found(change: Callable[[Plain, Tensor], None], name: str) -> None:
    outer = nn.Sequential(Plain())
    inner = outer[0]
    assert isinstance(inner, Plain)

    def run(x: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            change(inner, x)
            return [outer(x)]

    fault = stable(outer, [partial(run, torch.ones(2, 3)), partial(run, torch.ones(4, 3))])
    assert fault.startswith(f"a forward changes 0.{name}" if name else "")
    assert bool(fault) == bool(name)


def test_what_is_only_there_during_a_forward_is_found_by_running_two() -> None:
    class Parked(nn.Module):
        """Lays its input aside, as a module of long ago might, and cleans up."""

        def __init__(self) -> None:
            super().__init__()
            self.x: Tensor | None = None
            self.meet = threading.Barrier(2)

        def forward(self, x: Tensor, *, beside: bool) -> Tensor:
            self.x = x
            if beside:
                self.meet.wait(10)
            y = 2 * self.x
            if beside:
                self.meet.wait(10)
            self.x = None
            return y

    module, calls = Parked(), 0

    def run(x: Tensor) -> list[Tensor]:
        nonlocal calls
        calls += 1
        return [module(x, beside=threading.current_thread() is not threading.main_thread())]

    fault = stable(module, [partial(run, torch.ones(2)), partial(run, torch.zeros(3))])
    assert fault == "forwards beside each other give something else"


def test_a_forward_that_fails_beside_another_is_a_fault() -> None:
    def run(x: Tensor) -> list[Tensor]:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("thread-local state is missing")
        return [x]

    module = Plain()
    fault = stable(module, [partial(run, torch.ones(2)), partial(run, torch.zeros(3))])
    assert fault == "forwards beside each other give something else"
