"""A CUDA graph on the CPU: records a forward's operators once and replays them over the same memory.

As with the real one, whatever Python decided while recording is fixed, tensors stay where they are, and an operator
that has to wait for its values (`.item()`, boolean indices) is an error. And a stand-in for the fused attention kernel
of a GPU, as one operator that reads the boundaries from its tensors, so that it replays with those of the next batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")
FRESH = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class Tape(TorchDispatchMode):
    """What was run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name in WAITS or (name.startswith("index") and _has_mask(args)):
            raise RuntimeError(f"{name} waits for the device, which a recording cannot")
        out = func(*args, **(kwargs or {}))
        if name.rstrip("_") not in FRESH:
            outs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
            self._calls.append((func, args, kwargs or {}, outs))
        return out

    def replay(self) -> None:
        """Run it again: results land where they landed then."""
        for func, args, kwargs, outs in self._calls:
            again = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for old, new in zip(outs, again, strict=True):
                assert old.shape == new.shape
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _has_mask(args: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_flatten(args[1:])[0])


def record(work: Callable[[], None]) -> Callable[[], None]:
    """As `cenote.tensors.graphs` records on a GPU: run once to warm up, then record."""
    work()
    tape = Tape()
    with tape:
        work()
    return tape.replay


@torch.library.custom_op("cenote_tests::varlen", mutates_args=())
def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window_size: list[int],
) -> tuple[Tensor, Tensor]:
    """The contract of fused kernels: `[T, N, H]`, offsets, (left, right) reach counted from the last key.

    Besides the result, the logarithm of the sum of exponentials, `[N, T]`. Rows of no sequence are NaN.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert q.shape[-1] % 8 == 0
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    left, right = (reach if reach >= 0 else 1 << 30 for reach in window_size)
    starts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    bounds = zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True)
    for (a, b), (c, d) in bounds:
        assert 0 <= b - a <= max_q
        assert 0 <= d - c <= max_k
        if b > a:
            starts.setdefault((b - a, d - c), []).append((a, c))
    for (queries, keys), places in starts.items():  # sequences of equal lengths together
        of_q, of_k = (torch.tensor(x)[:, None] for x in zip(*places, strict=True))
        of_q, of_k = of_q + torch.arange(queries), of_k + torch.arange(keys)
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        hidden = (distance > left) | (-distance > right)
        scores = (q[of_q].transpose(1, 2) @ k[of_k].permute(0, 2, 3, 1)) * scale  # [sequences, heads, queries, keys]
        scores = scores.masked_fill(hidden, float("-inf"))
        out[of_q] = (scores.softmax(-1) @ v[of_k].transpose(1, 2)).transpose(1, 2)
        lse[:, of_q] = scores.logsumexp(-1).transpose(0, 1)
    return out, lse


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.aten._flash_attention_forward` on the CPU, as `torch.nn.attention.varlen` calls it."""
    assert dropout_p == 0
    assert not return_debug_mask
    window = [window_size_left, window_size_right]
    assert is_causal == (window == [-1, 0])
    return varlen(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, window)
