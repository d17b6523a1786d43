"""An engine in another process, which listens on a Unix socket: the front's end of `cenote.engine.host`.

A lost connection fails the requests under way (503) and is made again as soon as a host listens; requests that come
meanwhile are refused at once. A host that comes back with another model is refused: sequences rendered for the first
model would be wrong.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import cenote
from cenote.engine.owner import Owner
from cenote.engine.promise import Promise, check_caller
from cenote.engine.wire import (
    HOST_DECODER,
    LARGEST_ANSWER,
    Answer,
    Ask,
    Cancel,
    Card,
    Channel,
    FromHost,
    Health,
    Hello,
    Progress,
    Submit,
    WireError,
    error_of,
)
from cenote.errors import CenoteError, Closed, ConfigError, EngineGone
from cenote.functions import coalesce

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from collections.abc import Sequence as Seq
    from concurrent.futures import Future
    from pathlib import Path

    from cenote.core import ModelInfo, Output, Sequence

    Frames = Generator[FromHost]

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that the first connection may take: the engine may still be loading."""
HEALTH_PATIENCE = 40.0
"""Seconds that a health check waits for the host, which may run a forward for it."""
INTRODUCTION = 10.0
"""Seconds that a host may take to introduce itself."""
GONE = "the engine's process is gone; send the request again once it is back"
LOST = "the engine's process was lost before it answered; send the request again"
SOONEST, LATEST = 0.05, 1.0
"""Seconds between two attempts to connect, at first and in the end."""


