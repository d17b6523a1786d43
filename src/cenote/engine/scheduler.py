"""Which sequences run next. Pure: no torch, no clock, no lock, no thread.

A batch holds at most `max_tokens` tokens; where the model runs the common beginning of a request's sequences once, it
counts once. A batch begins with the oldest sequence of every request in turn, so that one request of thousands cannot
starve a small one; the room that is left goes to the waiting sequences nearest in length to the first, so that a batch
is cheap to run.

Where several batches run at a time, in *streams*, what waits is dealt out evenly among those that are free.

A request that fills more than a few batches is bulk. As long as others come beside it, one stream is theirs, and with a
single stream every other batch is, and the rest of its batches are short: they wait for little. Apart from that every
batch contains the head of the turn: a sequence waits for no more than twice as many batches as there are sequences
before it and requests beside it.

Requests of a lower priority number have their turn first; one that `MOST_PASSED` batches in a row have left out has it
before all others, whatever its number.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from itertools import islice
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

BULK = 8
"""Batches that a request fills at least to be bulk: about half a second of work for a small model on a CPU."""
SHORT = 8
"""Batches of bulk that others come beside have this part of the tokens: longer ones keep them waiting, shorter ones
cost throughput."""
WARY, RESERVED = 64, 16
"""Batches of bulk after the last other request came until others are no longer thought of, some seconds; and until the
stream that was theirs takes short ones."""


MOST_PASSED = 16
"""Batches in a row that may leave a request of low priority out."""


class Job(Protocol):
    """A request, to the scheduler: something that may be given up.

    Attributes:
        shared: leading tokens that all its sequences have in common and a batch runs once. Each has more than these.
        priority: lower ones have their turn first.
    """

    shared: int
    priority: int

    def cancelled(self) -> bool:
        """Whether its sequences need not run."""


class Item(Protocol):
    """A sequence, to the scheduler: something with a length that belongs to a job."""

    @property
    def job(self) -> Job:
        """The request that it is part of."""

    def __len__(self) -> int:
        """Its tokens."""


I = TypeVar("I", bound=Item)  # noqa: E741


class Scheduler(Generic[I]):
    """Waiting sequences, by request.

    Args:
        max_tokens: tokens that a batch runs. A single longer sequence runs alone.
        max_sequences: sequences of a batch.
        look_ahead: how many waiting sequences are compared by length for each batch.
        streams: batches that run at a time.
    """

    def __init__(self, max_tokens: int, max_sequences: int = 256, look_ahead: int = 1024, streams: int = 1) -> None:
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.look_ahead = look_ahead
        self.streams = streams
        self._under_way: dict[int, bool] = {}  # streams with a batch, and whether it is a long one of bulk
        self._waiting: OrderedDict[Job, deque[I]] = OrderedDict()
        self._left: Counter[Job] = Counter()  # tokens, without common beginnings
        self._passed: Counter[Job] = Counter()  # batches in a row that left it out
        self._wary = 0
        self._passed_over = False
        self.depth = 0
        self.tokens = 0

    def add(self, job: Job, items: list[I]) -> None:
        """Queue all sequences of a request."""
        if items:
            self._waiting.setdefault(job, deque()).extend(items)
            self.depth += len(items)
            tokens = sum(map(len, items))
            self._left[job] += tokens - job.shared * len(items)
            self.tokens += tokens

    def drop_cancelled(self) -> int:
        """Forget the requests that were given up; returns how many sequences that spared."""
        gone = [job for job in self._waiting if job.cancelled()]
        return sum(self._forget(job) for job in gone)

    def next_batch(self, stream: int = 0) -> list[I]:
        """Take the next batch for `stream`, whose last one is done; empty if nothing waits, or only bulk for others."""
        self.drop_cancelled()
        self.done(stream)
        jobs, most, is_long_bulk = self._admitted()
        batch: list[I] = []
        room = most
        for rank in self._ranks(jobs):
            room = self._fill(batch, room, rank)
        for item in batch:
            self._left[item.job] -= len(item) - item.job.shared
        if batch:
            self._under_way[stream] = is_long_bulk
        self._count_passed(batch)
        for job in [job for job, items in self._waiting.items() if not items]:
            del self._waiting[job], self._left[job]
        self.depth -= len(batch)
        self.tokens -= sum(map(len, batch))
        return batch

    def done(self, stream: int) -> None:
        """The batch of `stream` is over."""
        self._under_way.pop(stream, None)

    def _admitted(self) -> tuple[list[Job], int, bool]:
        """The requests that the next batch may take from, in turn, how many tokens, and whether it is long and bulk."""
        jobs = [*self._waiting]
        bulk = {job for job in jobs if self._left[job] > BULK * self.max_tokens}
        if 0 < len(bulk) < len(jobs):
            self._wary = WARY
        if not bulk or not self._wary:
            return jobs, self._even(jobs), bool(bulk)
        rest = [job for job in jobs if job not in bulk]
        long = sum(self._under_way.values())
        self._passed_over = bool(rest) and (long > 0 or not self._passed_over)
        if self._passed_over:
            return rest, self._even(rest), False
        if long and long == self.streams - 1 and self._wary > WARY - RESERVED:
            return [], 0, False
        self._wary -= 1
        if long < self.streams - 1:
            return [job for job in jobs if job in bulk], self.max_tokens, True
        return jobs, min(self.max_tokens, max(self.max_tokens // SHORT, _worth(bulk))), False

    def _fill(self, batch: list[I], room: int, jobs: list[Job]) -> int:
        """Add to `batch` the oldest sequence of each of `jobs`, then those nearest in length; returns the room left."""
        for job in jobs:
            head = self._waiting[job][0]
            if batch and (len(head) > room or len(batch) == self.max_sequences):
                break
            batch.append(self._waiting[job].popleft())
            room -= len(head)
            self._waiting.move_to_end(job)
        if batch and len(batch) < self.max_sequences and room > 0:
            return self._take_nearest(batch, room, jobs)
        return room

    def _ranks(self, jobs: list[Job]) -> list[list[Job]]:
        """Part requests by priority, lowest number first; those that were left out too often come before all."""
        if len({job.priority for job in jobs}) < 2:
            return [jobs]
        ranks: dict[tuple[bool, int], list[Job]] = {}
        for job in jobs:
            is_overdue = self._passed[job] >= MOST_PASSED
            ranks.setdefault((not is_overdue, 0 if is_overdue else job.priority), []).append(job)
        return [ranks[rank] for rank in sorted(ranks)]

    def _count_passed(self, batch: list[I]) -> None:
        """Note which waiting requests `batch` leaves out, where priorities let others pass them."""
        if not batch or len({job.priority for job in self._waiting}) < 2:
            self._passed.clear()
            return
        taken = {item.job for item in batch}
        self._passed = Counter({job: self._passed[job] + 1 for job in self._waiting if job not in taken})

    def _even(self, jobs: list[Job]) -> int:
        """Tokens of a batch of `jobs`: what leaves as much for each other stream that is free."""
        free = max(1, self.streams - len(self._under_way))
        waiting = sum(self._left[job] + job.shared for job in jobs)
        return min(self.max_tokens, max(-(-waiting // free), _worth(jobs)))

    def _take_nearest(self, batch: list[I], room: int, jobs: list[Job]) -> int:
        """Add to `batch` the sequences of `jobs` that fit, nearest in length to the first; returns the room left."""
        share = max(1, self.look_ahead // max(1, len(jobs)))
        window = [item for job in jobs for item in islice(self._waiting[job], share)]
        begun = {item.job for item in batch}
        taken: dict[int, I] = {}
        for item in sorted(window, key=lambda item: abs(len(item) - len(batch[0]))):
            adds = len(item) - (item.job.shared if item.job in begun else 0)
            if adds <= room and len(batch) + len(taken) < self.max_sequences:
                taken[id(item)] = item
                begun.add(item.job)
                room -= adds
        batch += taken.values()
        for job in {item.job: None for item in taken.values()}:
            self._waiting[job] = deque(item for item in self._waiting[job] if id(item) not in taken)
        return room

    def _forget(self, job: Job) -> int:
        items = self._waiting.pop(job)
        del self._left[job], self._passed[job]
        self.depth -= len(items)
        self.tokens -= sum(map(len, items))
        return len(items)


def _worth(jobs: Iterable[Job]) -> int:
    """Tokens that a batch of `jobs` should have at least, because what they share is run once a batch."""
    return 4 * max((job.shared for job in jobs), default=0)
