"""Costs of forwards: the matrix products of a model's Linear layers, and how long they would take by themselves."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cenote.models.passes.fuse import Remembered

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Shape = tuple[int, int]

REPEATS = 3
"""Of a product; the fastest counts."""


def products(model: nn.Module, work: Callable[[], object]) -> Counter[Shape]:
    """Count rows that pass matrices of each shape `(out, in)` while `work` runs `model`, in whatever thread.

    Linear layers that are run as part of a fused block count as often as their block.
    """
    linears = [x for x in model.modules() if isinstance(x, nn.Linear)]
    parents = {child: x for x in model.modules() for child in x.children()}
    blocks = [x for x in map(parents.get, linears) if x is not None and "forward" in vars(x)]
    rows = _rows_of({*linears, *blocks}, work)
    counts: Counter[Shape] = Counter()
    for linear in linears:
        if isinstance(vars(linear).get("forward"), Remembered):
            continue
        is_elsewhere = not rows[linear] and linear.weight.is_meta  # its block has the matrix
        passed = rows[parents[linear]] if is_elsewhere else rows[linear]
        if passed:
            counts[linear.out_features, linear.in_features] += passed
    return counts


def _rows_of(modules: set[nn.Module], work: Callable[[], object]) -> Counter[nn.Module]:
    """Count the rows of the first tensor that each of `modules` gets while `work` runs."""
    rows: Counter[nn.Module] = Counter()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if tensors:
            rows[module] += tensors[0].shape[:-1].numel()

    handles = [x.register_forward_pre_hook(before, with_kwargs=True) for x in modules]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
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
            best = float("inf")
            for _ in range(REPEATS):
                began = time.perf_counter()
                nn.functional.linear(x, weight)
                best = min(best, time.perf_counter() - began)
            total += best * count / rows
    return total
