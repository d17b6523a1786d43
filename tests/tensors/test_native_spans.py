"""The native attention gives a query the same bits, whatever is computed beside it and wherever its keys lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cenote.core import Sequence
from cenote.tensors import native
from cenote.tensors.attention import Rule, attend_at, attend_runs
from cenote.tensors.native import Kernels
from cenote.tensors.packing import PLACES, Batch, Place, pack, set_apart, spans_of

if native.chosen("auto") == "none":
    pytest.skip("CENOTE_ISA switches the kernels off", allow_module_level=True)

PREFIX = 37
ENDS = (1, 2, 5, 16, 23, 64, 70)
RULES = [(False, None), (True, None), (True, 9), (True, 40), (True, 200), (False, 20)]
"""Causal or not, and the window."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = native.load()
    assert loaded is not None, "the suite runs where there is a C++ compiler and wide vectors"
    return loaded


def states(tokens: int, size: int = 32) -> list[Tensor]:
    """Queries, and keys and values with half as many heads, `[1, N, T, H]`."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, tokens, heads, size, generator=generator).transpose(1, 2) for heads in (4, 2, 2)]


def shared() -> Batch:
    """A prefix, and sequences that continue it."""
    batch = pack([Sequence([1] * n) for n in (PREFIX, *ENDS)])
    return replace(batch, prefixes=(range(0), *[range(PREFIX)] * len(ENDS)))


@pytest.mark.parametrize(("causal", "window"), [rule for rule in RULES if rule[0]])
def test_keys_of_a_prefix_count_as_own_ones_bit_by_bit(kernels: Kernels, causal: bool, window: int | None) -> None:
    batch = shared()
    q, k, v = states(batch.tokens)
    with torch.inference_mode():
        found = kernels.attend(q, k, v, batch.spans_B7, 0.2, causal=causal, window=window)
        for rows in batch.rows[1:]:
            own = [x[:, :, [*range(PREFIX), *rows]] for x in (q, k, v)]
            whole = kernels.attend(*own, spans_of([0, PREFIX + len(rows)]), 0.2, causal=causal, window=window)
            assert torch.equal(found[:, rows.start : rows.stop], whole[:, PREFIX:])
    expected = attend_runs(q.double(), k.double(), v.double(), batch, Rule(causal, window, 0.2))
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize(("causal", "window"), RULES)
@pytest.mark.parametrize("place", PLACES)
def test_single_queries_get_the_bits_of_all(kernels: Kernels, place: Place, causal: bool, window: int | None) -> None:
    batch = shared() if causal else pack([Sequence([1] * n) for n in ENDS])
    q, k, v = states(batch.tokens)
    q_1NBH = q[:, :, batch.rows_at(place)]
    with torch.inference_mode():
        every = kernels.attend(q, k, v, batch.spans_B7, 0.2, causal=causal, window=window)
        found = kernels.attend(q_1NBH, k, v, batch.spans_at(place), 0.2, causal=causal, window=window)
    assert torch.equal(found, every[:, batch.rows_at(place)])
    expected = attend_at(place, q_1NBH.double(), k.double(), v.double(), batch, Rule(causal, window, 0.2))
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_tokens_see_what_lies_before_them(kernels: Kernels, causal: bool) -> None:
    batch = set_apart(pack([Sequence([1] * n, hidden=n // 3) for n in (9, 30, 2, 70)]))
    q, k, v = states(batch.tokens)
    with torch.inference_mode():
        found = kernels.attend(q, k, v, batch.spans_B7, 0.2, causal=causal)
    expected = attend_runs(q.double(), k.double(), v.double(), batch, Rule(causal, scaling=0.2))
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_neighbours_and_threads_move_no_bit(kernels: Kernels, threads: int) -> None:
    batch = pack([Sequence([1] * n) for n in (*ENDS, *ENDS[::-1], 300)])
    q, k, v = states(batch.tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            found = kernels.attend(q, k, v, batch.spans_B7, 0.2)
            for rows in batch.rows:
                own = [x[:, :, rows.start : rows.stop] for x in (q, k, v)]
                alone = kernels.attend(*own, spans_of([0, len(rows)]), 0.2)
                assert torch.equal(found[:, rows.start : rows.stop], alone)
    finally:
        torch.set_num_threads(before)
