"""An engine that serves other processes: it listens on a Unix socket, and any number of fronts connect.

Anyone that may open the socket may run the model, so it belongs to the user alone (mode 0600). The requests of a front
that is lost are cancelled; a front that sends malformed frames is disconnected, and the others go on.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, starmap
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cenote
from cenote.config import LAST_RESORT
from cenote.engine.promise import Times, times_of
from cenote.engine.wire import (
    FLUSH,
    FRONT_DECODER,
    LARGEST_REQUEST,
    Answer,
    Ask,
    Cancel,
    Card,
    Channel,
    Fault,
    FromFront,
    Health,
    Hello,
    Progress,
    Submit,
    WireError,
    fault,
)
from cenote.errors import BadRequest, CenoteError, Closed, ConfigError
from cenote.functions import coalesce

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq
    from concurrent.futures import Future

    from cenote.core import Engine, ModelInfo, Output, Sequence

log = logging.getLogger(__name__)

TICK = 0.1
"""Seconds between looks at the engine, and between attempts to accept a front."""


class Host:
    """Serves an engine to the processes that connect.

    Args:
        engine: runs their requests; closed with the host.
        path: path of the socket. Its folder is made if there is none, for the user alone.
        about: plain data by name that every front gets beside the model's `info`.

    Raises:
        ConfigError: the socket cannot be made, or another host listens there.
    """

    def __init__(self, engine: Engine, path: str | Path, about: dict[str, Any] | None = None) -> None:
        self._engine = engine
        self._card = Card(engine.info, about)
        self._path = Path(path)
        self._fronts: set[_Front] = set()
        self._lock = threading.Lock()
        self._doctor = ThreadPoolExecutor(1, thread_name_prefix="cenote-health")
        self._listener = listening_at(self._path)
        self._inode = self._path.stat().st_ino
        self._closing = threading.Event()
        self._trouble = ""
        self._thread = threading.Thread(target=self._accept, name="cenote-host", daemon=True)
        self._thread.start()

    @property
    def fronts(self) -> int:
        """Number of fronts that are connected."""
        return len(self._fronts)

    def wait(self, ended: threading.Event) -> None:
        """Wait until `ended` is set, or the engine has a fault."""
        while not self.fault and not ended.wait(TICK):
            pass

    @property
    def fault(self) -> str:
        """The engine's fault; see `cenote.core.Engine.fault`."""
        return self._engine.fault

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new fronts, finish the accepted requests, close the engine, and disconnect. May be called twice.

        Args:
            timeout: seconds that requests under way have; then they are answered with `Closed`. `None` = no limit.

        Returns:
            Whether the engine has ended well; otherwise it has a fault, or hangs in a forward.
        """
        if self._closing.is_set():
            return not self._trouble
        self._closing.set()
        if self._path.exists() and self._path.stat().st_ino == self._inode:  # no other host has taken the place
            self._path.unlink()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        ending = threading.Thread(target=self._engine.close, name="cenote-end", daemon=True)
        ending.start()
        ending.join(timeout)
        with self._lock:
            fronts = [*self._fronts]
        if ending.is_alive():
            count = sum(front.drop() for front in fronts)
            log.warning("%d requests were not done in time and are answered 503", count)
            ending.join(LAST_RESORT)
        for front in fronts:
            front.close()
        self._doctor.shutdown(wait=False)
        hangs = "the process does not end by itself: something hangs" if ending.is_alive() else ""
        self._trouble = self.fault or hangs
        if self._trouble:
            log.critical("%s", self._trouble)
        return not self._trouble

    def _accept(self) -> None:
        """Take fronts until the host closes; those that come while it has no descriptor for them wait."""
        is_failing = False
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not is_failing and not self._closing.is_set():
                    log.error("fronts cannot connect for now: %s", error)
                is_failing = True
                self._closing.wait(TICK)
                continue
            is_failing = False
            front = _Front(connection, self._engine, self._card, self._doctor)
            with self._lock:
                self._fronts.add(front)
            threading.Thread(target=self._serve, args=(front,), name="cenote-front", daemon=True).start()

    def _serve(self, front: _Front) -> None:
        try:
            front.run()
        finally:
            with self._lock:
                self._fronts.discard(front)


class _Front:
    """The host's end of one connection."""

    def __init__(self, connection: socket.socket, engine: Engine, card: Card, doctor: ThreadPoolExecutor) -> None:
        self._channel: Channel[FromFront] = Channel(connection, FRONT_DECODER, LARGEST_REQUEST)
        self._engine = engine
        self._card = card
        self._doctor = doctor
        self._running: dict[int, Future[list[Output]]] = {}

    def run(self) -> None:
        """Serve the front until it is gone."""
        self._channel.send(Hello(cenote.__version__))
        self._channel.send(self._card)
        try:
            for frame in self._channel.frames():
                self._take(frame)
        except WireError as error:
            log.warning("a front is disconnected: %s", error)
        self.drop()

    def close(self) -> None:
        """Disconnect, once the front has received the frames that were sent."""
        self._channel.close(FLUSH)

    def drop(self) -> int:
        """Cancel the requests under way; return their number."""
        return sum(future.cancel() for future in [*self._running.values()])

    def _take(self, frame: FromFront) -> None:
        if isinstance(frame, Submit):
            self._submit(frame)
        elif isinstance(frame, Cancel):
            future = self._running.get(frame.number)
            if future is not None:
                future.cancel()
        else:
            self._doctor.submit(self._examine, frame)

    def _submit(self, frame: Submit) -> None:
        progress = partial(self._report, frame.number) if frame.follows else None
        try:
            _check(frame.sequences, self._engine.info)
            future = self._engine.submit(frame.sequences, progress=progress)
        except CenoteError as error:
            self._channel.send(fault(frame.number, error))
            return
        except Exception as error:  # any error of the engine is the answer
            log.exception("a request cannot be run")
            self._channel.send(fault(frame.number, error))
            return
        self._running[frame.number] = future
        future.add_done_callback(partial(self._answer, frame.number))

    def _report(self, number: int, count: int) -> None:
        future = self._running.get(number)
        times = Times() if future is None else times_of(future)  # the first forward may end before it is there
        self._channel.send(Progress(number, count, times))

    def _answer(self, number: int, future: Future[list[Output]]) -> None:
        """Send the outcome of a request. A front that has cancelled it ignores the answer."""
        self._running.pop(number, None)
        try:
            self._channel.send(_outcome(number, future))
        except Exception as error:  # an output that cannot be sent
            log.exception("a request cannot be answered")
            self._channel.send(fault(number, error))

    def _examine(self, frame: Ask) -> None:
        self._channel.send(Health(frame.number, self._engine.healthy()))


