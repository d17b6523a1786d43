"""Pooling over packed rows against the plain definition, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cenote.core import Sequence
from cenote.tensors import heads
from cenote.tensors.packing import pack
from cenote.tensors.pooling import MODES, pool

LENGTHS = (4, 1, 9)

DEFINITIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": lambda x, p: x[0],
    "lasttoken": lambda x, p: x[-1],
    "mean": lambda x, p: x.mean(0),
    "mean_sqrt_len_tokens": lambda x, p: x.sum(0) / len(x) ** 0.5,
    "weightedmean": lambda x, p: (x * p[:, None]).sum(0) / p.sum(),
    "max": lambda x, p: x.max(0).values,
}


def test_every_mode_is_defined_here() -> None:
    assert set(DEFINITIONS) == set(MODES)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode: str, skip: int) -> None:
    lengths = [n + skip for n in LENGTHS]
    batch = pack([Sequence([1] * n, skip=skip) for n in lengths])
    x_TD = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(0))
    expected = [
        DEFINITIONS[mode](part[skip:], torch.arange(1 + skip, 1 + len(part)).float()) for part in x_TD.split(lengths)
    ]
    assert torch.allclose(pool(x_TD, batch, (mode,)), torch.stack(expected), atol=1e-6)


def test_modes_concatenate_in_order() -> None:
    batch = pack([Sequence([1] * n) for n in LENGTHS])
    x_TD = torch.randn(sum(LENGTHS), 6)
    both = pool(x_TD, batch, ("max", "cls"))
    assert torch.equal(both, torch.cat([pool(x_TD, batch, ("max",)), pool(x_TD, batch, ("cls",))], dim=-1))


def test_half_precision_is_accumulated_in_float32() -> None:
    batch = pack([Sequence([1] * 4096)])
    x_TD = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    assert torch.allclose(pool(x_TD, batch, ("mean",)), x_TD[:1].float(), rtol=1e-6)


def test_head_cuts_before_it_normalises() -> None:
    x_RD = torch.tensor([[3.0, 4.0, 100.0]])
    assert torch.allclose(heads.apply([], x_RD, dimensions=2, activate=True), torch.tensor([[0.6, 0.8]]))
    doubled = heads.apply([lambda x: x * 2], x_RD, dimensions=None, activate=False)
    assert torch.equal(doubled, x_RD * 2)
