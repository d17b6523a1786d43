"""Connections and their limits: how many there are, how large a head is, and how long one waits for its client.

uvicorn's protocol reads requests; this one counts and looks at the clock. The clock is looked at once a second for all
connections, so that heads, bodies and answers that nobody reads cost no timers. Idle connections are uvicorn's, which
has a timer after each answer.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import uvicorn
from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cenote import metrics
from cenote.errors import CenoteError, HeadTooLarge, TooManyConnections, TooSlow
from cenote.server import errors
from cenote.server.gate import LINGER

if TYPE_CHECKING:
    import asyncio

    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from cenote.config import ServerConfig
    from cenote.server.app import Application

log = logging.getLogger(__name__)
SILENT = logging.getLogger("uvicorn.error.connection")
"""uvicorn's log of connections, of errors alone: a client could fill it by requests that are none."""
SILENT.setLevel(logging.ERROR)

SPARE = 256
"""Connections beyond the limit that are answered 503, where the system allows so many; see `Limits`."""
RESERVED = 256
"""Descriptors of the process that are not for connections: files of models, sockets of engines."""
TICKS = 10
"""Ticks of uvicorn's clock, tenths of a second, between two looks at the connections."""
SLOWEST = 16_384
"""Bytes of a body that have to arrive in a second, once its first seconds are over."""
QUIET = 60.0
"""Seconds between two lines of the log about connections that are closed at once."""


