"""The short way to routes that take a JSON body: by their path, past the framework's router and dependencies.

FastAPI describes the API and serves whatever else there is. For a route whose handler takes a `body` and perhaps the
`request`, it does for each request what is known beforehand: try the routes one by one, open stacks for dependencies
that there are not, take the body apart by a signature. That is a quarter of what a small request costs the application.
"""

from __future__ import annotations

import inspect
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, get_type_hints

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cenote.errors import CenoteError
from cenote.server import faults

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from fastapi import APIRouter
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

MISSING = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}


class Handler:
    """A route's own function, and what it takes."""

    def __init__(self, route: APIRoute, body: type, *, takes_request: bool) -> None:
        self.route = route
        self._endpoint: Callable[..., Awaitable[Response]] = route.endpoint
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

    async def __call__(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            CenoteError: what the route raises.
            HTTPException: what the route raises; or the body cannot be read at all.
            RequestValidationError: the body is no JSON, or not what the route takes.
        """
        body = self._read(await request.body())
        return await (self._endpoint(body, request) if self._takes_request else self._endpoint(body))

    def _read(self, content: bytes) -> Any:
        if not content:
            raise RequestValidationError([MISSING])
        with suppress(ValidationError):  # at once; what is wrong is looked for below, and told as FastAPI does
            return self._body.validate_json(content)
        try:
            return self._body.validate_python(json.loads(content), from_attributes=True)
        except json.JSONDecodeError as error:
            entry = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
            raise RequestValidationError([{**entry, "ctx": {"error": error.msg}}]) from error
        except ValidationError as error:
            entries = error.errors(include_url=False)
            raise RequestValidationError([{**entry, "loc": ("body", *entry["loc"])} for entry in entries]) from error
        except (RecursionError, UnicodeDecodeError) as error:
            raise HTTPException(400, "There was an error parsing the body") from error


class Direct:
    """ASGI middleware. What is no route of `handlers` goes on to `app`."""

    def __init__(self, app: ASGIApp, handlers: dict[str, Handler]) -> None:
        self.app = app
        self.handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        handler = self.handlers.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = handler.route
        request = Request(scope, receive, send)
        try:
            response = await handler(request)
        except (CenoteError, HTTPException, RequestValidationError) as error:
            response = await faults.respond(request, error)
        await response(scope, receive, send)


def handlers(routers: Iterable[APIRouter]) -> dict[str, Handler]:
    """The handlers of all routes that have one, by path."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return {route.path: handler for route in routes if (handler := Handler.of(route)) is not None}
