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
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from itertools import chain, islice
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

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

    def cancelled(self) -> bool:
        """Return whether its sequences need not run."""


class Item(Protocol):
    """A sequence of a request, as far as the scheduler is concerned."""

    @property
    def request(self) -> Request:
        """The request of the sequence."""

    def __len__(self) -> int:
        """Return the number of tokens."""


I = TypeVar("I", bound=Item)  # noqa: E741


class _Admission(NamedTuple):
    """Limits of a batch.

    Attributes:
        requests: the requests that it may take from, in turn.
        max_tokens: maximum tokens.
        is_long_bulk: it may have as many tokens of bulk as any batch.
    """

    requests: list[Request]
    max_tokens: int
    is_long_bulk: bool = False


class Scheduler(Generic[I]):
    """Waiting sequences, by request.

    Args:
        max_tokens: maximum tokens per batch. A single longer sequence runs alone.
        max_sequences: maximum sequences per batch.
        look_ahead: number of waiting sequences that are compared by length for each batch.
        streams: batches that run at a time.
    """

    def __init__(self, max_tokens: int, max_sequences: int = 256, look_ahead: int = 1024, streams: int = 1) -> None:
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.look_ahead = look_ahead
        self.streams = streams
        self._under_way: dict[int, bool] = {}  # streams with a batch, and whether it is a long one of bulk
        self._waiting: OrderedDict[Request, deque[I]] = OrderedDict()
        self._left: Counter[Request] = Counter()  # tokens, without common beginnings
        self._passed: Counter[Request] = Counter()  # batches in a row that left it out
        self._wary = 0
        self._passed_over = False
        self.depth = 0
        self.tokens = 0

    def add(self, request: Request, items: list[I]) -> None:
        """Queue all sequences of a request."""
        if items:
            self._waiting.setdefault(request, deque()).extend(items)
            self.depth += len(items)
            tokens = sum(map(len, items))
            self._left[request] += tokens - request.shared * len(items)
            self.tokens += tokens

    def drop_cancelled(self) -> int:
        """Forget cancelled requests; return the number of sequences that need not run."""
        gone = [request for request in self._waiting if request.cancelled()]
        return sum(self._forget(request) for request in gone)

    def drain(self) -> list[I]:
        """Forget all requests; return the sequences that waited."""
        waiting = [*chain.from_iterable(self._waiting.values())]
        for request in [*self._waiting]:
            self._forget(request)
        return waiting

    def next_batch(self, stream: int = 0) -> list[I]:
        """Take the next batch for `stream`, whose last one is done; empty if nothing waits that may run there."""
        self.drop_cancelled()
        self.done(stream)
        requests, room, is_long_bulk = self._admitted()
        batch: list[I] = []
        for rank in self._ranks(requests):
            room = self._fill(batch, room, rank)
        for item in batch:
            self._left[item.request] -= len(item) - item.request.shared
        if batch:
            self._under_way[stream] = is_long_bulk
        self._count_passed(batch)
        for request in {item.request for item in batch}:
            if not self._waiting[request]:
                self._forget(request)
        self.depth -= len(batch)
        self.tokens -= sum(map(len, batch))
        return batch

    def done(self, stream: int) -> None:
        """Note that the batch of `stream` is over."""
        self._under_way.pop(stream, None)

    def _admitted(self) -> _Admission:
        """Return the requests that the next batch may take from, with its limits."""
        bulk: list[Request] = []
        others: list[Request] = []
        for request in self._waiting:
            kind = bulk if self._left[request] > BULK * self.max_tokens else others
            kind.append(request)
        if bulk and others:
            self._wary = WARY
        if bulk and self._wary:
            return self._beside_bulk(bulk, others)
        requests = [*self._waiting]
        return _Admission(requests, self._even(requests), is_long_bulk=bool(bulk))

    def _beside_bulk(self, bulk: list[Request], others: list[Request]) -> _Admission:
        """Return the next batch's admission where other requests are waiting beside bulk, or expected to come."""
        long = sum(self._under_way.values())
        self._passed_over = bool(others) and (long > 0 or not self._passed_over)
        if self._passed_over:
            return _Admission(others, self._even(others))
        free = self.streams - long
        if long and free == 1 and self._wary > WARY - RESERVED:
            return _Admission([], 0)
        self._wary -= 1
        if free > 1:
            return _Admission(bulk, self.max_tokens, is_long_bulk=True)
        short = max(self.max_tokens // SHORT, _worth(bulk))
        return _Admission([*self._waiting], min(self.max_tokens, short))

    def _fill(self, batch: list[I], room: int, requests: list[Request]) -> int:
        """Add to `batch` the oldest sequence of each request, then those nearest in length; return the room left."""
        for request in requests:
            head = self._waiting[request][0]
            if batch and (len(head) > room or len(batch) == self.max_sequences):
                break
            batch.append(self._waiting[request].popleft())
            room -= len(head)
            self._waiting.move_to_end(request)
        if room > 0 and len(batch) < self.max_sequences:
            return self._take_nearest(batch, room, requests)
        return room

    def _ranks(self, requests: list[Request]) -> list[list[Request]]:
        """Group requests by priority, lowest number first; requests that were left out too often come before all."""
        if not _differ(requests):
            return [requests]
        ranks: dict[float, list[Request]] = {}
        for request in requests:
            is_overdue = self._passed[request] >= MOST_PASSED
            rank = -math.inf if is_overdue else request.priority
            ranks.setdefault(rank, []).append(request)
        return [ranks[rank] for rank in sorted(ranks)]

    def _count_passed(self, batch: list[I]) -> None:
        """Count the batches that leave a waiting request out, where priorities let others pass it."""
        if not batch or not _differ(self._waiting):
            self._passed.clear()
            return
        left_out = self._waiting.keys() - {item.request for item in batch}
        self._passed = Counter({request: self._passed[request] + 1 for request in left_out})

    def _even(self, requests: list[Request]) -> int:
        """Return the tokens of a batch of `requests` that leaves as many for each other free stream."""
        free = max(1, self.streams - len(self._under_way))
        waiting = sum(self._left[request] + request.shared for request in requests)
        return min(self.max_tokens, max(-(-waiting // free), _worth(requests)))

    def _take_nearest(self, batch: list[I], room: int, requests: list[Request]) -> int:
        """Add to `batch` the sequences of `requests` that fit, nearest in length to the first; return the room left."""
        share = max(1, self.look_ahead // max(1, len(requests)))
        window = chain.from_iterable(islice(self._waiting[request], share) for request in requests)
        in_batch = {item.request: item.request.shared for item in batch}
        taken: dict[int, I] = {}
        for item in sorted(window, key=lambda item: abs(len(item) - len(batch[0]))):
            adds = len(item) - in_batch.get(item.request, 0)
            if adds <= room and len(batch) + len(taken) < self.max_sequences:
                taken[id(item)] = item
                in_batch[item.request] = item.request.shared
                room -= adds
        batch += taken.values()
        for request in {item.request for item in taken.values()}:
            self._waiting[request] = deque(item for item in self._waiting[request] if id(item) not in taken)
        return room

    def _forget(self, request: Request) -> int:
        """Remove a request; return the number of its sequences that were waiting."""
        items = self._waiting.pop(request)
        del self._left[request], self._passed[request]
        self.depth -= len(items)
        self.tokens -= sum(map(len, items))
        return len(items)


def _differ(requests: Iterable[Request]) -> bool:
    """Return whether some of `requests` have another priority than others."""
    return len({request.priority for request in requests}) > 1


def _worth(requests: Iterable[Request]) -> int:
    """Return the minimum tokens of a batch of `requests`, because their common beginnings run once per batch."""
    return 4 * max((request.shared for request in requests), default=0)
