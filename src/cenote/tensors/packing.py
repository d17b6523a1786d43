"""A batch is sequences laid end to end: no padding, one row per real token.

Shapes are in the names, here and everywhere in Cenote: T tokens of the whole batch, B sequences, D hidden size,
N attention heads, H head size.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise, starmap
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from cenote.functions import optional

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from cenote.core import Media, Sequence

    Ids = np.ndarray[tuple[int], np.dtype[np.int64]]

Place = Literal["first", "last"]
"""A token of a sequence."""
PLACES: tuple[Place, ...] = ("first", "last")
MOST_KEYS = 4096
"""Maximum rows that the sequences of a run with a prefix see, added up: each has a copy of the prefix's keys."""


class Run(NamedTuple):
    """Neighbouring sequences of one length: rows `start` to `start + size * length`, which continue `prefix`."""

    start: int
    size: int
    length: int
    prefix: range = range(0)


class Keys(NamedTuple):
    """The rows that each sequence sees, as varlen kernels take them.

    Attributes:
        rows_K: int64 rows of the batch, each sequence's after its prefix's; `None` if they are the batch's own.
        cu_seqlens: int32 offsets into them.
        max_length: maximum number of rows that a sequence sees.
    """

    rows_K: Tensor | None
    cu_seqlens: Tensor
    max_length: int


class Features(NamedTuple):
    """Rows that take the places of token embeddings.

    Attributes:
        rows_FD: the rows.
        deep: of the same shape each: added to the hidden states of these tokens behind the first layers, in order.
    """

    rows_FD: Tensor
    deep: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(layer_FD.nbytes for layer_FD in self._layers)

    @property
    def _layers(self) -> tuple[Tensor, ...]:
        return (self.rows_FD, *self.deep)

    def split(self, lengths: list[int]) -> Iterator[Features]:
        """Yield parts of so many rows, views of these."""
        for rows_FD, *deep in zip(*(torch.split(layer_FD, lengths) for layer_FD in self._layers), strict=True):
            yield Features(rows_FD, tuple(deep))

    @classmethod
    def joined(cls, parts: Seq[Features]) -> Features:
        """Return the rows of several, end to end."""
        rows_FD, *deep = (torch.cat(layers) for layers in zip(*(part._layers for part in parts), strict=True))
        return cls(rows_FD, tuple(deep))


