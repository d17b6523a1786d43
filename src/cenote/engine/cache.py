"""A cache of results around an engine, by token ids; equal sequences in flight are computed once.

A request is looked up sequence by sequence. Kept results are hits; results that another request, or this one, has under
way are waited for; the rest goes to the wrapped engine as one request, here called a flight. A flight is cancelled when
nobody waits for any part of it, so a caller that gives up takes nothing from the others.

Kept outputs are read-only copies: the engine's arrays are views of whole batches, and belong to the caller. Hits are
copies too, because a tensor over a read-only array (`torch.from_numpy`) can be written to, which would change the
answers of others.
"""

from __future__ import annotations

import sys
import threading
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote import metrics
from cenote.engine.owner import Owner
from cenote.engine.promise import Promise, check_caller, times_of
from cenote.errors import Closed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from collections.abc import Sequence as Seq
    from concurrent.futures import Future
    from dataclasses import Field

    from cenote.core import Engine, Output, Sequence

_ARRAY_BYTES = sys.getsizeof(np.empty(0, np.float32))
_PLAIN = frozenset((type(None), bool, int, float, str, bytes))

_OPEN: weakref.WeakSet[CachedEngine] = weakref.WeakSet()
metrics.cache_bytes.set_function(lambda: sum(engine._store.bytes for engine in [*_OPEN]))


@cache
def _fields(kind: type) -> tuple[Field[Any], ...]:
    """Return the fields of a dataclass, and none for any other type."""
    return fields(kind) if is_dataclass(kind) else ()


@cache
def _compared(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in _fields(kind) if field.compare)


def key_of(value: Any) -> Hashable:
    """Return `value` as a key, by content and not by type: a list of ids and an array of the same ids are equal.

    The key of a dataclass has every field that is compared, so a new field of `Sequence` is part of its key.
    """
    kind: Any = type(value)
    if kind in _PLAIN:
        return value  # type: ignore[no-any-return]
    names = _compared(kind)
    if names:
        return (kind, *[key_of(getattr(value, name)) for name in names])
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return frozenset((name, key_of(part)) for name, part in value.items())
    if not isinstance(value, Iterable):
        return value  # type: ignore[no-any-return]
    try:
        return array("i", value).tobytes()
    except (TypeError, OverflowError):  # not integers, or large ones
        return tuple(map(key_of, value))