@dataclass(frozen=True)
class Limits:
    """Limits of connections.

    Attributes:
        connections: maximum number that is served.
        spare: further ones that are answered 503; even more are closed at once.
        header_bytes: maximum bytes of a request line and its headers, and of what follows the last part of a body.
        header_count: maximum headers.
        header_seconds: seconds in which a request line and its headers have to arrive.
        body_seconds: seconds in which a body has to arrive, and one more for each `SLOWEST` bytes of it.
        idle_seconds: seconds that a connection may wait for its next request, or for its client to read.
    """

    connections: int
    spare: int
    header_bytes: int
    header_count: int
    header_seconds: float
    body_seconds: float
    idle_seconds: float

    @classmethod
    def of(cls, config: ServerConfig, descriptors: int) -> Limits:
        """Return the limits of a server that may have so many open files."""
        room = max(2, descriptors - min(RESERVED, descriptors // 2))
        spare = min(SPARE, room // 2)
        return cls(
            connections=min(config.max_connections, room - spare),
            spare=spare,
            header_bytes=config.max_header_bytes,
            header_count=config.max_header_count,
            header_seconds=config.header_timeout,
            body_seconds=config.body_timeout,
            idle_seconds=config.idle_timeout,
        )


def descriptors() -> int:
    """Raise the limit of open files as far as this process may, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Connection(HttpToolsProtocol):
    """A connection of a client. Make a subclass by `limited`.

    A request with too many headers, and one of a connection too many, reaches the application with the error as
    `refusal` in the state of its scope, so that it is answered in its dialect. One whose head is too large or too slow
    is answered here in the common form, since its path need not be there.
    """

    limits: ClassVar[Limits]
    _said: ClassVar[float] = 0.0
    _closed: ClassVar[int] = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.logger = SILENT
        self._awaits_head = True
        self._is_idle = False
        self._is_refused = False
        self._head_bytes = 0
        self._body_bytes = 0
        self._frame_bytes = 0
        self._running: RequestResponseCycle | None = None
        self._since = self.loop.time()
        self._unread = 0
        self._unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or only to refuse its requests, or not at all."""
        count = len(self.connections)
        if count >= self.limits.connections + self.limits.spare:
            self.transport = transport
            transport.abort()
            self._tell(self.limits.spare)
            return
        if count >= self.limits.connections:
            refusal = TooManyConnections(
                f"there are {count} connections, and at most {self.limits.connections} are served "
                "(--max-connections); try again later"
            )
            self.app_state = {**self.app_state, "refusal": refusal}
        super().connection_made(transport)

    @classmethod
    def _tell(cls, spare: int) -> None:
        """Log, now and then, how many connections were closed at once."""
        metrics.refusals_of("connections").inc()
        Connection._closed += 1
        now = time.monotonic()
        if now - Connection._said > QUIET:
            log.warning(
                "connections closed at once: %d, since there are %d more than --max-connections allows",
                Connection._closed,
                spare,
            )
            Connection._said, Connection._closed = now, 0

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests of the connection that their client has left; uvicorn tells the last one."""
        cycles = [cycle for cycle, _ in self.pipeline]
        if self._running is not None:
            cycles.append(self._running)
        for cycle in cycles:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        """Read the bytes of a client, of a head only up to its limit."""
        if self._is_idle:
            self._await_head()
        while data and not self._is_refused and not self.transport.is_closing():
            part = data
            if self._awaits_head:
                part = data[: self.limits.header_bytes - self._head_bytes]
                self._head_bytes += len(part)
            self._frame_bytes += len(part)
            self._read(part)
            data = data[len(part) :]
            self._check_head()
            self._check_frame()

    def _read(self, data: bytes) -> None:
        """Parse bytes as HTTP/1.1, whatever protocol a client offers besides (RFC 9110, 7.8)."""
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest and not self._is_refused:
                rest = rest[self._parse(rest) :]
        except HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _parse(self, data: memoryview) -> int:
        """Parse bytes, and return their number. The parser stops behind a head that offers another protocol."""
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as stop:
            if self._has_offer:
                self._decline()
            return int(stop.args[0])
        return len(data)

    @property
    def _has_offer(self) -> bool:
        """Whether the head that was parsed offers another protocol: the parser takes what follows for that one."""
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _decline(self) -> None:
        """Parse the head once more without its offer, so that the parser reads the body."""
        refusal = self.scope["state"].get("refusal")
        if isinstance(refusal, HeadTooLarge):
            self._refuse(refusal)  # not all of its headers are there
            return
        version = self.parser.get_http_version().encode()
        head = [b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)]
        head += [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser.feed_data(b"".join([*head, b"\r\n"]))

    def _check_frame(self) -> None:
        """Refuse a request whose body goes on in bytes that are none of it, as headers behind it (trailers) are."""
        limit = self.limits.header_bytes
        if self._awaits_head or self._frame_bytes <= limit:
            return
        self._is_refused = True
        refusal = HeadTooLarge(f"the headers behind the body have more than {limit} bytes (--max-header-bytes)")
        self.cycle.scope["state"].setdefault("refusal", refusal)
        self.cycle.keep_alive = False
        self.cycle.message_event.set()

    def _check_head(self) -> None:
        """Refuse a request whose head has reached the limit."""
        limit = self.limits.header_bytes
        if self._awaits_head and self._head_bytes >= limit:
            self._refuse(
                HeadTooLarge(f"the request line and the headers have more than {limit} bytes (--max-header-bytes)")
            )

    def _await_head(self) -> None:
        self._awaits_head = True
        self._is_idle = False
        self._head_bytes = 0
        self._since = self.loop.time()

    def on_message_begin(self) -> None:
        """Begin a request."""
        if not self._awaits_head:  # one that its client did not wait with for the last answer
            self._await_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header, or that there are too many. Those behind a chunked body come here, too."""
        if len(self.headers) < self.limits.header_count:
            super().on_header(name, value)
            return
        limit = self.limits.header_count
        refusal = HeadTooLarge(f"the request has more than {limit} headers (--max-header-count)")
        self.scope["state"].setdefault("refusal", refusal)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        if self._has_offer:
            return
        self._awaits_head = False
        self._body_bytes = 0
        self._frame_bytes = 0
        self._since = self.loop.time()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._body_bytes += len(body)
        self._frame_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        if not self._has_offer:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request; a client that still sends the body of an answered one is not waited for."""
        super().on_response_complete()
        if not self.cycle.response_complete:  # the next request has come already
            return
        if self.cycle.more_body:
            self.transport.close()
        self._is_idle = not self._awaits_head
        self._since = self.loop.time()

    def look(self, now: float) -> None:
        """End the connection if its client takes too long.

        Args:
            now: seconds of the loop's clock.
        """
        if self._is_unread(now):
            self.transport.abort()
            return
        if self._is_answering:
            self._look_at_body(now - self._since)
        elif self._awaits_head and not self._is_refused:
            self._look_at_head(now - self._since)

    @property
    def _is_answering(self) -> bool:
        """Whether a request is with the application."""
        return self.cycle is not None and not self.cycle.response_complete

    def _look_at_head(self, seconds: float) -> None:
        limit = self.limits.header_seconds
        if seconds < limit:
            return
        if self._head_bytes:
            self._refuse(TooSlow(f"the request line and the headers took more than {limit:g} s (--header-timeout)"))
        else:
            self.transport.close()

    def _look_at_body(self, seconds: float) -> None:
        """Let the application refuse a request whose body comes too slowly, which wakes it."""
        cycle, limit = self.cycle, self.limits.body_seconds
        if (
            self._awaits_head
            or not cycle.more_body
            or self.flow.read_paused
            or seconds < limit + self._body_bytes / SLOWEST
        ):
            return
        refusal = TooSlow(
            f"of the body, {self._body_bytes} bytes came in {seconds:.0f} s; {limit:g} s are allowed, and one more for "
            f"every {SLOWEST} bytes (--body-timeout)"
        )
        cycle.scope["state"].setdefault("refusal", refusal)
        cycle.message_event.set()

    def _is_unread(self, now: float) -> bool:
        """Return whether a client has read nothing of an answer for too long."""
        size = self.transport.get_write_buffer_size()
        if not size or size != self._unread:
            self._unread, self._unread_since = size, now
            return False
        return now - self._unread_since > self.limits.idle_seconds

    def _refuse(self, error: CenoteError) -> None:
        """Answer a request that has no head yet, and end the connection."""
        self._is_refused = True
        if self._is_answering:
            self.transport.abort()
            return
        self._unset_keepalive_if_required()
        response = errors.respond(error)
        head = [b"%s: %s\r\n" % header for header in (*response.raw_headers, (b"connection", b"close"))]
        self.transport.write(b"".join([STATUS_LINE[error.status], *head, b"\r\n", bytes(response.body)]))
        if self.transport.can_write_eof():  # not by TLS
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.abort)


def limited(limits: Limits) -> type[Connection]:
    """Return the protocol of connections with these limits."""
    return type("Connection", (Connection,), {"limits": limits})


def configured(app: Application, limits: Limits, **options: Any) -> uvicorn.Config:
    """Return uvicorn's settings for an application and the limits of its connections."""
    idle = round(limits.idle_seconds)
    return uvicorn.Config(app, http=limited(limits), ws="none", log_config=None, timeout_keep_alive=idle, **options)


class Server(uvicorn.Server):
    """uvicorn's server, which looks after its connections."""

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; once a second, end connections whose clients take too long."""
        if counter % TICKS == 0:
            for connection in [*self.server_state.connections]:
                if isinstance(connection, Connection):
                    connection.look(connection.loop.time())
        return await super().on_tick(counter)
