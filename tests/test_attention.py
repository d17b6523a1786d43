"""The packed attention function against a dense mask, for every rule that a model can express, on every branch."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cenote.tensors import attention
from cenote.tensors.attention import Rule, attend_runs, boundaries, packed_attention, varlen_kernel
from cenote.tensors.packing import Batch, Shared, pack, share
from cenote.types import Sequence

LENGTHS = (5, 5, 300, 17, 1, 17)


def batch() -> Batch:
    return pack([Sequence([1] * n) for n in LENGTHS])


def states(
    heads: int = 4, kv_heads: int = 4, size: int = 8, tokens: int = sum(LENGTHS)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, tokens, size, generator=generator) * 2 for n in (heads, kv_heads, kv_heads))
    return q, k, v


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, lengths: tuple[int, ...] = LENGTHS
) -> torch.Tensor:
    """The definition: one T x T mask, one softmax. For tests only."""
    tokens, heads = q.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
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


KIN = (320, 47, 47, 41, 33, 25, 25, 60)
"""Sequences of `kin`: four with a prefix of 40, a stranger, two with a prefix of 20, a stranger."""


def kin() -> Shared:
    owners = (1, 1, 1, 1, 9, 2, 2, 8)
    prefixes = {1: 40, 2: 20}
    ids = [
        [owner if place < prefixes.get(owner, 0) else 100 * number + place for place in range(length)]
        for number, (owner, length) in enumerate(zip(owners, KIN, strict=True), 1)
    ]
    shared = share(pack([Sequence(one) for one in ids]))
    assert shared is not None
    assert shared.batch.tokens == sum(KIN) - 3 * 40 - 20
    return shared


def dense_kin(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, shared: Shared) -> torch.Tensor:
    """Every sequence whole and by itself, and of those rows the ones that run."""
    q, k, v = (x[:, :, shared.expand_T] for x in (q, k, v))
    return dense(q, k, v, rule, KIN)[:, shared.kept_U]


SHARED_RULES = list(itertools.product([None, 1, 16, 45, 280], EXTRAS.keys() - {"bias"}, [4, 2, 1]))


@pytest.mark.parametrize(("window", "extra", "kv_heads"), SHARED_RULES)
def test_prefixes_are_seen_as_if_they_were_each_sequence_s_own(window: int | None, extra: str, kv_heads: int) -> None:
    rule = Rule(True, window, **EXTRAS[extra])
    shared = kin()
    q, k, v = states(kv_heads=kv_heads, tokens=shared.batch.tokens)
    got, expected = attend_runs(q, k, v, shared.batch, rule), dense_kin(q, k, v, rule, shared)
    assert torch.allclose(got, expected, atol=2e-6), (got - expected).abs().max()


def test_prefixes_are_for_causal_attention_without_a_bias() -> None:
    shared = kin()
    q, k, v = states(tokens=shared.batch.tokens)
    with boundaries(shared.batch) as forward:
        got = packed_attention(Layer(), q, k, v, None, scaling=0.3)[0]
        assert forward.is_causal
        for keywords in ({"is_causal": False}, {"position_bias": EXTRAS["bias"]["bias"]}):
            with pytest.raises(NotImplementedError, match="share a prefix|position bias"):
                packed_attention(Layer(), q, k, v, None, **keywords)
        assert not forward.is_causal
    assert torch.allclose(got, dense_kin(q, k, v, Rule(True, scaling=0.3), shared), atol=2e-6)


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
    """torch's varlen contract, on the CPU: `[T, N, H]`, offsets, (left, right) reach, counted from the last key."""
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    outs = []
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True
    ):
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            seen &= distance <= left
        if right >= 0:
            seen &= -distance <= right
        one_q, one_k, one_v = (
            x[at].transpose(0, 1)[None] for x, at in ((q, slice(a, b)), (k, slice(c, d)), (v, slice(c, d)))
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            one_q, one_k, one_v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def fake_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sizes: Any, softmax_scale: float, causal: bool, **rest: Any
) -> torch.Tensor:
    """flash-attn's spelling of the same."""
    assert rest.pop("softcap") == 0
    assert causal == (rest["window_size"][1] == 0)
    q, k, v = (x.contiguous() for x in (q, k, v))
    return fake_varlen(q, k, v, *sizes, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1], **rest)


KERNELS = [attention._torch_varlen, attention._flash_attn]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA branch hands the kernel the same rule; the kernels themselves are stood in for by their contract."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=fake_flash))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("kernel", "causal", "window", "kv_heads"), list(itertools.product(KERNELS, [True, False], [None, 16], [4, 2]))
)
def test_varlen_call_expresses_the_rule(kernel: Any, causal: bool, window: int | None, kv_heads: int) -> None:
    rule = Rule(causal, window, scaling=0.2)
    q, k, v = states(kv_heads=kv_heads)
    got = kernel(q, k, v, batch(), rule)
    assert torch.allclose(got, dense(q, k, v, rule), atol=2e-6)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("kernel", "window", "kv_heads"), list(itertools.product(KERNELS, [None, 16, 45], [4, 2])))
def test_varlen_call_expresses_prefixes(kernel: Any, window: int | None, kv_heads: int) -> None:
    rule = Rule(True, window, scaling=0.2)
    shared = kin()
    q, k, v = states(kv_heads=kv_heads, tokens=shared.batch.tokens)
    got = kernel(q, k, v, shared.batch, rule)
    assert torch.allclose(got, dense_kin(q, k, v, rule, shared), atol=2e-6)


def test_kernels_are_chosen_only_for_what_they_can_do() -> None:
    assert varlen_kernel(torch.float32, Rule(True)) is None
    assert varlen_kernel(torch.bfloat16, Rule(True, bias=torch.zeros(1))) is None
    assert varlen_kernel(torch.bfloat16, Rule(True, sinks=torch.zeros(1))) is None
    assert varlen_kernel(torch.bfloat16, Rule(True, softcap=1.0)) is None
    assert varlen_kernel(torch.float16, Rule(False, window=4)) is attention._torch_varlen
