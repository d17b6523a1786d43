"""Signs that several threads cannot run a model at a time; `test_parity_zoo` runs every architecture by several."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cenote.models.probe import stable


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
