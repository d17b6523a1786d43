"""The protocol between an engine's process (the host) and the processes in front of it (fronts): frames over a socket.

A frame is its length (8 bytes, little-endian) and a typed message in MessagePack. Arrays are their dtype, shape and raw
bytes. Every message is validated while it is decoded, against the annotations of the classes below and of
`cenote.core`, so a new field of `Sequence` or `Output` is sent without further code. Nothing is pickled.

| from the front | | from the host | |
|---|---|---|---|
| `Submit` | run these sequences | `Hello` | first of all: the version |
| `Cancel` | drop a request | `Card` | the model, and the facts that rendering needs |
| `Ask` | is the engine well? | `Answer` or `Fault` | exactly one for each `Submit` that is not cancelled |
| | | `Progress` | some sequences are finished |
| | | `Health` | to `Ask` |
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Generator
from typing import Any, Generic, TypeVar, get_args, get_origin

import msgspec
import numpy as np
from msgspec.msgpack import Ext

from cenote import errors
from cenote.core import ModelInfo, Output, Sequence
from cenote.engine.promise import Times
from cenote.errors import CenoteError, EngineFailed

log = logging.getLogger(__name__)

LENGTH = struct.Struct("<Q")
LARGEST_REQUEST = 1 << 30
"""Maximum bytes of a frame that a host accepts."""
LARGEST_ANSWER = 1 << 40
"""Maximum bytes of a frame that a front accepts."""
FLUSH = 10.0
"""Seconds that closing waits for the other side to receive the frames that were sent."""
RAW = 1
"""MessagePack's code for the bytes of an array."""


NUMBERS = frozenset({"<f4", "<f2", "<i8", "<i4", "|u1", "|b1"})
TYPES: dict[Any, frozenset[str]] = {Any: NUMBERS, np.float32: frozenset({"<f4"}), np.int64: frozenset({"<i8"})}
"""Types of arrays that an annotation allows; `Any` are those of pictures."""


class Hello(msgspec.Struct, tag="hello"):
    """The host's version, which must be the front's."""

    version: str


class Card(msgspec.Struct, tag="card"):
    """The model of the host.

    Attributes:
        about: plain data of the layer above, by name.
    """

    info: ModelInfo
    about: dict[str, Any] | None


class Submit(msgspec.Struct, tag="submit"):
    """A request. Numbers are the front's own and are not used twice on a connection.

    Attributes:
        follows: send `Progress`.
    """

    number: int
    sequences: list[Sequence]
    follows: bool = False


class Cancel(msgspec.Struct, tag="cancel"):
    """The cancellation of request `number`."""

    number: int


class Ask(msgspec.Struct, tag="ask"):
    """A question about the engine's health."""

    number: int


class Answer(msgspec.Struct, tag="answer"):
    """The outputs of request `number`, and the times of the work for them."""

    number: int
    outputs: list[Output]
    times: Times = msgspec.field(default_factory=Times)


class Fault(msgspec.Struct, tag="fault"):
    """The error of request `number`.

    Attributes:
        kind: name of a class in `cenote.errors`.
        fields: its attributes besides the message.
    """

    number: int
    kind: str
    message: str
    fields: dict[str, Any]


class Progress(msgspec.Struct, tag="progress"):
    """`count` more sequences of request `number` are finished, with the times of the work so far."""

    number: int
    count: int
    times: Times = msgspec.field(default_factory=Times)


class Health(msgspec.Struct, tag="health"):
    """The answer to `Ask`: whether the engine is healthy."""

    number: int
    is_well: bool


FromFront = Submit | Cancel | Ask
FromHost = Hello | Card | Answer | Fault | Progress | Health

KINDS: dict[str, type[CenoteError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, CenoteError)
}
"""Errors that keep their class between processes."""


class WireError(Exception):
    """The other side does not keep to the protocol."""


def fault(number: int, error: BaseException) -> Fault:
    """Return `error` as the answer to request `number`; an error that is not Cenote's becomes an `EngineFailed`."""
    if not isinstance(error, CenoteError):
        error = EngineFailed(f"the engine failed: {type(error).__name__}: {error}")
    fields = {name: value for name, value in vars(error).items() if name != "message"}
    return Fault(number, type(error).__name__, error.message, fields)


def error_of(fault: Fault) -> CenoteError:
    """Return the error that the host raised."""
    error = KINDS.get(fault.kind, EngineFailed)(fault.message)
    vars(error).update(fault.fields)
    return error