@dataclass(frozen=True)
class Batch:
    """Sequences end to end. Sequence `i` owns the rows `starts[i]:starts[i + 1]`.

    Its arrays lie on the host; tensors on the device are made on first use.

    Attributes:
        host_ids_T: int64 token ids.
        host_positions_T: int64 position of each token in its own sequence, from 0; after its prefix, where it has one.
            `[3, T]` where a token has a frame, a row and a column.
        host_type_ids_T: int64 token type ids, or `None` when no sequence carries any.
        starts: B + 1 offsets.
        device: where its tensors are.
        sequences: source of the rows; `()` where rows are pieces of sequences (`share`, `set_apart`).
        prefixes: per sequence, the rows of this batch that it continues; `None` when no sequence has any.
        blind: a sequence with a prefix sees nothing but it, not even itself.
        media: the pictures of the sequences, each content once for each salt.
        host_sources_T: int64 row of the features of `media`, end to end, that each token gets in place of its
            embedding; -1 = it keeps its own; `None` = there are no pictures.
        features: of `media`, once they are computed.
    """

    host_ids_T: Ids
    host_positions_T: np.ndarray[Any, np.dtype[np.int64]]
    host_type_ids_T: Ids | None
    starts: tuple[int, ...]
    device: torch.device
    sequences: tuple[Sequence, ...] = ()
    prefixes: tuple[range, ...] | None = None
    blind: bool = False
    media: tuple[Media, ...] = ()
    host_sources_T: Ids | None = None
    features: Features | None = None

    @property
    def size(self) -> int:
        """Number of sequences, B."""
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.starts[-1]

    @cached_property
    def rows(self) -> tuple[range, ...]:
        """Rows of each sequence."""
        return tuple(starmap(range, pairwise(self.starts)))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per sequence, on the host."""
        return tuple(map(operator.sub, self.starts[1:], self.starts))

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @cached_property
    def skips(self) -> bool:
        """Whether pooling leaves tokens of a sequence out."""
        return any(sequence.skip for sequence in self.sequences)

    @cached_property
    def hides(self) -> bool:
        """Whether a sequence has tokens that no token attends to."""
        return any(sequence.hidden for sequence in self.sequences)

    @cached_property
    def clusters(self) -> bool:
        """Whether the token vectors of a sequence are joined into fewer."""
        return any(sequence.clusters for sequence in self.sequences)

    @cached_property
    def _tokens_on_device(self) -> list[Tensor]:
        types = [] if self.host_type_ids_T is None else [self.host_type_ids_T]
        return upload([self.host_ids_T, self.host_positions_T.ravel(), *types], self.device)

    @property
    def ids_T(self) -> Tensor:
        """`host_ids_T` on the device."""
        return self._tokens_on_device[0]

    @property
    def positions_T(self) -> Tensor:
        """`host_positions_T` on the device."""
        return self._tokens_on_device[1].view(self.host_positions_T.shape)

    @property
    def type_ids_T(self) -> Tensor | None:
        """`host_type_ids_T` on the device."""
        return None if self.host_type_ids_T is None else self._tokens_on_device[2]

    @cached_property
    def sources_T(self) -> Tensor | None:
        """`host_sources_T` on the device."""
        return optional(self.index, self.host_sources_T)

    @cached_property
    def identity_T(self) -> Ids:
        """Numbers by which tokens are alike: ids, and negative ones for the tokens of each content of a picture."""
        if self.host_sources_T is None:
            return self.host_ids_T
        return np.where(self.host_sources_T < 0, self.host_ids_T, -1 - self.host_sources_T)

    @cached_property
    def offsets(self) -> Tensor:
        """`starts` as an int64 tensor on the device."""
        return self.index(self.starts)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`starts` as an int32 tensor on the device, as varlen kernels take it."""
        return self.offsets.int()

    def index(self, numbers: Seq[int] | np.ndarray) -> Tensor:
        """Return numbers, of rows say, as an int64 tensor on the device, without waiting for the device."""
        array = np.asarray(numbers, dtype=np.int64)
        return upload([array.ravel()], self.device)[0].view(array.shape)

    def rows_at(self, place: Place) -> Tensor:
        """Return the row of each sequence's first or last token, `[B]`."""
        return self.offsets[:-1] if place == "first" else self.offsets[1:] - 1

    @cached_property
    def keys(self) -> Keys:
        """The rows that each sequence sees."""
        if self.prefixes is None:
            return Keys(None, self.cu_seqlens, self.max_length)
        seen: list[range] = []
        lengths: list[int] = []
        for prefix, rows in zip(self.prefixes, self.rows, strict=True):
            ranges = [prefix or rows] if self.blind else [prefix, rows]
            seen += ranges
            lengths.append(sum(map(len, ranges)))
        rows_K, offsets = upload([numbers_in(seen), np.cumsum([0, *lengths])], self.device)
        return Keys(rows_K, offsets.int(), max(lengths))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The batch as runs of equal length and prefix. Sequences sorted by length make few runs."""
        runs: list[Run] = []
        start = 0
        prefixes = self.prefixes or (range(0),) * self.size
        for (length, prefix), alike in groupby(zip(self.lengths, prefixes, strict=True)):
            left = len([*alike])
            most = max(1, MOST_KEYS // (len(prefix) + length)) if prefix else left
            while left:
                size = min(left, most)
                runs.append(Run(start, size, length, prefix))
                start += size * length
                left -= size
        return tuple(runs)

    @cached_property
    def spans_B7(self) -> Tensor:
        """The rows of each sequence and of the keys that it sees; see `spans_of`."""
        return spans_of(self.starts, self.prefixes, blind=self.blind)

    def spans_at(self, place: Place) -> Tensor:
        """Return the same for the token of each sequence at `place` alone, the only query."""
        spans_B7 = self.spans_B7.clone()
        query, count, at, *_ = spans_B7.T
        query.copy_(torch.arange(self.size))
        if place == "last":
            at += count - 1
        count.fill_(1)
        return spans_B7

    @cached_property
    def most_keys(self) -> int:
        """Maximum number of rows that a sequence sees."""
        *_, shared, _, keys = self.spans_B7.T
        return int((shared + keys).max())

    def select(self, members: Seq[int]) -> tuple[Batch, Tensor]:
        """Return the batch of the sequences numbered `members`, in that order, and their rows in this one."""
        host_rows = numbers_in(self.rows[i] for i in members)
        part = Batch(
            host_ids_T=self.host_ids_T[host_rows],
            host_positions_T=self.host_positions_T[..., host_rows],
            host_type_ids_T=optional(itemgetter(host_rows), self.host_type_ids_T),
            starts=tuple(accumulate((self.lengths[i] for i in members), initial=0)),
            device=self.device,
            sequences=tuple(self.sequences[i] for i in members),
            media=self.media,
            host_sources_T=optional(itemgetter(host_rows), self.host_sources_T),
            features=self.features,
        )
        return part, self.index(host_rows)

    def host_rows(self, members: Seq[int]) -> list[Ids]:
        """Return the rows of each of the sequences numbered `members`."""
        return [np.arange(self.starts[i], self.starts[i + 1]) for i in members]

    def rows_of(self, members: Seq[int]) -> tuple[Tensor | slice, list[int]]:
        """Return the kept rows of the sequences numbered `members`, and the number of rows of each."""
        keeps_all = all(sequence.keep is None for sequence in self.sequences)
        if keeps_all and list(members) == list(range(self.size)):
            return slice(None), list(self.lengths)
        rows = [self._kept_rows(i) for i in members]
        return self.index(np.concatenate(rows)), list(map(len, rows))

    def _kept_rows(self, i: int) -> Ids:
        keep = self.sequences[i].keep
        if keep is None:
            return np.arange(self.starts[i], self.starts[i + 1])
        return self.starts[i] + np.asarray(keep, dtype=np.int64)

    def split(self, x_T: Tensor) -> list[Tensor]:
        """Cut a tensor with T rows into one view per sequence."""
        return list(torch.split(x_T, list(self.lengths)))


@dataclass(frozen=True)
class Static:
    """A batch as a recorded forward knows it: tensors whose contents change, and the traits that all its batches share.

    Attributes:
        ids_T: int64 token ids, as those of `Batch`, all of them tensors that stay where they are.
        positions_T: int64 positions.
        type_ids_T: int64 token type ids, or `None`.
        offsets: int64 rows at which sequences begin, and T; sequences at the end may be empty.
        max_length: no sequence is longer.
    """

    ids_T: Tensor
    positions_T: Tensor
    type_ids_T: Tensor | None
    offsets: Tensor
    max_length: int
    prefixes: None = None
    blind: bool = False
    sources_T: None = None
    features: None = None

    @property
    def size(self) -> int:
        """Number of places for sequences, B."""
        return self.offsets.shape[0] - 1

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.ids_T.shape[0]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`offsets` as int32."""
        return self.offsets.int()

    @property
    def keys(self) -> Keys:
        """The rows that each sequence sees."""
        return Keys(None, self.cu_seqlens, self.max_length)

    def rows_at(self, place: Place) -> Tensor:
        """Return the row of each sequence's first or last token, `[B]`; of an empty place, the last row of all."""
        return self.offsets[:-1].clamp(max=self.tokens - 1) if place == "first" else self.offsets[1:] - 1


