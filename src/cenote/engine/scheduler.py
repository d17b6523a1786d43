"""Which sequences run next. Pure: no torch, no clock, no lock, no thread.

A batch holds at most `max_tokens` tokens; where the model runs the common beginning of a request's sequences once, it
counts once. A batch begins with the oldest sequence of every request in turn, so that one request of thousands cannot
starve a small one; the room that is left goes to the waiting sequences nearest in length to the first, so that a batch
is cheap to run.

Where several batches run at a time, in *streams*, waiting tokens are dealt out evenly among the free streams.

A request that fills more than a few batches is bulk. As long as other requests come beside it, one stream is reserved
for them, or every other batch of a single stream; other batches of bulk are short where requests would wait for them.
Otherwise every batch contains the head of the turn: a sequence waits for no more than twice as many batches as there
are sequences before it and requests beside it.

Requests of a lower priority number have their turn first; one that `MOST_PASSED` batches in a row have left out has it
before all others, whatever its number.

A batch is made of a bounded number of requests, the first in turn: its cost does not depend on how many wait.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from itertools import chain, count, groupby, islice
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BULK = 8
"""Batches that a bulk request fills at least: about half a second of work for a small model on a CPU."""
SHORT = 8
"""Bulk batches beside other requests have a part of the maximum tokens, 1 / `SHORT`: longer ones keep these waiting,
shorter ones cost throughput."""
WARY, RESERVED = 64, 16
"""Batches of bulk after the last other request, some seconds, until others are no longer expected; and until the stream
reserved for them takes short ones."""
MOST_PASSED = 16
"""Maximum batches in a row that leave out a request of low priority."""


class Request(Protocol):
    """A request, as far as the scheduler is concerned.

    Attributes:
        shared: leading tokens that all its sequences have in common and a batch runs once. Each sequence is longer.
        priority: requests of lower numbers have their turn first.
    """

    shared: int
    priority: int


class Item(Protocol):
    """A sequence of a request, as far as the scheduler is concerned."""

    @property
    def request(self) -> Request:
        """The request of the sequence."""

    def __len__(self) -> int:
        """Return the number of tokens."""


I = TypeVar("I", bound=Item)  # noqa: E741


class _Waiting(Generic[I]):
    """A request that waits.

    Attributes:
        items: its sequences that wait.
        left: their tokens, without common beginnings.
        turn: requests of smaller numbers are before it.
        served: the scheduler's batches at the time when it was last served.
    """

    __slots__ = ("items", "left", "request", "served", "turn")

    def __init__(self, request: Request, served: int) -> None:
        self.request = request
        self.items: deque[I] = deque()
        self.left = 0
        self.turn = 0
        self.served = served

    def replace(self, size: int, items: list[I]) -> None:
        """Replace the first `size` sequences by `items`, some of them in the same order."""
        if len(items) == size:
            return
        for _ in range(size):
            self.items.popleft()
        self.items.extendleft(reversed(items))


class _Lane(Generic[I]):
    """Requests of one kind by priority, those of each priority in turn.

    Attributes:
        priorities: those that there are, in ascending order.
        tokens: of a batch of all its requests, which has each common beginning once.
    """

    def __init__(self) -> None:
        self.priorities: list[int] = []
        self.tokens = 0
        self._rows: dict[int, OrderedDict[_Waiting[I], None]] = {}

    def __bool__(self) -> bool:
        return bool(self.priorities)

    def row(self, priority: int) -> Iterable[_Waiting[I]]:
        """Return the requests of one priority, in turn."""
        return self._rows.get(priority, ())

    def add(self, waiting: _Waiting[I]) -> None:
        """Put a request behind all others of its priority."""
        priority = waiting.request.priority
        if priority not in self._rows:
            self._rows[priority] = OrderedDict()
            insort(self.priorities, priority)
        self._rows[priority][waiting] = None
        self.tokens += waiting.left + waiting.request.shared

    def remove(self, waiting: _Waiting[I]) -> None:
        """Take a request out."""
        priority = waiting.request.priority
        row = self._rows[priority]
        del row[waiting]
        if not row:
            del self._rows[priority]
            del self.priorities[bisect_left(self.priorities, priority)]
        self.tokens -= waiting.left + waiting.request.shared

    def __iter__(self) -> Iterator[_Waiting[I]]:
        return chain.from_iterable(map(self.row, self.priorities))


class _Admission(NamedTuple, Generic[I]):
    """Limits of a batch.

    Attributes:
        lanes: with the requests that it may take from.
        max_tokens: maximum tokens.
        is_long_bulk: it may have as many tokens of bulk as any batch.
    """

    lanes: list[_Lane[I]]
    max_tokens: int
    is_long_bulk: bool = False


@dataclass
class _Room:
    """The room that a batch still has.

    Attributes:
        tokens: maximum of further tokens.
        looks: sequences that may be compared by length. Each priority has half of the rest.
        begun: common beginning of each request in the batch, which has room already.
    """

    tokens: int
    looks: int
    begun: dict[Request, int] = field(default_factory=dict)

    def take(self, request: Request, tokens: int) -> None:
        """Take a sequence of a request, which adds so many tokens."""
        self.tokens -= tokens
        self.begun[request] = request.shared

    def share(self, requests: int) -> int:
        """Return the sequences to compare of each of so many requests of one priority."""
        return max(1, self.looks // 2 // requests)


class Scheduler(Generic[I]):
    """Waiting sequences, by request.

    Args:
        max_tokens: maximum tokens per batch. A single longer sequence runs alone.
        max_sequences: maximum sequences per batch.
        look_ahead: number of waiting sequences of the first priority that are compared by length for each batch, and
            of requests of all. Those of other priorities are as many together.
        streams: batches that run at a time.
    """

    def __init__(self, max_tokens: int, max_sequences: int = 256, look_ahead: int = 1024, streams: int = 1) -> None:
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.look_ahead = look_ahead
        self.streams = streams
        self._under_way: dict[int, bool] = {}  # streams with a batch, and whether it is a long one of bulk
        self._waiting: OrderedDict[Request, _Waiting[I]] = OrderedDict()  # the one served longest ago first
        self._bulk: _Lane[I] = _Lane()
        self._others: _Lane[I] = _Lane()
        self._turns = count()
        self._cancelled: deque[Request] = deque()
        self._batches = 0  # while priorities differed
        self._alike_until = 0  # number of those batches when priorities last did not differ
        self._wary = 0
        self._passed_over = False
        self.depth = 0
        self.tokens = 0

    def add(self, request: Request, items: list[I]) -> None:
        """Queue all sequences of a request, none of which wait already."""
        if not items:
            return
        waiting = self._waiting[request] = _Waiting(request, self._batches)
        tokens = sum(map(len, items))
        waiting.items.extend(items)
        waiting.left = tokens - request.shared * len(items)
        self._put_behind(waiting)
        self.depth += len(items)
        self.tokens += tokens

    def cancel(self, request: Request) -> None:
        """Note that the sequences of a request need not run. Any thread may call it, without a lock."""
        self._cancelled.append(request)

    def drop_cancelled(self) -> list[I]:
        """Forget cancelled requests; return their sequences, which need not run."""
        dropped: list[I] = []
        while self._cancelled:
            waiting = self._waiting.get(self._cancelled.popleft())
            if waiting is not None:
                dropped += self._forget(waiting)
        return dropped

    def drain(self) -> list[I]:
        """Forget all requests; return the sequences that waited."""
        drained: list[I] = []
        for waiting in [*self._waiting.values()]:
            drained += self._forget(waiting)
        return drained

    def next_batch(self, stream: int = 0) -> list[I]:
        """Take the next batch for `stream`, whose last one is done; empty if nothing waits that may run there.

        Cancelled requests are dropped by `drop_cancelled`, not here.
        """
        self.done(stream)
        lanes, tokens, is_long_bulk = self._admitted()
        is_mixed = self._is_mixed()
        batch: list[I] = []
        room = _Room(tokens, 2 * self.look_ahead)
        for rank in self._ranks(lanes):
            self._fill(batch, room, rank)
            if room.tokens <= 0 or len(batch) == self.max_sequences:
                break
        if batch:
            self._under_way[stream] = is_long_bulk
            self._batches += is_mixed
        if not is_mixed:
            self._alike_until = self._batches
        self._note_served(batch)
        return batch

    def done(self, stream: int) -> None:
        """Note that the batch of `stream` is over."""
        self._under_way.pop(stream, None)

    def _note_served(self, batch: list[I]) -> None:
        """Take the sequences of `batch` off the figures of their requests."""
        sizes: Counter[Request] = Counter()
        for item in batch:
            sizes[item.request] += len(item) - item.request.shared
            self.tokens -= len(item)
        self.depth -= len(batch)
        for request, size in sizes.items():
            waiting = self._waiting[request]
            self._lane(waiting).remove(waiting)
            waiting.left -= size
            waiting.served = self._batches
            if waiting.items:
                self._waiting.move_to_end(request)
                self._put_behind(waiting)
            else:
                del self._waiting[request]

    def _put_behind(self, waiting: _Waiting[I]) -> None:
        """Put a request behind all others of its kind and priority."""
        waiting.turn = next(self._turns)
        self._lane(waiting).add(waiting)

    def _lane(self, waiting: _Waiting[I]) -> _Lane[I]:
        """Return the lane of a request."""
        return self._bulk if waiting.left > BULK * self.max_tokens else self._others

    def _admitted(self) -> _Admission[I]:
        """Return the requests that the next batch may take from, with its limits."""
        if self._bulk and self._others:
            self._wary = WARY
        if self._bulk and self._wary:
            return self._beside_bulk()
        lane = self._bulk or self._others
        return _Admission([lane], self._even(lane), is_long_bulk=bool(self._bulk))

    def _beside_bulk(self) -> _Admission[I]:
        """Return the next batch's admission where other requests are waiting beside bulk, or expected to come."""
        long = sum(self._under_way.values())
        without_long = self.streams - long
        if self._others and not long:
            self._passed_over = not self._passed_over
        else:
            self._passed_over = bool(self._others)
        if self._passed_over:
            # Others run without bulk: always beside a long batch of it, else every other time.
            return _Admission([self._others], self._even(self._others))
        if long and without_long == 1 and self._wary > WARY - RESERVED:
            # The last stream without a long batch is reserved for others, which may come any moment.
            return _Admission([], 0)
        self._wary -= 1
        if without_long > 1:
            # Another stream is left for others.
            return _Admission([self._bulk], self.max_tokens, is_long_bulk=True)
        # There is no other stream, so that the batch is short, and takes others along.
        short = max(self.max_tokens // SHORT, self._worth(self._bulk))
        return _Admission([self._bulk, self._others], min(self.max_tokens, short))

    def _fill(self, batch: list[I], room: _Room, rank: list[_Waiting[I]]) -> None:
        """Add to `batch` the oldest sequence of each request, then those nearest in length, as far as there is room."""
        for waiting in rank:
            head = waiting.items[0]
            if batch and (len(head) > room.tokens or len(batch) == self.max_sequences):
                break
            batch.append(waiting.items.popleft())
            room.take(waiting.request, len(head))
        if room.tokens > 0 and len(batch) < self.max_sequences:
            self._take_nearest(batch, room, rank)

    def _ranks(self, lanes: list[_Lane[I]]) -> Iterator[list[_Waiting[I]]]:
        """Group requests by priority, lowest number first; requests that were left out too often come before all."""
        overdue = self._overdue(lanes)
        if overdue:
            yield [*overdue]
        room = self.look_ahead
        for priority, _ in groupby(heapq.merge(*(lane.priorities for lane in lanes))):
            rows = heapq.merge(*(lane.row(priority) for lane in lanes), key=lambda waiting: waiting.turn)
            rank = [waiting for waiting in islice(rows, room) if waiting not in overdue]
            if rank:
                yield rank
            room -= len(rank)
            if room <= 0:
                break

    def _overdue(self, lanes: list[_Lane[I]]) -> dict[_Waiting[I], None]:
        """Return requests that too many batches in a row have left out for the sake of others' priorities."""
        overdue: dict[_Waiting[I], None] = {}
        for waiting in islice(self._waiting.values(), self.max_sequences):
            if self._batches - max(waiting.served, self._alike_until) < MOST_PASSED:
                break
            if self._lane(waiting) in lanes:
                overdue[waiting] = None
        return overdue

    def _is_mixed(self) -> bool:
        """Return whether some waiting requests have another priority than others."""
        return len({*self._bulk.priorities[:2], *self._others.priorities[:2]}) > 1

    def _even(self, lane: _Lane[I]) -> int:
        """Return the tokens of a batch of a lane's requests that leaves as many for each other free stream."""
        free = max(1, self.streams - len(self._under_way))
        return min(self.max_tokens, max(-(-lane.tokens // free), self._worth(lane)))

    def _worth(self, lane: _Lane[I]) -> int:
        """Return the minimum tokens of a batch of a lane's requests: their common beginnings run once per batch."""
        first = islice(lane, self.max_sequences)
        return 4 * max((waiting.request.shared for waiting in first), default=0)

    def _take_nearest(self, batch: list[I], room: _Room, rank: list[_Waiting[I]]) -> None:
        """Add to `batch` the sequences of `rank` that fit, nearest in length to the first."""
        share, length = room.share(len(rank)), len(batch[0])
        windows = [(waiting, [*islice(waiting.items, share)]) for waiting in rank]
        taken: dict[int, I] = {}
        window = [item for _, items in windows for item in items]
        room.looks -= len(window)
        for item in sorted(window, key=lambda item: abs(len(item) - length)):
            adds = len(item) - room.begun.get(item.request, 0)
            if adds <= room.tokens and len(batch) + len(taken) < self.max_sequences:
                taken[id(item)] = item
                room.take(item.request, adds)
        batch += taken.values()
        for waiting, items in windows:
            kept = [item for item in items if id(item) not in taken]
            waiting.replace(len(items), kept)

    def _forget(self, waiting: _Waiting[I]) -> deque[I]:
        """Remove a request; return its sequences that were waiting."""
        self._lane(waiting).remove(waiting)
        del self._waiting[waiting.request]
        self.depth -= len(waiting.items)
        self.tokens -= sum(map(len, waiting.items))
        return waiting.items
