"""Packing loses nothing: rows stay in order, belong to their sequence, and split as they were packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cenote.core import Sequence
from cenote.tensors import packing, sharing
from cenote.tensors.packing import Batch, Run, pack
from cenote.tensors.sharing import common_prefix, share

sequences = st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=30), min_size=1, max_size=12)


@given(sequences)
def test_split_undoes_pack(ids: list[list[int]]) -> None:
    batch = pack([Sequence(one) for one in ids])
    assert [part.tolist() for part in batch.split(batch.ids_T)] == ids
    assert [part.tolist() for part in batch.split(batch.positions_T)] == [list(range(len(one))) for one in ids]
    assert batch.cu_seqlens.tolist() == [sum(map(len, ids[:i])) for i in range(len(ids) + 1)]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_length == max(map(len, ids))
    assert batch.type_ids_T is None


@given(sequences)
def test_runs_cover_the_batch_once(ids: list[list[int]]) -> None:
    batch = pack([Sequence(one) for one in sorted(ids, key=len)])
    covered = [row for run in batch.runs for row in range(run.start, run.start + run.size * run.length)]
    assert covered == list(range(batch.tokens))
    assert len(batch.runs) == len({len(one) for one in ids})


@given(sequences, st.data())
def test_select_is_packing_the_chosen(ids: list[list[int]], data: st.DataObject) -> None:
    members = data.draw(st.lists(st.sampled_from(range(len(ids))), min_size=1, unique=True))
    batch = pack([Sequence(one, skip=i % 2) for i, one in enumerate(ids)])
    part, rows = batch.select(members)
    again = pack([Sequence(ids[i], skip=i % 2) for i in members])
    assert part.ids_T.tolist() == again.ids_T.tolist() == batch.ids_T[rows].tolist() == part.host_ids_T.tolist()
    assert part.positions_T.tolist() == again.positions_T.tolist()
    assert part.starts == again.starts
    assert (part.skips or (0,) * len(members)) == (again.skips or (0,) * len(members))


def test_type_ids_default_to_zero_beside_given_ones() -> None:
    batch = pack([Sequence([1, 2, 3]), Sequence([4, 5], type_ids=[0, 1])])
    assert batch.type_ids_T is not None
    assert batch.type_ids_T.tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("empty", [[], [Sequence([])], [Sequence([1]), Sequence([])]])
def test_refuses_empty_sequences(empty: list[Sequence]) -> None:
    with pytest.raises(ValueError, match="none may be empty"):
        pack(empty)


chunks = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@st.composite
def related(draw: st.DrawFn) -> list[list[int]]:
    """Sequences made of the same few chunks: prefixes of prefixes, twins and strangers."""
    pool = draw(st.lists(chunks, min_size=1, max_size=3))
    chains = st.lists(st.sampled_from(pool), min_size=1, max_size=4)
    made = draw(st.lists(chains, min_size=1, max_size=9))
    return [[token for chunk in chain for token in chunk] for chain in made]


def seen(batch: Batch, x_T: torch.Tensor) -> list[list[int]]:
    """The rows that each sequence sees."""
    rows = batch.keys.rows_K
    assert rows is not None
    assert batch.keys.cu_seqlens.dtype == torch.int32
    return [part.tolist() for part in torch.tensor_split(x_T[rows], batch.keys.cu_seqlens[1:-1].long())]


@given(related())
def test_sharing_loses_nothing(ids: list[list[int]]) -> None:
    batch = pack([Sequence(one) for one in ids])
    shared = share(batch)
    if shared is None:
        return
    small = shared.batch
    assert small.tokens < batch.tokens
    assert small.ids_T.tolist() == batch.ids_T[shared.kept_U].tolist() == small.host_ids_T.tolist()
    assert small.ids_T[shared.expand_T].tolist() == batch.ids_T.tolist()
    assert small.positions_T[shared.expand_T].tolist() == batch.positions_T.tolist()
    assert all(positions == list(range(len(positions))) for positions in seen(small, small.positions_T))
    views = seen(small, small.ids_T)
    assert small.keys.max_length == max(map(len, views))
    ends = {end - 1: view for end, view in zip(small.starts[1:], views, strict=True)}
    last = [int(shared.expand_T[end - 1]) for end in batch.starts[1:]]
    assert len({*last}) == len(ids), "every sequence keeps a row of its own"
    assert [ends[row] for row in last] == ids


@given(related())
def test_a_common_prefix_is_shared(ids: list[list[int]]) -> None:
    sequences = [Sequence(one) for one in ids]
    expected = 0
    while len(ids) > 1 and all(len(one) > expected + 1 and one[expected] == ids[0][expected] for one in ids):
        expected += 1
    shared = common_prefix(sequences)
    assert shared == (expected if expected >= sharing.SHORTEST_PREFIX else 0)
    small = share(pack(sequences))
    assert (small.batch.tokens if small else sum(map(len, ids))) <= sum(map(len, ids)) - shared * (len(ids) - 1)


def tokens(*parts: tuple[int, int]) -> Sequence:
    """`(token, count)` end to end."""
    return Sequence([token for token, count in parts for _ in range(count)])


def laid(*sequences: Sequence) -> list[tuple[int, int]]:
    """Length and prefix length of what runs, in its order; empty if nothing is shared."""
    shared = share(pack(sequences))
    if shared is None or shared.batch.prefixes is None:
        return []
    return [(length, len(prefix)) for length, prefix in zip(shared.batch.lengths, shared.batch.prefixes, strict=True)]


def test_prefixes_are_chosen_to_spare_most() -> None:
    common = (1, 20)
    deep = [tokens(common, (2, 50), (token, 5)) for token in range(3, 7)]
    other = [tokens(common, (8, 40), (token, 5)) for token in range(3, 5)]
    assert sorted(laid(*deep, *other)) == sorted([(70, 0), *[(5, 70)] * 4, (60, 0), *[(5, 60)] * 2])
    wide = [tokens(common, (token, 5)) for token in range(10, 19)]
    twins = [tokens(common, (2, 9), (token, 2)) for token in (5, 6)]
    assert laid(*wide, *twins) == [(20, 0), (11, 20), (11, 20), *[(5, 20)] * 9]


def test_equal_sequences_keep_their_last_token() -> None:
    assert laid(*[tokens((1, 30))] * 3) == [(29, 0), *[(1, 29)] * 3]
    assert laid(tokens((1, 30)), tokens((1, 30), (2, 4))) == [(29, 0), (5, 29), (1, 29)]


def test_strangers_stay_whole_and_in_order() -> None:
    kin = [tokens((1, 20), (token, 3)) for token in (2, 3)]
    assert laid(tokens((5, 9)), kin[0], tokens((6, 40)), kin[1]) == [(20, 0), (3, 20), (3, 20), (9, 0), (40, 0)]


def test_short_prefixes_and_typed_tokens_are_not_shared() -> None:
    assert laid(tokens((1, 15), (2, 9)), tokens((1, 15), (3, 9))) == []
    assert laid(tokens((1, 16)), tokens((1, 16))) == [], "each would keep no token of its own"
    assert laid(tokens((1, 17)), tokens((1, 17))) == [(16, 0), (1, 16), (1, 16)]
    typed = Sequence([1] * 30, type_ids=[0] * 29 + [1])
    assert laid(typed, typed) == []
    assert common_prefix([typed, typed]) == 0


def test_runs_part_at_prefixes_and_where_copies_grow_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [tokens((p, 20), (token, 4)) for p in (1, 2) for token in (5, 6, 7)]
    shared = share(pack([*sequences, tokens((9, 4))]))
    assert shared is not None
    first, second = range(20), range(32, 52)
    runs = (Run(0, 1, 20), Run(20, 3, 4, first), Run(32, 1, 20), Run(52, 3, 4, second), Run(64, 1, 4))
    assert shared.batch.runs == runs
    monkeypatch.setattr(packing, "MOST_KEYS", 2 * 24)
    shared = share(pack(sequences[:3]))
    assert shared is not None
    assert shared.batch.runs == (Run(0, 1, 20), Run(20, 2, 4, first), Run(28, 1, 4, first))
