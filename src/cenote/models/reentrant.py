"""Whether several threads may run a model at a time.

Transformers' modules are functions of their inputs, as a rule. The exceptions remember something between calls, such as
the frequencies for the longest sequence so far. A model is taken for *reentrant* if forwards leave all attributes and
buffers of its modules as they were, and forwards of two threads at a time give what each gives alone.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds after which a forward beside another counts as stuck."""
TOLERANCE = 1e-4


def fault(module: nn.Module, runs: list[Callable[[], list[Tensor]]]) -> str:
    """Why several threads cannot run `module` at a time, or an empty string.

    Args:
        module: the model, in eval mode.
        runs: forwards over different inputs, each with its results.
    """
    alone = [run() for run in runs]  # what a model makes in its first forwards and then keeps is no obstacle
    before = _state(module)
    for run in runs:  # what each of them notes of its input shows beside what the other has noted
        run()
        after = _state(module)
        changed = [name for name in before | after if not _same(before.get(name), after.get(name))]
        if changed:
            return f"a forward changes {changed[0]}"
    beside: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(runs))

    def work(number: int) -> None:
        try:
            start.wait(PATIENCE)
            beside[number] = runs[number]()
        except Exception as error:  # what runs alone and fails beside others says all there is to know
            log.info("beside another forward: %s: %s", type(error).__name__, error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if len(beside) < len(runs) or not all(_close(beside[i], own) for i, own in enumerate(alone)):
        return "forwards beside each other give something else"
    return ""


def _close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    def near(a: Tensor, b: Tensor) -> bool:
        allowed = TOLERANCE * max(1.0, float(b.abs().max())) if b.numel() else 0.0
        return a.shape == b.shape and bool(torch.allclose(a, b, atol=allowed, rtol=0))

    return len(found) == len(wanted) and all(map(near, found, wanted))


def _state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every attribute of `module` and its parts, each with what shows a change of it in place."""
    parts = module.named_modules()
    return {f"{path}.{name}" if path else name: own for path, part in parts for name, own in _attributes(part)}


def _attributes(module: nn.Module) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield name, _shown(value)


def _shown(value: Any) -> tuple[Any, ...]:
    """`value`, and what is in it."""
    if isinstance(value, torch.Tensor):
        return value, None if value.is_inference() else value._version
    if isinstance(value, dict):
        return value, *value.items()
    if isinstance(value, (list, set, tuple)):
        return value, *value
    inner = getattr(value, "__dict__", None)
    return (value, *inner.items()) if isinstance(inner, dict) and not isinstance(value, (nn.Module, type)) else (value,)


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, tuple) and isinstance(after, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    plain = (int, float, str, type(None))
    return before is after or (type(before) is type(after) and isinstance(before, plain) and before == after)