def pack(sequences: Seq[Sequence], device: torch.device | str = "cpu") -> Batch:
    """Lay `sequences` end to end, in the order given. None may be empty."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    if not len(lengths) or not lengths.all():
        raise ValueError("a batch needs at least one sequence, and none may be empty")
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids_T = np.concatenate([np.asarray(s.ids, dtype=np.int64) for s in sequences])
    media, sources_T = _media(sequences)
    has_types = any(s.type_ids is not None for s in sequences)
    return Batch(
        host_ids_T=ids_T,
        host_positions_T=_positions(sequences, starts, lengths),
        host_type_ids_T=np.concatenate([_type_ids(s) for s in sequences]) if has_types else None,
        starts=tuple(starts.tolist()),
        device=torch.device(device),
        sequences=tuple(sequences),
        media=media,
        host_sources_T=sources_T,
    )


def spans_of(starts: Seq[int], prefixes: Seq[range] | None = None, *, blind: bool = False) -> Tensor:
    """Return the rows of sequences as the native kernel takes them: int64 `[B, 7]` on the host.

    For each sequence: its first query, the number of queries, the position of the first one among the keys; first row
    and length of its prefix; first row and length of its own keys.

    Args:
        starts: B + 1 offsets of the sequences.
        prefixes: of each; `None` = there are none.
        blind: a sequence with a prefix sees nothing but it.
    """
    edges = np.asarray(starts, dtype=np.int64)
    lengths = np.diff(edges)
    prefixes = prefixes or (range(0),) * len(lengths)
    firsts, shared = np.array([(prefix.start, len(prefix)) for prefix in prefixes], dtype=np.int64).T
    keys = lengths * ~(blind & (shared > 0))
    return torch.from_numpy(np.stack([edges[:-1], lengths, shared, firsts, shared, edges[:-1], keys], axis=1))


def numbers_in(ranges: Iterable[range]) -> Ids:
    """Return the numbers of all `ranges`, end to end, as int64."""
    return np.concatenate([np.arange(numbers.start, numbers.stop) for numbers in ranges])


def _positions(sequences: Seq[Sequence], starts: Ids, lengths: Ids) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the positions of all tokens, `[T]`, or `[3, T]` if a sequence has such."""
    counted_T = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    if 2 in {s.positions.ndim for s in sequences if s.positions is not None}:
        counted_T = np.repeat(counted_T[None], 3, axis=0)
    for start, sequence in zip(starts, sequences, strict=False):
        if sequence.positions is not None:
            counted_T[..., start : start + len(sequence)] = sequence.positions
    return counted_T


