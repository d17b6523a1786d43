"""Load on a peer's server for a given time, by the clients of `cenote bench`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

from benchmarks.peers.envs import PeerError
from cenote.cli import load
from cenote.cli.targets import Remote
from cenote.errors import CenoteError

SETTLE = 0.5
"""Seconds at the start of a closed loop that do not count."""

PATIENCE = 60.0
"""Seconds that an answer may take."""

Answers = dict[str, float | list[float]]


class Clients:
    """The clients of one server, over connections that are kept.

    Args:
        port: of the server, on this machine.
        name: of its model.

    Raises:
        PeerError: it does not answer, or does not serve the model.
    """

    def __init__(self, port: int, name: str) -> None:
        try:
            self._remote = Remote(f"http://127.0.0.1:{port}", name, "embed", patience=PATIENCE)
        except CenoteError as error:
            raise PeerError(error.message) from None

    def stop(self) -> None:
        """Close the connections."""
        self._remote.close()

    def closed(self, texts: list[str], clients: int, seconds: float) -> Answers:
        """Send one text after the other by clients that each wait for an answer before the next one.

        Returns:
            "rate": answers per second; "latencies": seconds, of the answers within the `seconds` that count.

        Raises:
            PeerError: a request failed.
        """
        first = time.perf_counter() + SETTLE
        last = first + seconds
        latencies: list[float] = []

        def ask(request: Sequence[str]) -> int:
            sent = time.perf_counter()
            tokens = self._ask(request)
            done = time.perf_counter()
            if first <= done < last:
                latencies.append(done - sent)
            return tokens

        load.closed(ask, _until(last, texts), clients=clients)
        return {"rate": len(latencies) / seconds, "latencies": latencies}

    def opened(self, texts: list[str], rate: float, seconds: float, seed: int) -> Answers:
        """Send texts that arrive at random (Poisson), `rate` a second, whether or not earlier ones are answered.

        Returns:
            "rate": requests sent per second; "latencies": seconds from the arrival, the wait for a connection included.

        Raises:
            PeerError: a request failed.
        """
        requests = _until(time.perf_counter() + seconds, texts)
        sample = load.opened(self._ask, requests, rate=rate, seed=seed)
        return {"rate": len(sample.latencies) / seconds, "latencies": sample.latencies}

    def _ask(self, request: Sequence[str]) -> int:
        """Send a request; an error, unlike those that `cenote bench` counts, ends the load."""
        try:
            return self._remote.ask(request)
        except CenoteError as error:
            raise PeerError(error.message) from None


def _until(last: float, texts: list[str]) -> Iterator[list[str]]:
    """Yield requests of one text, again and again, until the clock shows `last`."""
    for text in itertools.cycle(texts):
        if time.perf_counter() >= last:
            return
        yield [text]
