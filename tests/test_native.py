"""The native kernels against torch, and what happens where they cannot be had."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.models.fuse import fuse_epilogues
from cenote.tensors import native
from cenote.tensors.attention import Rule, attend_runs
from cenote.tensors.native import Kernels
from cenote.tensors.packing import pack
from cenote.types import Sequence

LENGTHS = [1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 64, 65, 130, 300]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = native.load()
    assert found is not None, "the suite runs where there is a C++ compiler and wide vectors"
    return found


@pytest.mark.parametrize(("size", "group"), list(itertools.product([32, 64, 80, 128], [1, 2, 4])))
def test_attention_equals_torch(kernels: Kernels, size: int, group: int) -> None:
    generator = torch.Generator().manual_seed(size)
    batch = pack([Sequence([1] * n) for n in LENGTHS])
    states = [torch.randn(1, batch.tokens, n, size, generator=generator) * 1.5 for n in (4, 4 // group, 4 // group)]
    q, k, v = (x.transpose(1, 2) for x in states)
    with torch.inference_mode():
        assert kernels.can_attend(q, k, v, batch.max_length)
        got = kernels.attend(q, k, v, batch.offsets, size**-0.5)
    expected = attend_runs(q.double(), k.double(), v.double(), batch, Rule(causal=False))
    assert torch.allclose(got.double(), expected, atol=5e-6), (got - expected).abs().max()


def test_attention_survives_extreme_scores(kernels: Kernels) -> None:
    batch = pack([Sequence([1] * 40)])
    q, k, v = (torch.randn(1, 2, 40, 32) * scale for scale in (50, 50, 1))
    with torch.inference_mode():
        got = kernels.attend(q, k, v, batch.offsets, 1.0)
    expected = attend_runs(q, k, v, batch, Rule(causal=False, scaling=1.0))
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_poisoned_query_stays_poisoned_and_alone(kernels: Kernels) -> None:
    batch = pack([Sequence([1] * 20), Sequence([1] * 20)])
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    q[0, :, 3] = float("nan")
    with torch.inference_mode():
        rows = kernels.attend(q, k, v, batch.offsets, 0.2)[0].isnan().flatten(1).any(1)
    assert rows.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q[..., :20], k[..., :20], v[..., :20]),
        lambda q, k, v: (q, k, v[..., :16]),
        lambda q, k, v: (q.transpose(2, 3).contiguous().transpose(2, 3), k, v),
    ],
    ids=["dtype", "head size", "value size", "stride"],
)
def test_refuses_what_it_cannot_do(kernels: Kernels, spoil: object) -> None:
    states = spoil(*(torch.randn(1, 2, 40, 32) for _ in range(3)))  # type: ignore[operator]
    with torch.inference_mode():
        assert not kernels.can_attend(*states, longest=40)


def test_refuses_long_sequences_and_gradients(kernels: Kernels) -> None:
    states = [torch.randn(1, 2, 40, 32) for _ in range(3)]
    assert not kernels.can_attend(*states, longest=40), "autograd is on"
    with torch.inference_mode():
        assert kernels.can_attend(*states, longest=40)
        assert not kernels.can_attend(*states, longest=native.LONGEST + 1)


def test_bias_gelu_equals_torch(kernels: Kernels) -> None:
    y = torch.cat([torch.linspace(-20, 20, 2048), torch.randn(2048) * 3]).view(8, 512)
    bias = torch.randn(512)
    expected = F.gelu(y.double() + bias)
    assert torch.allclose(kernels.bias_gelu_(y.clone(), bias).double(), expected, atol=2e-6)


def test_no_compiler_means_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert native.load.__wrapped__() is None


def test_a_failing_compiler_means_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    assert native.load.__wrapped__() is None


def test_kernels_that_disagree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "agree_with_torch", lambda _: False)
    assert native.load.__wrapped__() is None


def test_the_build_is_reused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = native.build(tmp_path)
    monkeypatch.setattr(native.os, "replace", lambda *_: pytest.fail("built again"))
    assert native.build(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


class Block(nn.Module):
    """A feed-forward block whose activation may be shared, or its input used again."""

    def __init__(self, activation: nn.Module, *, reuse: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64)
        self.activation, self.reuse, self.twice = activation, reuse, twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        y = self.activation(h)
        if self.reuse:
            y = y + h
        if self.twice:
            y = y * self.activation(self.gate(x))
        return self.down(y)


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize(
    ("activation", "options", "fused"),
    [
        (nn.GELU, {}, 1),
        (nn.GELU, {"twice": True}, 1),
        (nn.GELU, {"reuse": True}, 0),
        (partial(nn.GELU, approximate="tanh"), {}, 0),  # of the same class, but not the exact form
        (nn.SiLU, {}, 1),
        (nn.ReLU, {}, 1),
        (nn.ReLU, {"reuse": True}, 0),
    ],
)
def test_fusing_never_changes_the_result(
    kernels: Kernels, with_kernels: bool, activation: Callable[[], nn.Module], options: dict[str, bool], fused: int
) -> None:
    torch.manual_seed(0)
    block = Block(activation(), **options).eval()
    x, other = torch.randn(1, 9, 32), torch.randn(1, 5, 32)
    with torch.inference_mode():
        expected, unseen = block(x).clone(), block(other).clone()
        count = fuse_epilogues(block, lambda: block(x), kernels if with_kernels else None)
        assert torch.allclose(block(x), expected, atol=2e-6)
        assert torch.allclose(block(other), unseen, atol=2e-6)
    assert count == fused
    assert block(other).requires_grad