def copied(value: Any, *, writable: bool) -> Any:
    """Return `value` with copies of its arrays: in fields of dataclasses, mappings, lists and tuples."""
    if isinstance(value, np.ndarray):
        value = value.copy()
        value.setflags(write=writable)
        return value
    kind: Any = type(value)
    members = _fields(kind)
    if members:
        return kind(**{field.name: copied(getattr(value, field.name), writable=writable) for field in members})
    if isinstance(value, Mapping):
        return {name: copied(part, writable=writable) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return kind(copied(part, writable=writable) for part in value)
    return value


def size_of(value: Any) -> int:
    """Return the bytes of a key or an output, arrays counted as if they owned their memory.

    `None` and names are counted too, though they are shared; that makes up for an entry's places in the tables.
    """
    kind: Any = type(value)
    if kind in _PLAIN:
        return sys.getsizeof(value)
    if isinstance(value, np.ndarray):
        return value.nbytes + _ARRAY_BYTES
    if isinstance(value, type):
        return 0
    return sys.getsizeof(value) + sum(map(size_of, _parts(value, kind)))


def _parts(value: Any, kind: Any) -> Iterable[Any]:
    """Return the parts of a dataclass, mapping or collection."""
    members = _fields(kind)
    if members:
        return [getattr(value, field.name) for field in members]
    if isinstance(value, Mapping):
        return chain(value.keys(), value.values())
    return value if isinstance(value, (list, tuple, frozenset)) else ()


class _Store:
    """Outputs by key; when they exceed `capacity` bytes, the least recently used are dropped."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes: int = 0
        self._entries: OrderedDict[Hashable, tuple[Output, int]] = OrderedDict()

    def get(self, key: Hashable) -> Output | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, output: Output, size: int) -> None:
        _, old_size = self._entries.pop(key, (None, 0))
        self._entries[key] = (output, size)
        self.bytes += size - old_size
        while self.bytes > self.capacity:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.bytes -= dropped


class _Request(Promise[list[Any]]):
    """A request of a caller, and its outputs.

    Attributes:
        left: number of outputs that are missing.
        flights: flights that have some of them.
    """

    __slots__ = ("flights", "left", "outputs")

    def __init__(self, size: int, progress: Callable[[int], None] | None) -> None:
        super().__init__(progress)
        self.outputs: list[Any] = [None] * size
        self.left = size
        self.flights: set[_Flight] = set()


_Places = list[tuple[int, int]]
"""Places of outputs: in a flight, and in a request."""


class _Flight:
    """One submission to the wrapped engine, and the requests that wait for it.

    Attributes:
        owner: the request that it was made for.
        keys: keys of `sequences`, all different.
        waiters: places of the outputs that each request waits for.
        inner: the engine's future, while there is one.
        told: number of sequences that the engine has reported as done.
    """

    __slots__ = ("inner", "keys", "owner", "sequences", "told", "waiters")

    def __init__(self, owner: _Request) -> None:
        self.owner = owner
        self.keys: list[Hashable] = []
        self.sequences: list[Sequence] = []
        self.waiters: dict[_Request, _Places] = {}
        self.inner: Future[list[Output]] | None = None
        self.told = 0

    def add(self, key: Hashable, sequence: Sequence) -> int:
        """Add a sequence; return its place."""
        self.keys.append(key)
        self.sequences.append(sequence)
        return len(self.keys) - 1

    def tell(self, count: int) -> None:
        """Pass the engine's progress to the owner; other requests advance when the flight is over."""
        self.told += count
        if self.inner is not None:
            self.owner.future.times = times_of(self.inner)
        self.owner.advance(count)


class CachedEngine:
    """An engine that keeps the outputs of another one.

    Args:
        engine: computes outputs that are not kept.
        capacity: maximum bytes of outputs and keys that are kept.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.info = engine.info
        self._engine = engine
        self._store: _Store = _Store(capacity)
        self._running: dict[Hashable, tuple[_Flight, int]] = {}
        self._lock = threading.RLock()  # the garbage collector may cancel a future inside
        self._closed = False
        self._owner = Owner()
        _OPEN.add(self)

    @property
    def fault(self) -> str:
        """See `cenote.core.Engine.fault`."""
        return self._engine.fault

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`. For kept outputs, `progress` is called before this returns.

        An error fails the request that owns the flight, and the requests that joined it. If the flight has several
        sequences, it is not known which of them failed: those that others need are then computed once more, for each
        request by itself.

        Raises:
            EngineFailed: it is called in a forked child, or from a progress callback.
        """
        self._owner.check()
        check_caller()
        keys = [key_of(sequence) for sequence in sequences]
        request = _Request(len(keys), progress)
        flight = _Flight(request)
        try:
            hits = self._look_up(request, flight, keys, sequences)
            if len(hits) < len(keys):
                # Weakly: a future that held its own request would keep the outputs until the garbage is collected.
                request.future.add_done_callback(partial(self._leave, weakref.ref(request)))
            if flight.keys:
                self._start(flight)
        except BaseException as error:
            self._abandon(flight, error)
            raise
        metrics.cache_hits.inc(len(hits))
        metrics.cache_misses.inc(len(flight.keys))
        metrics.cache_joined.inc(len(keys) - len(hits) - len(flight.keys))
        for place, output in hits:
            request.outputs[place] = copied(output, writable=True)
        if hits or not keys:
            self._arrive(request, len(hits), len(hits))
        return request.future

    def healthy(self) -> bool:
        """See `cenote.core.Engine.healthy`; kept outputs do not count."""
        return self._engine.healthy()

    def close(self) -> None:
        """See `cenote.core.Engine.close`."""
        self._closed = True  # without the lock: an owner may be garbage-collected where it is held
        _OPEN.discard(self)
        self._engine.close()

    def _look_up(
        self, request: _Request, flight: _Flight, keys: list[Hashable], sequences: Seq[Sequence]
    ) -> list[tuple[int, Output]]:
        """Return kept outputs by place; for the rest, join flights under way, else `flight`."""
        hits = []
        with self._lock:
            if self._closed:
                raise Closed("the engine is shutting down")
            for place, (key, sequence) in enumerate(zip(keys, sequences, strict=True)):
                kept = self._store.get(key)
                if kept is not None:
                    hits.append((place, kept))
                    continue
                if key not in self._running:
                    self._running[key] = (flight, flight.add(key, sequence))
                joined, index = self._running[key]
                joined.waiters.setdefault(request, []).append((index, place))
                request.flights.add(joined)
        return hits

    def _start(self, flight: _Flight) -> None:
        """Submit a flight. Not under the lock: an engine may resolve futures meanwhile."""
        progress = flight.tell if flight.owner.is_followed else None
        inner = self._engine.submit(flight.sequences, progress=progress)
        with self._lock:
            flight.inner = inner
            is_awaited = bool(flight.waiters)
        inner.add_done_callback(partial(self._finish, flight))
        if not is_awaited:  # all left while it started
            inner.cancel()

    def _abandon(self, flight: _Flight, error: BaseException) -> None:
        """Fail the owner of a flight that could not start; compute the outputs of other requests without it."""
        flight.owner.fail(error)
        for request, places in self._detach(flight).items():
            if request is not flight.owner:
                self._again(request, flight, places)

    def _again(self, request: _Request, flight: _Flight, places: _Places) -> None:
        """Compute the outputs of `flight` that `request` waits for, in a flight of its own."""
        retry = _Flight(request)
        indices = {index for index, _ in places}
        numbers = {index: retry.add(flight.keys[index], flight.sequences[index]) for index in indices}
        try:
            with self._lock:
                if request.future.done():
                    return
                retry.waiters[request] = [(numbers[index], place) for index, place in places]
                request.flights.add(retry)
            self._start(retry)
        except Exception as error:
            self._abandon(retry, error)

    def _finish(self, flight: _Flight, inner: Future[list[Output]]) -> None:
        """Keep the outputs of a flight that is over, and hand them out."""
        try:
            outputs = inner.result()
            entries = self._entries(flight.keys, outputs)
        except Exception as error:
            self._fail(flight, error)
            return
        waiters = self._detach(flight, entries)
        _hand_out(outputs, waiters)
        for request, places in waiters.items():
            request.future.times = times_of(inner)
            told = flight.told if request is flight.owner else 0
            self._arrive(request, len(places), len(places) - told)

    def _entries(self, keys: list[Hashable], outputs: list[Output]) -> list[tuple[Hashable, Output, int]]:
        """Return keys, copies and sizes of the outputs that are small enough to be kept."""
        entries = []
        for key, output in zip(keys, outputs, strict=True):
            size = size_of(key) + size_of(output)
            if size <= self._store.capacity:
                entries.append((key, copied(output, writable=False), size))
        return entries

    def _fail(self, flight: _Flight, error: Exception) -> None:
        """Fail the requests that certainly have a part in a flight's error; compute outputs of the others again."""
        for request, places in self._detach(flight).items():
            if request is flight.owner or len(flight.keys) == 1:
                request.fail(error)
            else:
                self._again(request, flight, places)

    def _arrive(self, request: _Request, count: int, untold: int) -> None:
        """Note that `count` outputs of a request are in their places; the last ones resolve it."""
        request.advance(untold)
        with self._lock:
            request.left -= count
            complete = not request.left
        if complete:
            request.resolve(request.outputs)

    def _detach(self, flight: _Flight, entries: Iterable[tuple[Hashable, Output, int]] = ()) -> dict[_Request, _Places]:
        """Close a flight to further requests, and keep entries of it; return the requests that wait."""
        with self._lock:
            for entry in entries:
                self._store.put(*entry)
            self._close_flight(flight)
            waiters, flight.waiters = flight.waiters, {}
            for request in waiters:
                request.flights.discard(flight)
        return waiters

    def _leave(self, gone: weakref.ref[_Request], _: Future[list[Output]]) -> None:
        """Cancel the flights that only one request waits for, if it was cancelled or has failed."""
        request = gone()
        if request is None or not request.left:
            return
        unwanted = []
        with self._lock:
            for flight in request.flights:
                flight.waiters.pop(request, None)
                if not flight.waiters:
                    unwanted.append(flight.inner)
                    self._close_flight(flight)
            request.flights = set()
        for inner in filter(None, unwanted):
            inner.cancel()

    def _close_flight(self, flight: _Flight) -> None:
        for key in flight.keys:
            running, _ = self._running.get(key, (None, 0))
            if running is flight:
                del self._running[key]
        flight.inner = None


def _hand_out(outputs: list[Output], waiters: dict[_Request, _Places]) -> None:
    """Put outputs in their places, copies after the first, before a caller has an array and may write to it."""
    taken: set[int] = set()
    for request, places in waiters.items():
        try:
            for index, place in places:
                output = outputs[index]
                request.outputs[place] = copied(output, writable=True) if index in taken else output
                taken.add(index)
        except Exception as error:  # out of memory
            request.fail(error)
