"""Load: requests of clients that wait for each answer, or that arrive whether or not earlier ones are answered."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cenote.errors import CenoteError
from cenote.functions import coalesce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Seq

    Request = Seq[str]
    Ask = Callable[[Request], int]

MOST_UNDER_WAY = 256
"""Default of the requests of an open loop that are sent before earlier ones are answered."""


@dataclass
class Sample:
    """The answers and errors of one run of a load.

    Attributes:
        seconds: from its beginning to the last answer.
        texts: texts that were answered.
        tokens: tokens that were run for them, as the model counts.
        latencies: seconds of each answered request; in an open loop from its arrival.
        errors: messages of the other requests.
    """

    seconds: float = 0.0
    texts: int = 0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def texts_per_second(self) -> float:
        """Rate of texts that were answered."""
        return self.texts / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Rate of their tokens."""
        return self.tokens / self.seconds

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Sample:
        """Return `samples` taken together."""
        total = cls()
        for sample in samples:
            total.seconds += sample.seconds
            total.texts += sample.texts
            total.tokens += sample.tokens
            total.latencies += sample.latencies
            total.errors += sample.errors
        return total


class _Run:
    """A run under way; its clients are threads."""

    def __init__(self, ask: Ask, progress: Callable[[int], object]) -> None:
        self.sample = Sample()
        self.began = time.perf_counter()
        self._ask = ask
        self._progress = progress
        self._lock = threading.Lock()

    def send(self, request: Request, since: float | None = None) -> None:
        """Send a request and note its answer."""
        since = coalesce(since, time.perf_counter())
        try:
            tokens, error = self._ask(request), ""
        except CenoteError as failure:
            tokens, error = 0, failure.message
        now = time.perf_counter()
        with self._lock:
            self.sample.seconds = max(self.sample.seconds, now - self.began)
            if error:
                self.sample.errors.append(error)
            else:
                self.sample.latencies.append(now - since)
                self.sample.texts += len(request)
                self.sample.tokens += tokens
            self._progress(len(request))


def closed(
    ask: Ask, requests: Iterable[Request], *, clients: int = 1, progress: Callable[[int], object] = lambda _: None
) -> Sample:
    """Send requests by clients that each wait for an answer before the next one.

    Args:
        ask: sends a request and returns its tokens; called in several threads.
        requests: texts each; taken one by one, as clients become free.
        clients: number of clients.
        progress: called with the texts of each request that is answered or has failed.
    """
    source = iter(requests)
    taking = threading.Lock()
    stopped = threading.Event()
    run = _Run(ask, progress)

    def client() -> None:
        while not stopped.is_set():
            with taking:
                request = next(source, None)
            if request is None:
                return
            run.send(request)

    with ThreadPoolExecutor(clients) as pool:
        try:
            for future in [pool.submit(client) for _ in range(clients)]:
                future.result()
        finally:
            stopped.set()
    return run.sample


def opened(
    ask: Ask,
    requests: Iterable[Request],
    *,
    rate: float,
    most: int = MOST_UNDER_WAY,
    seed: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> Sample:
    """Send requests that arrive at random (Poisson), `rate` a second on average.

    Args:
        ask: as for `closed`, as are the others.
        requests: see `closed`.
        rate: arrivals per second.
        most: requests under way; those that arrive beyond wait, and their waiting counts.
        seed: of the arrivals.
        progress: see `closed`.
    """
    generator = random.Random(seed)
    run = _Run(ask, progress)
    arrival = run.began
    futures = []
    with ThreadPoolExecutor(most) as pool:
        try:
            for request in requests:
                arrival += generator.expovariate(rate)
                time.sleep(max(0.0, arrival - time.perf_counter()))
                futures.append(pool.submit(run.send, request, arrival))
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return run.sample
