"""Results kept by token ids, and equal sequences in flight computed once: an engine around an engine.

A request is looked up sequence by sequence. What is kept is answered; what another request, or this one, already has
under way is waited for; the rest goes to the wrapped engine as one request, here called a flight. A flight is
cancelled when nobody waits for any part of it, so a caller that gives up takes nothing from the others.

What is kept is a read-only copy of its own: the engine's arrays are views of whole batches, and belong to the caller.
Hits are copies too, because a tensor over a read-only array (`torch.from_numpy`) can be written to, which would change
the answers of others.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote import metrics
from cenote.errors import Closed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from collections.abc import Sequence as Seq
    from dataclasses import Field

    from cenote.core import Engine, Output, Sequence

log = logging.getLogger(__name__)

_ARRAY_BYTES = sys.getsizeof(np.empty(0, np.float32))
_PLAIN = frozenset((type(None), bool, int, float, str, bytes))

_OPEN: weakref.WeakSet[CachedEngine] = weakref.WeakSet()
metrics.cache_bytes.set_function(lambda: sum(engine._store.bytes for engine in [*_OPEN]))


@cache
def _fields(kind: type) -> tuple[Field[Any], ...]:
    """The fields of a dataclass; none of any other type."""
    return fields(kind) if is_dataclass(kind) else ()


@cache
def _compared(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in _fields(kind) if field.compare)


def key_of(value: Any) -> Hashable:
    """`value` as a key, by what it says and not by its types: a list of ids and an array of the same ids are equal.

    Of a dataclass, every field that is compared: a new field of `Sequence` is part of its key.
    """
    kind: Any = type(value)
    if kind in _PLAIN:
        return value  # type: ignore[no-any-return]
    if names := _compared(kind):
        return (kind, *[key_of(getattr(value, name)) for name in names])
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return frozenset((name, key_of(own)) for name, own in value.items())
    if not isinstance(value, Iterable):
        return value  # type: ignore[no-any-return]
    try:
        return array("i", value).tobytes()
    except (TypeError, OverflowError):  # no integers, or large ones
        return tuple(key_of(own) for own in value)


def copied(value: Any, *, writable: bool) -> Any:
    """`value` with new arrays, which own their memory: in fields of dataclasses, mappings, lists and tuples."""
    if isinstance(value, np.ndarray):
        value = value.copy()
        value.setflags(write=writable)
        return value
    kind: Any = type(value)
    if known := _fields(kind):
        return kind(**{field.name: copied(getattr(value, field.name), writable=writable) for field in known})
    if isinstance(value, Mapping):
        return {name: copied(own, writable=writable) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return kind(copied(own, writable=writable) for own in value)
    return value


def size_of(value: Any) -> int:
    """Bytes of a key or an output, arrays counted as if they owned their memory.

    `None` and names are counted too, though all share them; that makes up for an entry's places in the tables.
    """
    kind: Any = type(value)
    if kind in _PLAIN:
        return sys.getsizeof(value)
    if isinstance(value, np.ndarray):
        return value.nbytes + _ARRAY_BYTES
    if isinstance(value, type):
        return 0
    own = sys.getsizeof(value)
    if known := _fields(kind):
        return own + sum(size_of(getattr(value, field.name)) for field in known)
    if isinstance(value, Mapping):
        return own + sum(size_of(name) + size_of(part) for name, part in value.items())
    return own + sum(map(size_of, value)) if isinstance(value, (list, tuple, frozenset)) else own


class _Store:
    """Outputs by key; when they exceed `capacity` bytes, the least recently used go."""

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
        if (old := self._entries.pop(key, None)) is not None:
            self.bytes -= old[1]
        self._entries[key] = (output, size)
        self.bytes += size
        while self.bytes > self.capacity:
            self.bytes -= self._entries.popitem(last=False)[1][1]


class _Request:
    """One request of a caller: where its outputs gather.

    Attributes:
        left: outputs that are not there yet.
        flights: what it waits for.
    """

    __slots__ = ("__weakref__", "_progress", "flights", "future", "left", "outputs")

    def __init__(self, size: int, progress: Callable[[int], None] | None) -> None:
        self.future: Future[list[Output]] = Future()
        self.outputs: list[Any] = [None] * size
        self.left = size
        self.flights: set[_Flight] = set()
        self._progress = progress

    def advance(self, count: int) -> None:
        """Tell the caller that `count` more sequences are done; what its callback raises is its own affair."""
        if self._progress is not None and count and not self.future.done():
            try:
                self._progress(count)
            except Exception:  # a broken progress bar must not stop the device
                log.exception("the progress callback failed")

    def resolve(self) -> None:
        """Answer."""
        self._settle(lambda: self.future.set_result(self.outputs))

    def fail(self, error: BaseException) -> None:
        """Answer with an error; later outputs and errors are ignored."""
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, action: Callable[[], None]) -> None:
        try:
            action()
        except InvalidStateError:
            log.debug("a request was answered already, or its caller gave up")


class _Flight:
    """One submission to the wrapped engine, and who waits for it.

    Attributes:
        owner: the request that it was made for.
        keys: of `sequences`, all different.
        waiters: places in a flight and in the request of what each request waits for.
        inner: the engine's future, while there is one.
        told: how many sequences the engine has reported as done.
    """

    __slots__ = ("inner", "keys", "owner", "sequences", "told", "waiters")

    def __init__(self, owner: _Request) -> None:
        self.owner = owner
        self.keys: list[Hashable] = []
        self.sequences: list[Sequence] = []
        self.waiters: dict[_Request, list[tuple[int, int]]] = {}
        self.inner: Future[list[Output]] | None = None
        self.told = 0

    def add(self, key: Hashable, sequence: Sequence) -> int:
        """Take a sequence aboard; returns its place."""
        self.keys.append(key)
        self.sequences.append(sequence)
        return len(self.keys) - 1

    def tell(self, count: int) -> None:
        """The engine's progress is the owner's; others hear of theirs at the end."""
        self.told += count
        self.owner.advance(count)


class CachedEngine:
    """Answers from what `engine` answered before.

    Args:
        engine: what computes.
        capacity: bytes of outputs and keys that are kept.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.info = engine.info
        self._engine = engine
        self._store: _Store = _Store(capacity)
        self._running: dict[Hashable, tuple[_Flight, int]] = {}
        self._lock = threading.RLock()  # the garbage collector may cancel a future inside
        self._closed = False
        _OPEN.add(self)

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`. For what is kept, `progress` is called before this returns.

        An error fails the request that began the work, and those that joined it. If the work was several sequences, it
        is not known which of them failed: what others need of them is then computed once more, for each by itself.
        """
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
        """See `cenote.core.Engine.healthy`; nothing kept is an answer to this."""
        return self._engine.healthy()

    def close(self) -> None:
        """See `cenote.core.Engine.close`."""
        self._closed = True  # without the lock: an owner may be garbage-collected where it is held
        _OPEN.discard(self)
        self._engine.close()

    def _look_up(
        self, request: _Request, flight: _Flight, keys: list[Hashable], sequences: Seq[Sequence]
    ) -> list[tuple[int, Output]]:
        """What is kept, by place; for the rest, join what is under way, else `flight`."""
        hits = []
        with self._lock:
            if self._closed:
                raise Closed("the engine is shutting down")
            for place, (key, sequence) in enumerate(zip(keys, sequences, strict=True)):
                if (kept := self._store.get(key)) is not None:
                    hits.append((place, kept))
                    continue
                if (found := self._running.get(key)) is None:
                    found = self._running[key] = (flight, flight.add(key, sequence))
                joined, index = found
                joined.waiters.setdefault(request, []).append((index, place))
                request.flights.add(joined)
        return hits

    def _start(self, flight: _Flight) -> None:
        """Submit a flight. Not under the lock: an engine may resolve futures meanwhile."""
        progress = None if flight.owner._progress is None else flight.tell
        inner = self._engine.submit(flight.sequences, progress=progress)
        with self._lock:
            flight.inner = inner
            wanted = bool(flight.waiters)
        inner.add_done_callback(partial(self._finish, flight))
        if not wanted:  # all left while it started
            inner.cancel()

    def _abandon(self, flight: _Flight, error: BaseException) -> None:
        """A flight could not start: its owner fails, and those who joined meanwhile go by themselves."""
        flight.owner.fail(error)
        for request, wanted in self._detach(flight).items():
            if request is not flight.owner:
                self._again(request, flight, wanted)

    def _again(self, request: _Request, flight: _Flight, wanted: list[tuple[int, int]]) -> None:
        """Compute what `request` wanted of `flight` as if there were no others."""
        retry = _Flight(request)
        numbers = {index: retry.add(flight.keys[index], flight.sequences[index]) for index in {i for i, _ in wanted}}
        try:
            with self._lock:
                if request.future.done():
                    return
                retry.waiters[request] = [(numbers[index], place) for index, place in wanted]
                request.flights.add(retry)
            self._start(retry)
        except Exception as error:
            self._abandon(retry, error)

    def _finish(self, flight: _Flight, inner: Future[list[Output]]) -> None:
        """A flight is over: keep its outputs and hand them out."""
        kept: list[tuple[Hashable, Output, int]] = []
        failure: Exception | None = None
        try:
            outputs = inner.result()
            for key, output in zip(flight.keys, outputs, strict=True):
                size = size_of(key) + size_of(output)
                if size <= self._store.capacity:
                    kept.append((key, copied(output, writable=False), size))
        except Exception as error:
            failure = error
            kept = []
        waiters = self._detach(flight, kept)
        if failure is not None:
            for request, wanted in waiters.items():
                if request is flight.owner or len(flight.keys) == 1:
                    request.fail(failure)
                else:
                    self._again(request, flight, wanted)
            return
        taken: set[int] = set()
        for request, wanted in waiters.items():  # before anybody has an array and may write to it
            try:
                for index, place in wanted:
                    request.outputs[place] = copied(outputs[index], writable=True) if index in taken else outputs[index]
                    taken.add(index)
            except Exception as error:  # out of memory
                request.fail(error)
        for request, wanted in waiters.items():
            told = flight.told if request is flight.owner else 0
            self._arrive(request, len(wanted), len(wanted) - told)

    def _arrive(self, request: _Request, count: int, untold: int) -> None:
        """`count` outputs of a request are in their places; the last ones resolve it."""
        request.advance(untold)
        with self._lock:
            request.left -= count
            complete = not request.left
        if complete:
            request.resolve()

    def _detach(
        self, flight: _Flight, kept: Iterable[tuple[Hashable, Output, int]] = ()
    ) -> dict[_Request, list[tuple[int, int]]]:
        """Let nobody join a flight any more, and keep what it brought; returns those who wait."""
        with self._lock:
            for key, output, size in kept:
                self._store.put(key, output, size)
            self._close_flight(flight)
            waiters, flight.waiters = flight.waiters, {}
            for request in waiters:
                request.flights.discard(flight)
        return waiters

    def _leave(self, gone: weakref.ref[_Request], _: Future[list[Output]]) -> None:
        """A request is over; if it was cancelled or failed, what it alone waited for is cancelled."""
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
        for inner in unwanted:
            if inner is not None:
                inner.cancel()

    def _close_flight(self, flight: _Flight) -> None:
        for key in flight.keys:
            if key in self._running and self._running[key][0] is flight:
                del self._running[key]
        flight.inner = None