def _media(sequences: Seq[Sequence]) -> tuple[tuple[Media, ...], Ids | None]:
    """Return the pictures of `sequences`, each content once, and the `Batch.host_sources_T` of their tokens.

    Pictures of sequences with another salt are other pictures: their keys differ, so that no features are shared.
    """
    if not any(map(attrgetter("media"), sequences)):
        return (), None
    rows: dict[bytes, int] = {}  # the first of each picture, by its key
    media: list[Media] = []
    count = 0
    sources: list[Ids] = []
    for sequence in sequences:
        sources_L = np.full(len(sequence), -1, dtype=np.int64)
        for medium, (start, stop) in zip(sequence.media, sequence.spans, strict=True):
            key = _salted(medium.key, sequence.salt)
            if key not in rows:
                rows[key] = count
                media.append(replace(medium, key=key))
                count += medium.tokens
            sources_L[start:stop] = rows[key] + np.arange(medium.tokens)
        sources.append(sources_L)
    return tuple(media), np.concatenate(sources)


def _salted(key: bytes, salt: str | None) -> bytes:
    """Return the key of a picture for requests with `salt`; `None` = they have none."""
    return key if salt is None else hashlib.sha256(salt.encode()).digest() + key


def _type_ids(sequence: Sequence) -> Ids:
    if sequence.type_ids is None:
        return np.zeros(len(sequence), dtype=np.int64)
    return np.asarray(sequence.type_ids, dtype=np.int64)


def set_apart(batch: Batch) -> Batch:
    """Lay hidden tokens out as sequences of their own, which see the tokens before them and nothing else."""
    starts, prefixes = [0], []
    for rows, sequence in zip(batch.rows, batch.sequences, strict=True):
        first_hidden = rows.stop - sequence.hidden
        starts.append(first_hidden)
        prefixes.append(range(0))
        if sequence.hidden:
            starts.append(rows.stop)
            prefixes.append(range(rows.start, first_hidden))
    return replace(batch, starts=tuple(starts), prefixes=tuple(prefixes), blind=True, sequences=())


def filled(batch: Batch, multiple: int) -> Batch:
    """Fill `batch` up to a multiple of so many tokens, by a sequence at its end that nobody asked for."""
    count = -batch.tokens % multiple
    types_T = batch.host_type_ids_T
    return replace(
        batch,
        host_ids_T=np.append(batch.host_ids_T, batch.host_ids_T[:1].repeat(count)),
        host_positions_T=np.append(batch.host_positions_T, np.arange(count) + batch.host_positions_T[0]),
        host_type_ids_T=None if types_T is None else np.append(types_T, np.zeros(count, dtype=np.int64)),
        starts=(*batch.starts, batch.tokens + count),
        prefixes=None if batch.prefixes is None else (*batch.prefixes, range(0)),
        sequences=(),
    )


def stage(arrays: Seq[Ids], device: torch.device) -> Tensor:
    """Lay `arrays` end to end in memory of the host from which `device` can copy while the host goes on.

    torch gives pinned memory to nobody else before the copies from it are done.
    """
    if device.type != "cuda":
        return torch.from_numpy(np.concatenate(arrays))
    staged = torch.empty(sum(map(len, arrays)), dtype=torch.int64, pin_memory=True)
    np.concatenate(arrays, out=staged.numpy())
    return staged


def upload(arrays: Seq[Ids], device: torch.device) -> list[Tensor]:
    """Bring `arrays` to `device` by one copy, for which the host does not wait; on a CPU they share its memory."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    there = stage(arrays, device).to(device, non_blocking=True)
    return list(torch.split(there, [len(array) for array in arrays]))