def _encoded(value: Any) -> Any:
    """Convert arrays, numbers of NumPy and ranges to types that msgspec encodes."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, Ext(RAW, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, range):
        return list(value)
    raise NotImplementedError(f"{type(value).__name__} does not cross between processes")


def _decoded(kind: Any, value: Any) -> Any:
    """Return an array of the dtype that the annotation `kind` names, in its own memory; of any of numbers for `Any`."""
    if get_origin(kind) is not np.ndarray:
        raise NotImplementedError(f"{kind} does not cross between processes")
    name, shape, raw = value
    (dtype,) = get_args(get_args(kind)[1])
    if name not in TYPES[dtype]:
        raise ValueError(f"expected an array of {' or '.join(sorted(TYPES[dtype]))}, got {name!r}")
    return np.frombuffer(raw, name).reshape(shape).copy()


def _raw(code: int, data: memoryview) -> memoryview:
    if code != RAW:
        raise ValueError(f"unknown extension {code}")
    return data


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encoded)
FRONT_DECODER = msgspec.msgpack.Decoder(FromFront, dec_hook=_decoded, ext_hook=_raw)
"""Decodes frames of a front."""
HOST_DECODER: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(FromHost, dec_hook=_decoded, ext_hook=_raw)
"""Decodes frames of a host."""

F = TypeVar("F")


class Channel(Generic[F]):
    """One end of a connection. Sending never waits for the other side; one thread reads.

    Args:
        connection: a connected stream socket, owned by the channel from now on.
        decoder: decodes frames of the other side.
        largest: maximum bytes of a frame of the other side.
    """

    def __init__(self, connection: socket.socket, decoder: msgspec.msgpack.Decoder[F], largest: int) -> None:
        self._socket = connection
        self._decoder = decoder
        self._largest = largest
        self._waiting: deque[memoryview] = deque()
        self._ready = threading.Condition()
        self._is_over = False
        self._writer = threading.Thread(target=self._write, name="cenote-send", daemon=True)
        self._writer.start()

    def send(self, frame: Any) -> None:
        """Send `frame`, or nothing if the connection is over.

        The calling thread sends the bytes that the socket takes at once, the channel's thread the rest.

        Raises:
            NotImplementedError: the frame has a value of a type that cannot be sent.
        """
        buffer = bytearray(LENGTH.size)
        _ENCODER.encode_into(frame, buffer, LENGTH.size)
        LENGTH.pack_into(buffer, 0, len(buffer) - LENGTH.size)
        data = memoryview(buffer)
        with self._ready:
            if self._is_over:
                return
            if not self._waiting:
                data = data[self._sent_at_once(data) :]
            if data:
                self._waiting.append(data)
                self._ready.notify_all()

    def frames(self) -> Generator[F]:
        """Yield the frames of the other side until it is gone; then close the socket.

        Raises:
            WireError: a frame is too large or malformed.
        """
        try:
            body = self._body()
            while body is not None:
                yield self._read(body)
                body = self._body()
        finally:
            self._end()
            self._writer.join()
            self._socket.close()

    def close(self, patience: float = 0.0) -> None:
        """End the connection, after at most `patience` seconds for the other side to receive the frames that were sent.

        `frames` ends.
        """
        with self._ready:
            self._ready.wait_for(lambda: self._is_over or not self._waiting, patience)
        self._end()

    def _sent_at_once(self, data: memoryview) -> int:
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            log.debug("the other side of a connection is gone: %s", error)
            self._end()
            return len(data)

    def _write(self) -> None:
        """Send the bytes that the socket did not take at once."""
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._is_over or self._waiting)
                if self._is_over:
                    return
                data = self._waiting[0]
            try:
                self._socket.sendall(data)
            except OSError as error:
                log.debug("the other side of a connection is gone: %s", error)
                self._end()
                return
            with self._ready:
                if self._is_over:
                    return
                self._waiting.popleft()
                self._ready.notify_all()

    def _body(self) -> bytearray | None:
        """Return the next frame's bytes; `None` if there are no more."""
        head = self._received(LENGTH.size)
        if head is None:
            return None
        (length,) = LENGTH.unpack(head)
        if length > self._largest:
            raise WireError(f"a frame has {length} bytes, at most {self._largest} are accepted")
        return self._received(length)

    def _read(self, body: bytearray) -> F:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            raise WireError(f"a frame cannot be read: {error}") from error

    def _received(self, size: int) -> bytearray | None:
        """Return the next `size` bytes; `None` if the connection ends before."""
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                log.debug("the other side of a connection is gone: %s", error)
                return None
            if not count:
                return None
            view = view[count:]
        return buffer

    def _end(self) -> None:
        with self._ready:
            was_over, self._is_over = self._is_over, True
            self._waiting.clear()
            self._ready.notify_all()
        if was_over:
            return
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes both threads
        except OSError as error:
            log.debug("a connection was over already: %s", error)
