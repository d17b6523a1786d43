"""Packing loses nothing: rows stay in order, belong to their sequence, and split as they were packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cenote.tensors.packing import pack
from cenote.types import Sequence

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
    covered = [row for start, size, length in batch.runs for row in range(start, start + size * length)]
    assert covered == list(range(batch.tokens))
    assert len(batch.runs) == len({len(one) for one in ids})


@given(sequences, st.data())
def test_select_is_packing_the_chosen(ids: list[list[int]], data: st.DataObject) -> None:
    members = data.draw(st.lists(st.sampled_from(range(len(ids))), min_size=1, unique=True))
    batch = pack([Sequence(one, skip=i % 2) for i, one in enumerate(ids)])
    part, rows = batch.select(members)
    again = pack([Sequence(ids[i], skip=i % 2) for i in members])
    assert part.ids_T.tolist() == again.ids_T.tolist() == batch.ids_T[rows].tolist()
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