def _outcome(number: int, future: Future[list[Output]]) -> Answer | Fault:
    if future.cancelled():
        return fault(number, Closed("the engine dropped the request"))
    error = future.exception()
    return Answer(number, future.result(), times_of(future)) if error is None else fault(number, error)


def _check(sequences: list[Sequence], info: ModelInfo) -> None:
    """Refuse sequences that no renderer makes: they could fail a batch, and with it the requests of others.

    Raises:
        BadRequest: a task is not offered, there are no ids or too many, one is outside the vocabulary, or another field
            names tokens that there are not.
    """
    for sequence in sequences:
        foreign = {sequence.task, *sequence.also} - {*info.tasks}
        if foreign:
            raise BadRequest(f"{info.name} does not offer {min(foreign)!r}, but {', '.join(info.tasks)}")
        limit = info.limit(sequence.task)
        if not 1 <= len(sequence.ids) <= limit:
            raise BadRequest(f"got {len(sequence.ids)} tokens, expected 1 to {limit}")
        if min(sequence.ids) < 0 or max(sequence.ids) >= info.vocab_size:
            raise BadRequest(f"got a token id out of 0 to {info.vocab_size - 1}")
        if sequence.type_ids is not None:
            _check_types(sequence.type_ids, len(sequence.ids), info.type_vocab_size)
        _check_rows(sequence)
        _check_media(sequence)


def _check_types(types: Seq[int], length: int, rows: int) -> None:
    if len(types) != length:
        raise BadRequest(f"got {len(types)} type ids for {length} tokens")
    if rows and (min(types) < 0 or max(types) >= rows):
        raise BadRequest(f"got a type id out of 0 to {rows - 1}")


def _check_rows(sequence: Sequence) -> None:
    """Refuse rows to pool that are not the sequence's: they would be those of its neighbours, or of no memory at all.

    A prompt that pooling skips may be longer than a sequence that was cut.
    """
    length = len(sequence.ids)
    if sequence.skip < 0 or not 0 <= sequence.hidden < length:
        raise BadRequest(f"got {sequence.skip} skipped and {sequence.hidden} hidden of {length} tokens")
    if set(coalesce(sequence.keep, ())).difference(range(length)):
        raise BadRequest(f"got a kept place out of 0 to {length - 1}")
    late = sequence.params.late_chunking_params
    ends = () if late is None else late.ends
    if ends and sorted({0, *ends, length}) != [0, *ends]:
        raise BadRequest(f"got chunks that end at {ends}, expected rising ends up to {length}")


def _check_media(sequence: Sequence) -> None:
    """Refuse pictures that do not fill their places, and positions of another number of tokens."""
    length = len(sequence.ids)
    ends = [0, *chain.from_iterable(sequence.spans), length]
    lengths = list(map(len, starmap(range, sequence.spans)))
    if sorted(ends) != ends or lengths != list(map(attrgetter("tokens"), sequence.media)):
        raise BadRequest(f"got pictures at {sequence.spans}, expected places in order that they fill")
    positions = coalesce(sequence.positions, np.empty(length)).shape[-1]
    if positions != length:
        raise BadRequest(f"got {positions} positions for {length} tokens")


def check_path(path: str | Path) -> None:
    """Raise `ConfigError` if no host can listen at `path`."""
    path = Path(path)
    listening_at(path).close()
    path.unlink()


def listening_at(path: Path) -> socket.socket:
    """Return a socket at `path` that only this user can open; one left by a killed process is replaced.

    Raises:
        ConfigError: it cannot be made, or another process listens there.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_room(path)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _make_room(path: Path) -> None:
    """Remove a socket that nobody listens on.

    Raises:
        ConfigError: another host listens there, or the file is not a socket.
    """
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"cannot listen on {path}: it is a file, not a socket; name another path, or remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"cannot listen on {path}: another process does")
