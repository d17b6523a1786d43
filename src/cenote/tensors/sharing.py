"""Common beginnings of a batch's sequences, laid out once."""

from __future__ import annotations

from itertools import accumulate, pairwise, starmap
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cenote.functions import optional
from cenote.tensors.packing import Batch, numbers_in, pack, upload

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from cenote.core import Sequence
    from cenote.tensors.packing import Ids

SHORTEST_PREFIX = 16
"""Minimum length of a shared prefix, in tokens. Shorter ones would save less than keeping them apart costs."""


class Shared(NamedTuple):
    """A batch whose common prefixes are laid out once.

    Attributes:
        batch: the batch to run, of U tokens: prefixes, the sequences that follow them, and those that share nothing.
        kept_U: int64 rows of the original batch that it consists of.
        expand_T: int64 row of it that stands for each row of the original batch.
    """

    batch: Batch
    kept_U: Tensor
    expand_T: Tensor


class Group(NamedTuple):
    """Sequences with a common prefix.

    Attributes:
        shared: length of the prefix, in tokens.
        members: numbers of the sequences, longest first.
    """

    shared: int
    members: list[int]


class Piece(NamedTuple):
    """Rows of a batch, and the number of the piece that they continue, -1 if none."""

    rows: range
    prefix: int = -1


def share(batch: Batch) -> Shared | None:
    """Lay prefixes that sequences have in common out once; `None` if there are none, or tokens have types.

    A sequence has one prefix at most and keeps a token of its own at least. Fit for causal models only: there, the
    states of a prefix do not depend on the tokens that follow.
    """
    if batch.host_type_ids_T is not None or batch.hides:
        return None
    groups = _common_prefixes(batch)
    if not groups:
        return None
    pieces = _pieces(batch, groups)
    starts = tuple(accumulate((len(piece.rows) for piece in pieces), initial=0))
    kept_U = numbers_in(piece.rows for piece in pieces)
    expand_T = np.empty(batch.tokens, dtype=np.int64)
    expand_T[kept_U] = np.arange(starts[-1])
    for shared, members in groups:
        first = batch.starts[members[0]]
        for i in members[1:]:
            start = batch.starts[i]
            expand_T[start : start + shared] = expand_T[first : first + shared]
    places = [*starmap(range, pairwise(starts)), range(0)]  # the last one is that of no prefix, number -1
    physical = Batch(
        host_ids_T=batch.host_ids_T[kept_U],
        host_positions_T=batch.host_positions_T[..., kept_U],
        host_type_ids_T=None,
        starts=starts,
        device=batch.device,
        prefixes=tuple(places[piece.prefix] for piece in pieces),
        media=batch.media,
        host_sources_T=optional(itemgetter(kept_U), batch.host_sources_T),
        features=batch.features,
    )
    return Shared(physical, *upload([kept_U, expand_T], batch.device))


def _pieces(batch: Batch, groups: list[Group]) -> list[Piece]:
    """Cut a batch into prefixes, each followed by the rests of its sequences, and sequences that share nothing."""
    pieces: list[Piece] = []
    alone = dict(enumerate(batch.rows))
    for shared, members in groups:
        prefix = len(pieces)
        pieces.append(Piece(batch.rows[members[0]][:shared]))
        pieces += [Piece(alone.pop(i)[shared:], prefix) for i in members]
    return [*pieces, *map(Piece, alone.values())]


def _common_prefixes(batch: Batch) -> list[Group]:
    """Return the groups of sequences whose prefixes are to be shared: those of one salt, as others are kept apart."""
    ids = [batch.identity_T[rows.start : rows.stop] for rows in batch.rows]
    alike: dict[tuple[str | None, bytes], list[int]] = {}
    for i, (ids_T, sequence) in enumerate(zip(ids, batch.sequences, strict=True)):
        if len(ids_T) > SHORTEST_PREFIX:
            alike.setdefault((sequence.salt, ids_T[:SHORTEST_PREFIX].tobytes()), []).append(i)
    groups: list[Group] = []
    for members in alike.values():
        if len(members) > 1:
            groups += _partition({i: ids[i] for i in members})
    return groups


def _partition(ids: dict[int, Ids]) -> list[Group]:
    """Sort sequences by their tokens, and cut that order into groups so that their prefixes spare most tokens.

    Sequences with a long common prefix lie side by side within those with a shorter one, so the best cut before each
    place follows from the best ones before the places to its left.
    """
    order = sorted(ids, key=lambda i: ids[i].tobytes())
    common = np.array([_in_common(ids[a], ids[b]) for a, b in pairwise(order)])
    count = len(order)
    best, cut = np.zeros(count + 1, dtype=np.int64), [0] * (count + 1)
    lowest = np.full(count, np.iinfo(np.int64).max)  # [i]: tokens that the sequences from i to the current one share
    for stop in range(2, count + 1):
        np.minimum(lowest[: stop - 1], common[stop - 2], out=lowest[: stop - 1])
        spared = best[: stop - 1] + lowest[: stop - 1] * np.arange(stop - 1, 0, -1)
        i = int(spared.argmax())
        best[stop], cut[stop] = max((int(best[stop - 1]), stop - 1), (int(spared[i]), i), key=lambda x: x[0])
    groups = []
    stop = count
    while stop > 1:
        start = cut[stop]
        if stop - start > 1:
            members = sorted(order[start:stop], key=lambda i: (-len(ids[i]), i))
            groups.append(Group(int(common[start : stop - 1].min()), members))
        stop = start
    return groups


def _in_common(a: Ids, b: Ids) -> int:
    """Count the leading tokens that two sequences have in common, a last one of each left over."""
    most = min(len(a), len(b)) - 1
    differing = np.flatnonzero(a[:most] != b[:most])
    return int(differing[0]) if len(differing) else most


def common_prefix(sequences: Seq[Sequence]) -> int:
    """Count the leading tokens that all `sequences` have in common and `share` would lay out once; 0 if too few."""
    if len(sequences) < 2 or any(s.type_ids is not None for s in sequences):
        return 0
    shared = min(map(len, sequences)) - 1
    rows = _identities(sequences)
    first = list(rows[0][:shared])
    for row in rows:
        ids = list(row[:shared])
        if ids != first:
            shared = next(i for i, (a, b) in enumerate(zip(first, ids, strict=True)) if a != b)
            first = first[:shared]
        if shared < SHORTEST_PREFIX:
            return 0
    return shared


def _identities(sequences: Seq[Sequence]) -> Seq[Seq[int]]:
    """Return the numbers by which the tokens of each sequence are alike."""
    if not any(map(attrgetter("media"), sequences)):
        return [s.ids for s in sequences]
    batch = pack(sequences)
    return np.split(batch.identity_T, batch.starts[1:-1])  # type: ignore[return-value]
