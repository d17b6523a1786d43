"""The short way to routes that take a JSON body: by their path, past the framework's router and dependencies.

FastAPI describes the API and serves whatever else there is. For a route whose handler takes a `body` and perhaps the
`request`, it does for each request what is known beforehand: try the routes one by one, open stacks for dependencies
that there are not, take the body apart by a signature. That is a quarter of what a small request costs the application.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any, get_type_hints

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cenote.errors import CenoteError
from cenote.server import faults
from cenote.server.dialects.requests import Body, Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from fastapi import APIRouter
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from cenote.server.serving import Serving

LARGE = 65_536
"""Bodies with more bytes than this are parsed off the event loop."""
MOST_MESSAGES = 4096
"""Messages of a conversation."""
MISSING = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}


class Handler:
    """A route's own function, and what it takes."""

    def __init__(self, route: APIRoute, body: type, *, takes_request: bool) -> None:
        self.route = route
        self._endpoint: Callable[..., Awaitable[Response]] = route.endpoint
        self._kind = body
        self._body: TypeAdapter[Any] = TypeAdapter(body)
        self._takes_request = takes_request

    @classmethod
    def of(cls, route: APIRoute) -> Handler | None:
        """For a route that it suffices for."""
        names = list(inspect.signature(route.endpoint).parameters)
        if route.methods != {"POST"} or "{" in route.path or names not in (["body"], ["body", "request"]):
            return None
        if not inspect.iscoroutinefunction(route.endpoint):
            return None
        return cls(route, get_type_hints(route.endpoint)["body"], takes_request=len(names) == 2)

    async def __call__(self, request: Request, serving: Serving) -> Response:
        """Answer a request.

        Raises:
            CenoteError: what the route raises.
            HTTPException: what the route raises; or the body cannot be read at all.
            RequestValidationError: the body is no JSON, or not what the route takes.
        """
        content = await request.body()
        limits = Limits(serving.config.max_client_batch_size, MOST_MESSAGES, serving.config.max_tokenize_bytes)
        if len(content) > LARGE:
            body = await serving.in_pool("parse", lambda: self._read(content, limits))
        else:
            body = self._read(content, limits)
        return await (self._endpoint(body, request) if self._takes_request else self._endpoint(body))

    def _read(self, content: bytes, limits: Limits) -> Any:
        if not content:
            raise RequestValidationError([MISSING])
        value = _parsed(content)
        if issubclass(self._kind, Body):
            self._kind.check_lengths(value, limits)
        try:
            return self._body.validate_python(value, from_attributes=True)
        except ValidationError as error:
            entries = error.errors(include_url=False)
            raise RequestValidationError([{**entry, "loc": ("body", *entry["loc"])} for entry in entries]) from error


def _parsed(content: bytes) -> Any:
    """Parse JSON. Python's own reader has the last word: it takes other Unicode encodings and lone surrogates too.

    Raises:
        HTTPException: the body is nested too deeply, or has bytes of no encoding.
        RequestValidationError: it is no JSON, or has a number of more digits than Python reads.
    """
    try:
        return from_json(content)
    except ValueError:
        pass
    try:
        return json.loads(content)
    except (RecursionError, UnicodeDecodeError) as error:
        raise HTTPException(400, "There was an error parsing the body") from error
    except json.JSONDecodeError as error:
        raise _invalid(error.msg, error.pos) from error
    except ValueError as error:
        raise _invalid(str(error).partition(";")[0], 0) from error


def _invalid(message: str, position: int) -> RequestValidationError:
    entry = {"type": "json_invalid", "loc": ("body", position), "msg": "JSON decode error", "input": {}}
    return RequestValidationError([{**entry, "ctx": {"error": message}}])


class Direct:
    """ASGI middleware. What is no route of `handlers` goes on to `app`."""

    def __init__(self, app: ASGIApp, handlers: dict[str, Handler], serving: Serving) -> None:
        self.app = app
        self.handlers = handlers
        self.serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        handler = self.handlers.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = handler.route
        request = Request(scope, receive, send)
        try:
            response = await handler(request, self.serving)
        except (CenoteError, HTTPException, RequestValidationError) as error:
            response = await faults.respond(request, error)
        await response(scope, receive, send)


def handlers(routers: Iterable[APIRouter]) -> dict[str, Handler]:
    """The handlers of all routes that have one, by path."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return {route.path: handler for route in routes if (handler := Handler.of(route)) is not None}
