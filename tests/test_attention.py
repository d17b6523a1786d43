"""The packed attention function against a dense mask, for every rule that a model can express, on every branch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cenote.tensors import attention
from cenote.tensors.attention import Rule, attend_runs, boundaries, packed_attention, varlen_kernel
from cenote.tensors.packing import Batch, pack
from cenote.types import Sequence

LENGTHS = (5, 5, 300, 17, 1, 17)


def batch() -> Batch:
    return pack([Sequence([1] * n) for n in LENGTHS])


def states(heads: int = 4, kv_heads: int = 4, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    q, k, v = (torch.randn(1, n, tokens, size, generator=generator) * 2 for n in (heads, kv_heads, kv_heads))
    return q, k, v


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The definition: one T x T mask, one softmax. For tests only."""
    tokens, heads = q.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    distance = position[:, None] - position
    seen = owner[:, None] == owner
    if rule.causal:
        seen &= distance >= 0
    if rule.window:
        seen &= distance.abs() < rule.window
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling)
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.bias is not None:
        scores = scores + rule.bias[0][:, position[:, None].expand(tokens, tokens), position.expand(tokens, tokens)]
    scores = scores.masked_fill(~seen, float("-inf"))
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.view(1, -1, 1, 1).expand(1, heads, tokens, 1)], dim=-1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaling": {"scaling": 0.11},
    "softcap": {"softcap": 3.0},
    "bias": {"bias": torch.randn(1, 4, 300, 300, generator=torch.Generator().manual_seed(1))},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize(
    ("causal", "window", "extra", "kv_heads"),
    list(itertools.product([True, False], [None, 1, 16, 280], EXTRAS, [4, 2, 1])),
)
def test_equals_dense_mask(causal: bool, window: int | None, extra: str, kv_heads: int) -> None:
    rule = Rule(causal, window, **EXTRAS[extra])
    q, k, v = states(kv_heads=kv_heads)
    got = attend_runs(q, k, v, batch(), rule)
    assert torch.allclose(got, dense(q, k, v, rule), atol=2e-6), (got - dense(q, k, v, rule)).abs().max()


class Layer(torch.nn.Module):
    is_causal = True


def call(module: torch.nn.Module | None = None, **keywords: Any) -> torch.Tensor:
    with boundaries(batch()):
        return packed_attention(module or Layer(), *states(), None, **keywords)[0]


def test_keyword_beats_module_on_causality() -> None:
    q, k, v = states()
    assert torch.allclose(call(is_causal=False), dense(q, k, v, Rule(causal=False)), atol=2e-6)
    assert torch.allclose(call(), dense(q, k, v, Rule(causal=True)), atol=2e-6)


def test_refuses_unknown_keywords_by_name() -> None:
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        call(alibi_slopes=torch.ones(4))
    call(alibi_slopes=None, dropout=0.1, position_ids=torch.arange(3))


def test_refuses_a_module_that_does_not_say_whether_it_is_causal() -> None:
    with pytest.raises(NotImplementedError, match="causal"):
        call(torch.nn.Linear(1, 1))


def test_refuses_a_mask_that_hides_something() -> None:
    q, k, v = states()
    hiding = torch.zeros(1, 1, 1, sum(LENGTHS))
    with boundaries(batch()):
        packed_attention(Layer(), q, k, v, hiding)
        hiding[..., 3] = -1e9
        with pytest.raises(NotImplementedError, match="mask"):
            packed_attention(Layer(), q, k, v, hiding)
        with pytest.raises(NotImplementedError, match="mask"):
            packed_attention(Layer(), q, k, v, hiding == 0)


def test_refuses_tokens_that_are_not_the_batch() -> None:
    q, k, v = states()
    with boundaries(batch()), pytest.raises(RuntimeError, match="expected the batch's"):
        packed_attention(Layer(), q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], None)
    with pytest.raises(RuntimeError, match="outside a packed forward"):
        packed_attention(Layer(), q, k, v, None)


def test_a_forward_that_never_attends_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not call"), boundaries(batch()):
        pass


def fake_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's varlen contract, on the CPU: `[T, N, H]`, offsets, (left, right) reach."""
    assert q.is_contiguous()
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max(LENGTHS) == max_k
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    outs = []
    for a, b in itertools.pairwise(cu_seq_q.tolist()):
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            seen &= distance <= left
        if right >= 0:
            seen &= -distance <= right
        one_q, one_k, one_v = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            one_q, one_k, one_v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize(("causal", "window", "kv_heads"), list(itertools.product([True, False], [None, 16], [4, 2])))
def test_varlen_call_expresses_the_rule(
    causal: bool, window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA branch hands the kernel the same rule; the kernel itself is stood in for by its contract."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen)
    rule = Rule(causal, window, scaling=0.2)
    q, k, v = states(kv_heads=kv_heads)
    got = attention._torch_varlen(q, k, v, batch(), rule)
    assert torch.allclose(got, dense(q, k, v, rule), atol=2e-6)


def test_kernels_are_chosen_only_for_what_they_can_do() -> None:
    assert varlen_kernel(torch.float32, Rule(True)) is None
    assert varlen_kernel(torch.bfloat16, Rule(True, bias=torch.zeros(1))) is None
    assert varlen_kernel(torch.bfloat16, Rule(True, sinks=torch.zeros(1))) is None
    assert varlen_kernel(torch.bfloat16, Rule(True, softcap=1.0)) is None
    assert varlen_kernel(torch.float16, Rule(False, window=4)) is attention._torch_varlen
