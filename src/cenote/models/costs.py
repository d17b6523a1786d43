"""Costs of forwards: the matrix products of a model's Linear layers, and how long they would take by themselves."""

from __future__ import annotations

import timeit
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cenote.models.passes.fuse import Remembered
from cenote.models.passes.patches import Patches
from cenote.models.traits import noting, of_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Shape = tuple[int, int]

REPEATS = 3
"""Of a product; the fastest counts."""


def products(model: nn.Module, work: Callable[[], object]) -> Counter[Shape]:
    """Count rows that pass matrices of each shape `(out, in)` while `work` runs `model`, in whatever thread.

    Linear layers that are run as part of a fused block count as often as their block.
    """
    linears = of_kind(model, nn.Linear)
    patched = filter(Patches.replaces, model.modules())
    blocks = {child: x for x in patched for child in x.children()}
    rows = _rows_of({*linears, *blocks.values()}, work)
    counts: Counter[Shape] = Counter()
    for linear in linears:
        if isinstance(linear.forward, Remembered):
            continue
        passed = rows[linear]
        if not passed and linear.weight.is_meta:
            passed = rows[blocks.get(linear, linear)]  # its block has the matrix
        counts[linear.out_features, linear.in_features] += passed
    return +counts  # without zeros


def _rows_of(modules: set[nn.Module], work: Callable[[], object]) -> Counter[nn.Module]:
    """Count the rows of the first tensor that each of `modules` gets while `work` runs."""
    rows: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if tensors:
            rows[module] += tensors[0].shape[:-1].numel()

    with noting(modules, note):
        work()
    return rows


def flop(products: Mapping[Shape, int]) -> int:
    """Return the floating-point operations of products: a multiplication and an addition for each weight and row."""
    return sum(2 * rows * into * out for (out, into), rows in products.items())


def seconds(products: Mapping[Shape, int], *, rows: int, dtype: torch.dtype) -> float:
    """Measure the wall time of `torch.nn.functional.linear` for products on this CPU, in batches of `rows` rows.

    With as many threads as the calling thread has. Each shape is measured by itself, over random numbers.
    """
    total = 0.0
    with torch.inference_mode():
        for (out, into), count in products.items():
            weight, x = torch.randn(out, into, dtype=dtype), torch.randn(rows, into, dtype=dtype)
            best = min(timeit.repeat(partial(nn.functional.linear, x, weight), number=1, repeat=REPEATS))
            total += best * count / rows
    return total
