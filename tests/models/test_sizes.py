"""Building under `sizes.Bounded`: what is counted, and what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cenote.errors import CheckpointError
from cenote.models.sizes import MORE_STEPS, STEPS_PER_TENSOR, Bounded


def test_tensors_without_values_are_not_initialised_and_others_are() -> None:
    """Neither draws anything on the meta device; a layer beside it is as without the bound."""
    torch.manual_seed(3)
    expected = nn.Linear(4, 5)
    torch.manual_seed(3)
    with Bounded("config.json", {}, {}):
        with torch.device("meta"):
            without = nn.Sequential(nn.Linear(7, 3), nn.LayerNorm(3), nn.Embedding(9, 3, padding_idx=0))
        layer = nn.Linear(4, 5)
        filled = torch.empty(3).fill_(2.0)
    assert [tuple(p.shape) for p in without.parameters()] == [(3, 7), (3,), (3,), (3,), (9, 3)]
    assert {p.device.type for p in without.parameters()} == {"meta"}
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.bias, expected.bias)
    assert filled.tolist() == [2.0, 2.0, 2.0]


def test_initialisers_are_steps_too() -> None:
    """Or a config of endless layers would take no steps."""
    with Bounded("config.json", {}, {}), torch.device("meta"):
        tensor = torch.empty(1)
        with pytest.raises(CheckpointError, match=r"config\.json describes a model of another size than the weights"):
            for _ in range(MORE_STEPS + STEPS_PER_TENSOR):
                tensor.fill_(1.0)
