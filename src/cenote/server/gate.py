"""The gate that every request passes before its route: request id, API key, content type, admission, body limit,
metrics.

Plain ASGI, so that a handler can still see the client leave. The body is read here, bounded, and is `body` in the
state of the scope.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from cenote import metrics
from cenote.errors import BadRequest, BodyTooLarge, CenoteError, Closed, Unauthorized
from cenote.server import errors
from cenote.server.admission import Held
from cenote.server.errors import BadBody
from cenote.server.leaving import Left
from cenote.server.reading import parse
from cenote.server.serving import new_id
from cenote.server.wire.sizes import echo

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cenote.config import ServerConfig
    from cenote.server.admission import Admission
    from cenote.server.errors import Fault
    from cenote.server.table import Match

    ErrorBody = Callable[[Fault], dict[str, Any]]
    """Makes the body of an error in the shape of a dialect."""

UNCOUNTED = frozenset({"/metrics", "/load", "/version"})
"""Paths of routes whose requests are not in the metrics, as those of health that need no key."""
KEY_HEADERS = ("authorization", "api-key", "x-api-key")
"""Headers that may bring the key; the last two are those of Azure's clients and of gateways."""
JSON_TYPES = frozenset({"application/json", ""})
"""Types of bodies that are read; some clients name none."""
MOST_DIGITS = 20
"""Digits of a declared length that are read."""
PEEKED = 16_384
"""Bytes of a body that is read although its request is refused: its keys tell the dialect of the error."""
PATIENCE = 0.1
"""Seconds in which such a body has to arrive."""
LINGER = 2.0
"""Seconds in which a client whose body is not read may go on sending, so that it reads its answer and not a reset."""


class UnderWay:
    """The requests that are being answered, each the asyncio task of its connection."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_over = False

    @property
    def count(self) -> int:
        """Number of them."""
        return len(self._tasks)

    async def run(self, answer: Coroutine[Any, Any, None]) -> bool:
        """Await `answer`, and return whether it ended by itself: `end` may cut it short, or come before it."""
        task = asyncio.current_task()
        assert task is not None
        if self.is_over:
            answer.close()
            return False
        self._tasks.add(task)
        try:
            await answer
        except asyncio.CancelledError:
            if not self.is_over or task not in self._tasks:
                raise
            task.uncancel()
            return False
        finally:
            self._tasks.discard(task)
        return True

    def end(self) -> int:
        """Cut all of them short, and return their number."""
        self.is_over = True
        for task in self._tasks:
            task.cancel()
        return len(self._tasks)


class _Reply:
    """The way of an answer to its client.

    Attributes:
        is_started: whether the client has got the status.
        status: of the answer; 500 until it is started.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = (b"x-request-id", request_id.encode())
        self.is_started = False
        self.status = 500

    async def __call__(self, message: Message) -> None:
        """Send a message of the answer, the first one with the id of the request."""
        if message["type"] == "http.response.start":
            self.is_started = True
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], self._request_id]}
        await self._send(message)


