"""Counters and histograms, by name. No web and no torch: any layer may count, the server shows.

One registry per process; `LLM` counts too, which costs nothing that can be measured.
"""

from __future__ import annotations

import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cenote.functions import coalesce

if TYPE_CHECKING:
    from types import TracebackType

REGISTRY = CollectorRegistry()

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_POWERS = tuple(2**n for n in range(17))

requests = Counter("cenote_requests", "Requests answered", ("route", "status"), registry=REGISTRY)
request_seconds = Histogram(
    "cenote_request_seconds",
    "From the request's head to the last byte of the answer",
    ("route",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
stage_seconds = Histogram(
    "cenote_stage_seconds",
    "Time in one stage: parse, render, queue, forward, encode",
    ("stage",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
running_requests = Gauge("cenote_running_requests", "Requests accepted and not yet answered", registry=REGISTRY)
queued_sequences = Gauge("cenote_queued_sequences", "Sequences that wait for a batch", registry=REGISTRY)
queued_tokens = Gauge("cenote_queued_tokens", "Tokens that wait for a batch", registry=REGISTRY)
pending_bytes = Gauge(
    "cenote_pending_bytes", "Bytes of request bodies that are received and not yet answered", registry=REGISTRY
)
waiting_seconds = Gauge(
    "cenote_waiting_seconds", "Estimated seconds that a new request would wait for its forward", registry=REGISTRY
)
refusals = Counter("cenote_refusals", "Requests answered with an error, by its reason", ("reason",), registry=REGISTRY)
batch_sequences = Histogram("cenote_batch_sequences", "Sequences per batch", buckets=_POWERS[:12], registry=REGISTRY)
batch_tokens = Histogram("cenote_batch_tokens", "Tokens per batch", buckets=_POWERS, registry=REGISTRY)
tokens = Counter("cenote_tokens", "Tokens run", registry=REGISTRY)
sequences = Counter("cenote_sequences", "Sequences by outcome: done, failed, dropped", ("outcome",), registry=REGISTRY)
forwards_again = Counter("cenote_forwards_again", "Forwards over a part of a batch that failed", registry=REGISTRY)
cache_hits = Counter("cenote_cache_hits", "Sequences answered from the cache", registry=REGISTRY)
cache_misses = Counter("cenote_cache_misses", "Sequences that the cache had to compute", registry=REGISTRY)
cache_joined = Counter("cenote_cache_joined", "Sequences that waited for an equal one under way", registry=REGISTRY)
cache_bytes = Gauge("cenote_cache_bytes", "Bytes of results and keys in the cache", registry=REGISTRY)
tokens_per_second = Gauge("cenote_tokens_per_second", "Tokens run per second, over the last 10", registry=REGISTRY)


@cache
def stage(name: str) -> Histogram:
    """Return `stage_seconds` of one stage: looking a child up by its labels takes longer than counting."""
    return stage_seconds.labels(name)


class Stage(NamedTuple):
    """One stage of a request, in seconds of the monotonic clock."""

    name: str
    began: float
    ended: float


@dataclass(slots=True)
class Trip:
    """A request that somebody follows.

    Attributes:
        stages: those that it has been through; any thread may append.
        model: its served name; empty until it is known.
        sequences: that the engine runs for it.
        tokens: of these.
    """

    stages: list[Stage] = field(default_factory=list)
    model: str = ""
    sequences: int = 0
    tokens: int = 0


trip: ContextVar[Trip | None] = ContextVar("cenote_trip", default=None)
"""The request of the running task, if somebody follows it."""


class timed:  # a verb where it is used, and a class because a generator takes three times as long
    """Time a block of a request as one of its stages; one that raises counts for the trip alone."""

    __slots__ = ("_began", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        ended = time.monotonic()
        if kind is None:
            stage(self._name).observe(ended - self._began)
        followed = trip.get()
        if followed is not None:
            followed.stages.append(Stage(self._name, self._began, ended))


@cache
def requests_of(route: str, status: int) -> Counter:
    """Return `requests` of a route and a status."""
    return requests.labels(route, str(status))


@cache
def seconds_of(route: str) -> Histogram:
    """Return `request_seconds` of a route."""
    return request_seconds.labels(route)


@cache
def sequences_of(outcome: str) -> Counter:
    """Return `sequences` of an outcome."""
    return sequences.labels(outcome)


@cache
def refusals_of(reason: str) -> Counter:
    """Return `refusals` of a reason."""
    return refusals.labels(reason)


class Rate:
    """Tokens per second over a sliding window. The device thread adds, any thread reads."""

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._events: deque[tuple[float, int]] = deque()

    def add(self, amount: int, now: float | None = None) -> None:
        """Count `amount` at time `now` (default: this moment)."""
        now = coalesce(now, time.monotonic())
        self._events.append((now, amount))
        self._forget(now)

    def value(self, now: float | None = None) -> float:
        """Return the amount per second over the window."""
        now = coalesce(now, time.monotonic())
        return sum(amount for at, amount in [*self._events] if at > now - self._window) / self._window

    def _forget(self, now: float) -> None:
        while self._events and self._events[0][0] <= now - self._window:
            self._events.popleft()
