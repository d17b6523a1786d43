"""Every architecture, packed or padded as the probe decides, equals itself: eager, one sequence at a time, fp32."""

from __future__ import annotations

import pytest
import torch

from cenote.models.layout import Packed, choose, forward
from cenote.tensors import linear, native
from cenote.tensors.packing import pack
from cenote.types import Sequence
from tests.zoo import FIRST_TOKEN, ZOO, Architecture, build

LENGTHS = (17, 3, 100, 40, 1, 17, 64)
AMPLIFIES = {"qwen3.5", "qwen3-next"}
"""Architectures whose recurrence amplifies rounding: eager is 1e-4 and 3e-5 from float64 itself. Cenote may not be
further."""


def sequences(vocab: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(7)
    return [Sequence(torch.randint(FIRST_TOKEN, vocab, (n,), generator=generator).tolist()) for n in LENGTHS]


def alone(model: torch.nn.Module, batch: list[Sequence]) -> list[torch.Tensor]:
    """The reference: the model's own eager forward, shortest first, so that no rotary frequency is left grown."""
    rows: dict[int, torch.Tensor] = {}
    for i in sorted(range(len(batch)), key=lambda i: len(batch[i])):
        ids = torch.tensor([batch[i].ids])
        with torch.inference_mode():
            rows[i] = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
    return [rows[i] for i in range(len(batch))]


@pytest.mark.parametrize("products", ["torch", "BLAS", "AMX"])
@pytest.mark.parametrize("architecture", ZOO, ids=lambda a: a.name)
def test_equals_eager_one_by_one(architecture: Architecture, products: str) -> None:
    """By plain torch, and with native kernels and either of what multiplies for them."""
    kernels = native.load() if products != "torch" else None
    multiplied = linear.float32(kernels) if products == "AMX" else kernels if kernels and kernels.can_chain else None
    if products == "AMX" and not isinstance(multiplied, linear.Exact):
        pytest.skip("this processor has no AMX")
    model = build(architecture)
    batch = sequences(model.get_input_embeddings().weight.shape[0])
    expected = alone(model, batch)
    layout, reasons = choose(build(architecture), kernels=kernels, products=multiplied)
    assert layout.name == architecture.layout, reasons
    hidden = forward(layout, pack(batch)).split([len(s) for s in batch])
    scale = max(1.0, max(float(rows.abs().max()) for rows in expected))
    if kernels and architecture.name in AMPLIFIES:
        reference = build(architecture).double()
        reference.set_experts_implementation("eager")  # grouped products take no float64
        exact = torch.cat(alone(reference, batch))
        assert (torch.cat(hidden) - exact).abs().max() <= (torch.cat(expected) - exact).abs().max() + 1e-5 * scale
        assert torch.allclose(torch.cat(hidden), torch.cat(expected), rtol=0, atol=1e-4 * scale)
    else:
        for got, wanted in zip(hidden, expected, strict=True):
            assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * scale), float((got - wanted).abs().max())
    if isinstance(layout, Packed):
        everywhere = {
            "albert",
            "umt5",
            "gpt2",
            "gpt-bigcode",
        }  # one layer for all, or shapes taken from outside the layer
        places = set() if architecture.name in everywhere else {"last"} if layout.is_causal else {"first", "last"}
        assert layout.places == places
    for place in getattr(layout, "places", ()):
        at = pack(batch).rows_at(place)
        got = forward(layout, pack(batch), place)
        assert torch.allclose(got[at], torch.cat(expected)[at], rtol=0, atol=1e-5 * scale)
        got[at] = torch.nan
        assert got.isnan().all(), "rows that nobody wants were computed"
    spread = torch.stack([rows[-1] for rows in expected]).std(dim=0).mean()
    assert spread > 1e-3, "the tiny checkpoint gives nearly the same rows for all inputs and would prove nothing"
