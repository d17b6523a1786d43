"""The packed attention function against a dense mask, for every rule that a model can express, on every branch."""

from __future__ import annotations

import inspect
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import CausalVariant

from cenote.core import Sequence
from cenote.tensors import attention
from cenote.tensors.attention import (
    Rule,
    Spans,
    attend_at,
    attend_fused,
    attend_runs,
    boundaries,
    packed_attention,
    varlen_kernel,
)
from cenote.tensors.packing import Batch, Place, pack, set_apart
from cenote.tensors.sharing import Shared, share
from tests import tape

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


SHARED_RULES = list(itertools.product([None, 1, 16, 45, 280], sorted(EXTRAS.keys() - {"bias"}), [4, 2, 1]))


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


def flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sizes: Any, softmax_scale: float, causal: bool, **rest: Any
) -> torch.Tensor:
    """flash-attn's spelling of the same."""
    assert rest.pop("softcap") == 0
    assert causal == (rest["window_size"][1] == 0)
    assert rest.keys() == {"window_size"}
    return tape.varlen(q, k, v, *sizes, softmax_scale, list(rest["window_size"]))[0]


def efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    custom_mask_type: int,
    *,
    scale: float,
    window_size: int | None,
) -> tuple[torch.Tensor]:
    """The private operator behind torch's nested tensors; equal heads only, a window only back from the last key."""
    assert bias is None
    assert dropout_p == 0
    assert custom_mask_type == (2 if window_size else custom_mask_type)
    assert query.shape[2] == key.shape[2]
    offsets = (cu_seqlens_q, cu_seqlens_k)
    window = [window_size - 1 if window_size else -1, 0 if custom_mask_type == 2 else -1]
    return (tape.varlen(query[0], key[0], value[0], *offsets, max_seqlen_q, max_seqlen_k, scale, window)[0][None],)


KERNELS = [attention._flash, attention._flash_attn, attention._efficient]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for GPUs hands the kernel the same rule; the kernels themselves are stood in for by their contract."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", tape.flash_attention_forward)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn))
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)


def test_the_stand_ins_have_the_signatures_of_the_kernels() -> None:
    for real, stand_in, places in (
        (torch.ops.aten._flash_attention_forward, tape.flash_attention_forward, 10),
        (torch.ops.aten._efficient_attention_forward, efficient, 10),
    ):
        schema, given = real.default._schema.arguments, inspect.signature(stand_in).parameters.values()
        by_place = [a.name for a in schema if not a.kwarg_only]
        assert by_place[:places] == [p.name for p in given if p.kind is not p.KEYWORD_ONLY]
        assert {p.name for p in given if p.kind is p.KEYWORD_ONLY} <= {a.name for a in schema if a.kwarg_only}
        assert all(a.has_default_value() for a in schema if a.name not in {p.name for p in given})
    assert int(CausalVariant.LOWER_RIGHT) == attention.CAUSAL_FROM_THE_END


def spans(whole: Batch) -> Spans:
    return Spans(whole.cu_seqlens, whole.max_length, whole.keys)


def may(kernel: Any, rule: Rule) -> bool:
    return kernel is not attention._efficient or rule.causal or rule.window is None


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("kernel", "causal", "window", "kv_heads", "size"),
    list(itertools.product(KERNELS, [True, False], [None, 16], [4, 2], [8, 6])),
)
def test_varlen_call_expresses_the_rule(
    kernel: Any, causal: bool, window: int | None, kv_heads: int, size: int
) -> None:
    for rule in (Rule(causal, window, scaling=0.2), Rule(causal, window)):
        q, k, v = states(kv_heads=kv_heads, size=size)
        if may(kernel, rule):
            got = kernel(q, k, v, spans(batch()), rule)
            assert got.shape == (1, sum(LENGTHS), 4, size)
            assert torch.allclose(got, dense(q, k, v, rule), atol=2e-6)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("kernel", "window", "kv_heads"), list(itertools.product(KERNELS, [None, 16, 45], [4, 2])))
def test_varlen_call_expresses_prefixes(kernel: Any, window: int | None, kv_heads: int) -> None:
    rule = Rule(True, window, scaling=0.2)
    shared = kin()
    q, k, v = states(kv_heads=kv_heads, tokens=shared.batch.tokens)
    got = kernel(q, k, v, spans(shared.batch), rule)
    assert torch.allclose(got, dense_kin(q, k, v, rule, shared), atol=2e-6)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("window", "causal"), [(None, False), (16, False), (None, True), (16, True)])