class _Incoming:
    """The way of a body from its client.

    Attributes:
        content: of the body; of a large one its beginning.
        is_whole: whether all of the body has been received.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.content = b""
        self.is_whole = False

    async def __call__(self) -> Message:
        """Return the next message of the request."""
        message = await self._receive()
        self.is_whole = not message.get("more_body", False)
        if len(self.content) <= PEEKED:
            self.content += message.get("body", b"")
        return message

    def value(self) -> Any:
        """Return the JSON value of the body; `None` of one that is large, is not all here, or is not JSON."""
        if not self.is_whole or len(self.content) > PEEKED:
            return None
        with suppress(BadBody, HTTPException):
            return parse(self.content)
        return None


class Gate:
    """ASGI middleware. Answers requests that it refuses by itself, in the error shape of their dialect.

    Args:
        app: answers requests.
        others: answers connections of other protocols, and of the server itself.
        config: of the server.
        under_way: requests whose body is read or whose answer is not sent.
        admission: decides which requests may wait.
        find: returns the routes of a request; `None` if it has none.
        error_body: of a request's dialect, which the JSON value of its body may tell.
    """

    def __init__(
        self,
        app: ASGIApp,
        others: ASGIApp,
        config: ServerConfig,
        under_way: UnderWay,
        admission: Admission,
        find: Callable[[Scope], Match | None],
        error_body: Callable[[Scope, Any], ErrorBody],
    ) -> None:
        self.app = app
        self.others = others
        self.config = config
        self.under_way = under_way
        self.admission = admission
        self._find = find
        self._error_body = error_body
        self._keys = [key.encode() for key in config.api_key]

    def counts(self, scope: Scope) -> bool:
        """Return whether a request is in the metrics: those about health and load are not."""
        match = self._find(scope)
        return match is None or not (match.path in UNCOUNTED or match.default.route.is_open)

    def _is_open(self, scope: Scope) -> bool:
        """Return whether a request needs no key."""
        match = self._find(scope)
        return match is not None and match.default.route.is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.others(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id")
        number = new_id()
        scope.setdefault("state", {}).update(request_id=request_id, new_id=number, body_bytes=0)
        match = self._find(scope)
        route = scope["route_path"] = match.path if match else "other"
        reply = _Reply(send, _ascii(echo(request_id)) if request_id else number)
        if not self.counts(scope):
            await self._run(scope, headers, receive, reply)
            return
        began = time.monotonic()
        metrics.running_requests.inc()
        try:
            await self._run(scope, headers, receive, reply)
        finally:
            metrics.running_requests.dec()
            metrics.requests_of(route, reply.status).inc()
            metrics.seconds_of(route).observe(time.monotonic() - began)

    async def _run(self, scope: Scope, headers: Headers, receive: Receive, reply: _Reply) -> None:
        """Answer a request, also where shutting down cuts its answer short before it has begun."""
        incoming = _Incoming(receive)
        is_answered = await self.under_way.run(self._answer(scope, headers, incoming, reply))
        if not is_answered and not reply.is_started:
            await self._refuse(Closed("the server is shutting down"), scope, incoming, reply)

    async def _answer(self, scope: Scope, headers: Headers, incoming: _Incoming, send: Send) -> None:
        held = Held(self.admission)
        try:
            declared = _length(headers)
            self._check(scope, headers, declared)
            if scope["method"] == "POST":
                scope["state"]["body"] = await self._body(scope, declared, incoming, held)
        except (CenoteError, Left) as error:
            held.release()
            await self._refuse(error, scope, incoming, send)
            return
        has_body = bool(declared) or "transfer-encoding" in headers
        try:
            if has_body and not incoming.is_whole:
                await _draining(self.app, scope, incoming, send)
            else:
                await self.app(scope, incoming, send)
        finally:
            held.release()

    async def _refuse(self, error: CenoteError | Left, scope: Scope, incoming: _Incoming, send: Send) -> None:
        """Answer with `error` in the dialect of the request."""
        await self._peek(scope, incoming)
        await _draining(errors.respond(error, self._error_body(scope, incoming.value())), scope, incoming, send)

    async def _peek(self, scope: Scope, incoming: _Incoming) -> None:
        """Receive the body of a refused request if it is small, and its keys may tell the dialect."""
        headers = Headers(scope=scope)
        is_small = 0 < _length(headers) <= PEEKED and "expect" not in headers
        match = self._find(scope)
        if not is_small or match is None or not match.is_shared:
            return
        patience = 0.0 if "refusal" in scope["state"] else PATIENCE  # there may be very many
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not incoming.is_whole:
                    await incoming()

    def _check(self, scope: Scope, headers: Headers, declared: int) -> None:
        """Raise `CenoteError` for a request that its connection refuses, without a key, or at a bad time."""
        if self._is_open(scope):
            return
        refusal = scope["state"].get("refusal")
        if refusal is not None:
            raise refusal
        if self._keys and scope["method"] != "OPTIONS":
            self._check_key(next(filter(None, map(headers.get, KEY_HEADERS)), ""))
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in JSON_TYPES and self._find(scope) is not None:
                raise _UnsupportedMediaType("Unsupported Media Type: Only 'application/json' is allowed")
            self.admission.check(declared)

    def _check_key(self, authorization: str) -> None:
        scheme, _, token = authorization.partition(" ")
        key = (token if scheme.lower() == "bearer" else authorization).strip().encode()
        if not any(hmac.compare_digest(key, valid) for valid in self._keys):
            raise Unauthorized("missing or wrong API key")

    async def _body(self, scope: Scope, declared: int, receive: Receive, held: Held) -> bytes:
        """Return the whole body, at most the limit, and note its size; nothing where no route takes one.

        Args:
            scope: of the request.
            declared: bytes, by its head.
            receive: gives the parts of the body.
            held: counts them.

        Raises:
            CenoteError: the body is too large, or comes too slowly.
            Left: the client left before its end.
        """
        match = self._find(scope)
        if match is not None and not match.takes_body:
            return b""
        limit = self.config.max_body_bytes
        if declared > limit:
            raise BodyTooLarge(f"the request body has {declared} bytes; at most {limit} are allowed")
        chunks: list[bytes] = []
        is_open = True
        while is_open:
            message = await receive()
            if "refusal" in scope["state"]:  # it is sent too slowly
                raise scope["state"]["refusal"]
            if message["type"] == "http.disconnect":
                raise Left
            chunks.append(message.get("body", b""))
            held.add(len(chunks[-1]))
            is_open = message.get("more_body", False)
            if held.size > limit:
                raise BodyTooLarge(f"the request body has more than the {limit} bytes that are allowed")
        scope["state"]["body_bytes"] = held.size
        return b"".join(chunks)


async def _draining(answer: ASGIApp, scope: Scope, incoming: _Incoming, send: Send) -> None:
    """Await an answer, and let a client that is still sending its body finish: else it sees a reset."""

    async def begin(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "more_body": True}
        await send(message)

    await answer(scope, incoming, begin)
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while not incoming.is_whole:
                await incoming()
    await send({"type": "http.response.body", "body": b""})


def _ascii(text: str) -> str:
    """Return a text for a header: other characters, which not all clients can read there, become question marks."""
    return text.encode("ascii", errors="replace").decode()


def _length(headers: Headers) -> int:
    """Return the declared length of a body in bytes; 0 if none is declared, or it is no number."""
    declared = headers.get("content-length", "")
    if not (declared.isascii() and declared.isdigit()):
        return 0
    return int(declared[:MOST_DIGITS])


class _UnsupportedMediaType(BadRequest):
    """vLLM answers 400 and calls it a bad request."""

    type = "Bad Request"