class RemoteEngine:
    """An engine that a `Host` in another process runs.

    Args:
        path: path of the host's socket.
        patience: seconds to wait until there is a host.

    Attributes:
        info: the model, as the host described it at the last connection. Only the report of how it runs may change, and
            the layers above may keep what they took from an earlier one: a server estimates waits by its first one.
        about: the host's plain data beside `info`, as it was at the first connection.
        fault: always empty: a host that is lost may come back.

    Raises:
        ConfigError: there is no host, or it has another version.
    """

    def __init__(self, path: str | Path, *, patience: float = PATIENCE) -> None:
        self._path = str(path)
        self.fault = ""
        self._owner = Owner()
        self._lock = threading.Lock()
        self._pending: dict[int, Promise[Any]] = {}
        self._numbers = itertools.count()
        self._closing = threading.Event()
        self._channel: Channel[FromHost] | None = None
        self._why_not = GONE
        deadline = time.monotonic() + patience
        channel, frames, card = self._first_connection(deadline)
        self.info: ModelInfo = card.info
        self.about = card.about
        self._channel = channel
        self._thread = threading.Thread(target=self._run, args=(frames,), name="cenote-remote", daemon=True)
        self._thread.start()
        log.info("connected to the engine at %s", self._path)

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`. Refusals of the host are the future's exception.

        Raises:
            EngineFailed: it is called in a forked child, or from a progress callback.
            Closed: this engine was closed.
            EngineGone: there is no host.
        """
        self._owner.check()
        check_caller()
        promise: Promise[list[Output]] = Promise(progress)
        number, channel = self._enter(promise)
        try:
            channel.send(Submit(number, [_plain(sequence) for sequence in sequences], promise.is_followed))
        except BaseException:
            self._leave(number)
            raise
        promise.future.add_done_callback(partial(self._cancelled, number))
        return promise.future

    def healthy(self) -> bool:
        """Return whether the host can be reached and its engine is healthy."""
        promise: Promise[bool] = Promise()
        try:
            self._owner.check()
            number, channel = self._enter(promise)
        except CenoteError:
            return False
        channel.send(Ask(number))
        try:
            return promise.future.result(HEALTH_PATIENCE)
        except (CenoteError, TimeoutError):
            return False
        finally:
            self._leave(number)

    def close(self) -> None:
        """Refuse new requests, wait for the accepted ones, and disconnect. The host goes on.

        In a forked child there is nothing to close: the connection is the parent's.
        """
        if not self._owner.is_here:
            return
        self._closing.set()
        is_reader = self._thread is threading.current_thread()  # an owner may be garbage-collected there
        with self._lock:
            under_way = [promise.future for promise in self._pending.values()]
        if not is_reader:
            wait(under_way)
        with self._lock:
            channel = self._channel
        if channel is not None:
            channel.close()
        if not is_reader:
            self._thread.join()

    def _enter(self, promise: Promise[Any]) -> tuple[int, Channel[FromHost]]:
        """Return the number of a new request, and the connection to send it by."""
        with self._lock:
            if self._closing.is_set():
                raise Closed("the engine is shutting down")
            if self._channel is None:
                raise EngineGone(self._why_not)
            number = next(self._numbers)
            self._pending[number] = promise
            return number, self._channel

    def _leave(self, number: int) -> Promise[Any] | None:
        with self._lock:
            return self._pending.pop(number, None)

    def _cancelled(self, number: int, future: Future[list[Output]]) -> None:
        """Tell the host that a request was cancelled, unless it was answered and has left already."""
        with self._lock:
            promise = self._pending.pop(number, None)
            channel = self._channel
        if promise is not None and channel is not None:
            channel.send(Cancel(number))

    def _run(self, frames: Frames) -> None:
        """Read frames, one connection after the other."""
        while True:
            try:
                for frame in frames:
                    self._take(frame)
            except WireError as error:
                log.error("the engine at %s is not understood: %s", self._path, error)
            self._lose()
            connected = self._connected_again()
            if connected is None:
                return
            channel, frames = connected
            with self._lock:
                self._channel = channel
            if self._closing.is_set():
                channel.close()
            log.info("connected to the engine at %s again", self._path)

    def _take(self, frame: FromHost) -> None:
        if isinstance(frame, Progress):
            self._advance(frame)
            return
        if isinstance(frame, (Hello, Card)):
            raise WireError("the host introduces itself a second time")
        promise = self._leave(frame.number)
        if promise is None:  # cancelled
            return
        if isinstance(frame, Answer):
            promise.future.times = frame.times
            promise.resolve(frame.outputs)
        elif isinstance(frame, Health):
            promise.resolve(frame.is_well)
        else:
            promise.fail(error_of(frame))

    def _advance(self, frame: Progress) -> None:
        with self._lock:
            promise = self._pending.get(frame.number)
        if promise is not None:
            promise.future.times = frame.times
            promise.advance(frame.count)

    def _lose(self) -> None:
        """Fail the requests of a connection that is over."""
        with self._lock:
            self._channel = None
            self._why_not = GONE
            lost = [*self._pending.values()]
            self._pending.clear()
        if not self._closing.is_set():
            log.error("lost the engine at %s, and %d requests with it", self._path, len(lost))
        for promise in lost:
            promise.fail(EngineGone(LOST))

    def _refuse(self, why_not: str) -> None:
        """Refuse requests from now on, for the reason `why_not`."""
        if why_not != self._why_not:
            log.error("%s: %s", self._path, why_not)
        with self._lock:
            self._why_not = why_not

    def _first_connection(self, deadline: float) -> tuple[Channel[FromHost], Frames, Card]:
        pause = SOONEST
        while True:
            try:
                return _connect(self._path)
            except (OSError, WireError) as error:
                if time.monotonic() + pause > deadline:
                    reason = getattr(error, "strerror", None) or error
                    raise ConfigError(
                        f"cannot reach an engine at {self._path}: {reason}; "
                        "start one with: cenote engine MODEL --listen PATH"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, LATEST)

    def _connected_again(self) -> tuple[Channel[FromHost], Frames] | None:
        """Connect to a host of the same model, however long it takes; return `None` when this engine is closed."""
        pause = SOONEST
        while not self._closing.wait(pause):
            pause = min(2 * pause, LATEST)
            try:
                channel, frames, card = _connect(self._path)
            except (OSError, WireError):
                self._refuse(GONE)
                continue
            except ConfigError as error:
                self._refuse(error.message)
                continue
            if _contract(card) == _contract(Card(self.info, self.about)):
                self.info = card.info
                return channel, frames
            channel.close()
            frames.close()
            self._refuse(f"the engine's process is another one's now, of {card.info.name}; restart this server")
        return None


def _connect(path: str) -> tuple[Channel[FromHost], Frames, Card]:
    """Connect; return the channel, its frames, and the host's card, which was among the first of them.

    Raises:
        OSError: nobody listens.
        WireError: the host is gone before it introduced itself, or sends malformed frames.
        ConfigError: the host has another version.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(INTRODUCTION)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    channel: Channel[FromHost] = Channel(connection, HOST_DECODER, LARGEST_ANSWER)
    frames = channel.frames()
    try:
        card = _introduction(path, frames)
    except BaseException:
        frames.close()
        raise
    connection.settimeout(None)
    return channel, frames, card


def _introduction(path: str, frames: Frames) -> Card:
    hello = next(frames, None)
    if not isinstance(hello, Hello):
        raise WireError("the host is gone before it said its version")
    if hello.version != cenote.__version__:
        raise ConfigError(
            f"the engine at {path} is of Cenote {hello.version}, and this is {cenote.__version__}: "
            "both must be of one version"
        )
    card = next(frames, None)
    if not isinstance(card, Card):
        raise WireError("the host is gone before it described its model")
    return card


def _contract(card: Card) -> tuple[ModelInfo, Any]:
    """Return the parts of a card that must not change while a front runs: all but the device, the speed and the ranges.

    Ranges of int8 that come from texts differ by rounding at each start. A front goes on with its own.
    """
    info = card.info.reported(
        device="", layout="", linears="", shares_prefixes=False, company="", streams=1, batch_tokens=0, warnings=()
    )
    return info, {**coalesce(card.about, {}), "ranges": None}


def _plain(sequence: Sequence) -> Sequence:
    """Return `sequence` with its ids as lists, the form in which integers are sent."""
    ids, types = sequence.ids, sequence.type_ids
    if isinstance(ids, np.ndarray):
        sequence = replace(sequence, ids=ids.tolist())
    if isinstance(types, np.ndarray):
        sequence = replace(sequence, type_ids=types.tolist())
    return sequence