def test_varlen_call_expresses_sinks(window: int | None, causal: bool) -> None:
    rule = Rule(causal, window, sinks=EXTRAS["sinks"]["sinks"])
    q, k, v = states(kv_heads=2)
    got = attention._flash(q, k, v, spans(batch()), rule)
    assert torch.allclose(got, dense(q, k, v, rule), atol=2e-6)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_may_have_heads_of_another_size(kernel: Any) -> None:
    q, k, _ = states(size=12)
    _, _, v = states(size=20)
    rule = Rule(False)
    got = kernel(q, k, v, spans(batch()), rule)
    assert torch.allclose(got, dense(q, k, v, rule), atol=2e-6)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, stand_ins: None) -> list[str]:
    """CPU tensors are taken for those of a GPU with kernels for halves; the kernels that were called."""
    called: list[str] = []

    def choose(q: torch.Tensor, v: torch.Tensor, rule: Rule) -> Any:
        kernel = varlen_kernel(q.to("meta", torch.bfloat16), v.to("meta"), rule)
        called.append(kernel.__name__ if kernel else "runs")
        return kernel

    monkeypatch.setattr(attention, "FUSED_ON", frozenset({"cpu"}))
    monkeypatch.setattr(attention, "varlen_kernel", choose)
    monkeypatch.setattr(attention, "_is_ampere", lambda device: True)
    return called


def test_hidden_tokens_see_what_lies_before_them_in_one_call(gpu: list[str]) -> None:
    apart = set_apart(pack([Sequence([1] * n, hidden=n // 3) for n in (9, 30, 2)]))
    q, k, v = states(tokens=41)
    for causal, window, kernels in ((False, None, ["_flash"]), (False, 40, ["_flash"]), (True, None, [])):
        gpu.clear()
        with boundaries(apart) as forward:
            got = packed_attention(Layer(), q, k, v, None, is_causal=causal, sliding_window=window)[0]
        assert torch.allclose(got, attend_runs(q, k, v, apart, Rule(causal)), atol=2e-6)
        assert forward.is_fused == bool(kernels)
        assert gpu == kernels


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 16, 400])
@pytest.mark.parametrize(("place", "causal"), [("first", False), ("last", False), ("last", True)])
def test_one_token_of_each_sequence_sees_what_it_saw(
    gpu: list[str], place: Place, causal: bool, window: int | None, kv_heads: int
) -> None:
    shared = kin().batch if causal else batch()
    q, k, v = states(kv_heads=kv_heads, tokens=shared.tokens)
    rule = Rule(causal, window)
    q_1NBH = q[:, :, shared.rows_at(place)]
    got = attend_fused(q_1NBH, k, v, shared, rule, place)
    assert (got is None) == (place == "first" and window == 16)
    expected = attend_at(place, q_1NBH, k, v, shared, rule)
    assert torch.allclose(expected, attend_runs(q, k, v, shared, rule)[:, shared.rows_at(place)], atol=2e-6)
    if got is not None:
        assert torch.allclose(got, expected, atol=2e-6)


def test_a_window_that_no_sequence_reaches_is_none(gpu: list[str]) -> None:
    q, k, v = states()
    with boundaries(batch()):
        for window, kernel in ((300, "_efficient"), (299, "runs")):
            gpu.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(attention, "_is_ampere", lambda device: False)
                got = packed_attention(Layer(), q, k, v, None, is_causal=False, sliding_window=window)[0]
            assert gpu == [kernel]
            assert torch.allclose(got, dense(q, k, v, Rule(False, window)), atol=2e-6)


def test_kernels_are_chosen_only_for_what_they_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(rule: Rule, dtype: torch.dtype = torch.bfloat16, size: int = 64) -> Any:
        q = torch.empty(1, 2, 3, size, dtype=dtype, device="meta")
        return varlen_kernel(q, q, rule)

    ampere = installed = True
    monkeypatch.setattr(attention, "_is_ampere", lambda device: ampere)
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: installed)
    assert chosen(Rule(False, window=4), torch.float16) is attention._flash
    assert chosen(Rule(True, sinks=torch.zeros(1))) is attention._flash
    assert chosen(Rule(True, bias=torch.zeros(1))) is None
    assert chosen(Rule(True, softcap=1.0)) is attention._flash_attn
    assert chosen(Rule(True, softcap=1.0, sinks=torch.zeros(1))) is None
    assert chosen(Rule(True, window=4), torch.float32) is attention._efficient
    assert chosen(Rule(False, window=4), torch.float32) is None
    assert chosen(Rule(True, sinks=torch.zeros(1)), torch.float32) is None
    assert chosen(Rule(False), size=264) is attention._efficient
    installed = False
    assert chosen(Rule(True, softcap=1.0)) is None
    installed, ampere = True, False
    assert chosen(Rule(True, softcap=1.0)) is None
    assert chosen(Rule(False)) is attention._efficient
