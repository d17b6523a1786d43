"""The web application: one table of routes, one way from a request to its response."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Router

from cenote.server import errors
from cenote.server.admission import Admission
from cenote.server.describe import described
from cenote.server.dialects import (
    cenote,
    cohere,
    elasticsearch,
    fastdeploy,
    infinity,
    kserve,
    llamacpp,
    mixedbread,
    nim,
    ollama,
    openai,
    operations,
    sagemaker,
    scoring,
    tei,
    vertex,
    vllm,
    voyage,
    weaviate,
)
from cenote.server.gate import Gate, UnderWay
from cenote.server.leaving import Awaited
from cenote.server.reading import parse, validate
from cenote.server.serving import Serving
from cenote.server.table import Table
from cenote.server.tracing import traced
from cenote.server.wire.fields import Lengths

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from cenote.config import ServerConfig
    from cenote.pipeline.pipeline import Service
    from cenote.server.gate import ErrorBody
    from cenote.server.routes import Dialect
    from cenote.server.table import Match

log = logging.getLogger(__name__)

DIALECTS: tuple[Dialect, ...] = (
    openai.DIALECT,
    cohere.DIALECT,
    vllm.DIALECT,
    scoring.DIALECT,
    voyage.DIALECT,
    tei.DIALECT,
    ollama.DIALECT,
    nim.DIALECT,
    infinity.DIALECT,
    weaviate.DIALECT,
    mixedbread.DIALECT,
    llamacpp.DIALECT,
    kserve.DIALECT,
    sagemaker.DIALECT,
    vertex.DIALECT,
    elasticsearch.DIALECT,
    cenote.DIALECT,
    fastdeploy.DIALECT,
    operations.DIALECT,
)
LARGE_BODY = 65_536
"""Bodies with more bytes than this are parsed off the event loop."""
MATCH = "cenote.match"
"""Key of a connection's scope with the routes of its request."""
MOST_MESSAGES = 4096
"""Messages of a conversation."""


class Application:
    """An ASGI application that serves models. Shutting it down finishes the work that they accepted.

    Args:
        services: the models.
        config: of the server.
        dialects: whose routes it has.
        serving: the models, if another application serves them too and owns them.
        clock: see `cenote.server.admission.Admission`.

    Attributes:
        admission: decides which requests may wait.
        table: of the routes.
        under_way: requests that are being answered.
    """

    def __init__(
        self,
        services: list[Service],
        config: ServerConfig,
        dialects: Sequence[Dialect] = DIALECTS,
        serving: Serving | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serving = serving or Serving(services, config, clock)
        self._config = config
        self._lengths = Lengths(config.max_client_batch_size, MOST_MESSAGES, config.max_tokenize_bytes)
        self._serving.paths = self._serving.paths or _paths(dialects)
        dialects = [*dialects] if config.disable_fastapi_docs else [*dialects, described(dialects, config)]
        self.table = Table(dialects, self._serving.models.names)
        self.under_way = UnderWay()
        others = Router(default=_close, redirect_slashes=False, lifespan=self._lifespan)
        self.admission = self._serving.admission if serving is None else Admission([], config)
        gate = Gate(self._respond, others, config, self.under_way, self.admission, self._find, self._error_body)
        self._app = _for_pages(traced(gate, config.otlp_traces_endpoint), config)

    def operations(self) -> Application:
        """Return an application that only tells how this one does, for a listener on another thread.

        It asks for no key, unless the server is told to.
        """
        changes: dict[str, Any] = {"disable_fastapi_docs": True, "otlp_traces_endpoint": None}
        if not self._config.api_key_metrics:
            changes["api_key"] = ()
        config = self._config.model_copy(update=changes)
        return Application([], config, [operations.DIALECT], self._serving)

    def begin_end(self) -> None:
        """Tell that the server is shutting down, so that it is not ready for requests."""
        self._serving.is_ending = True

    @property
    def fault(self) -> str:
        """Reason why a model can run nothing any more, so that the process should end; empty while all can."""
        return self._serving.fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await self._app(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        await asyncio.to_thread(int)  # starts the thread, which a process that is short of memory could not at its end
        yield
        await asyncio.to_thread(self._serving.close)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the route of a request and answer it, errors in the body of its dialect."""
        match = self._find(scope)
        request = Request(scope, receive, send)
        value = None
        try:
            if match is None:
                raise self._unknown(scope)
            if match.takes_body:
                value = await self._parsed(request, partial(parse, scope["state"]["body"]))
            response = await self._answer(match, value, request)
        except errors.Failures as error:
            response = errors.respond(error, self._error_body(scope, value), value)
        except Exception as error:
            log.exception("%s %s failed", scope["method"], scope["route_path"])
            response = errors.respond(error, self._error_body(scope, value))
        await response(scope, receive, send)

    def _find(self, scope: Scope) -> Match | None:
        """Return the routes of a request, which are looked up once; `None` if it has none."""
        if MATCH not in scope:
            scope[MATCH] = self.table.match(scope["method"], self._path(scope))
        match: Match | None = scope[MATCH]
        return match

    def _error_body(self, scope: Scope, value: Any = None) -> ErrorBody:
        """Return the function that makes the body of an error in the dialect of a request with the body `value`."""
        match = self._find(scope)
        dialect = match.dialect(value) if match else self.table.dialect(self._path(scope))
        return dialect.error

    def _path(self, scope: Scope) -> str:
        """Return the path without the prefix of a proxy and without a closing slash."""
        path: str = scope["path"].rstrip("/")
        prefix = self._config.root_path
        if f"{path}/".startswith(f"{prefix}/"):
            path = path.removeprefix(prefix)
        return path or "/"

    def _unknown(self, scope: Scope) -> HTTPException:
        """Return the error of a path that the table does not have, or not for the method."""
        allowed = self.table.methods(self._path(scope))
        if not allowed:
            return HTTPException(404, "Not Found")
        return HTTPException(405, "Method Not Allowed", {"Allow": ", ".join(allowed)})

    async def _parsed(self, request: Request, work: Callable[[], Any]) -> Any:
        """Return the result of work on a body, off the event loop if the body is large."""
        if request.scope["state"]["body_bytes"] <= LARGE_BODY:
            return work()
        with Awaited(request):
            return await self._serving.in_pool("parse", work)

    async def _answer(self, match: Match, value: Any, request: Request) -> Response:
        entry = match.entry(value)
        entry.check(value)
        route = entry.route
        request.scope["state"]["model"] = match.model
        body = None
        if route.body is not None:
            body = await self._parsed(request, partial(validate, value, route.body, self._lengths))
            self._name_model(body, match.model, route.purpose)
        return await route.handler(self._serving, request, body)

    def _name_model(self, body: Any, of_path: str | None, purpose: str) -> None:
        """Let a body name the model of its path, else the one that it names, else one that is made for the route.

        An adapter that it names besides takes the model's place.
        """
        of_body = getattr(body, "model", None)
        named = of_path or of_body
        adapter = getattr(body, "adapter", None)
        if adapter:
            named = self._serving.models.adapted(named, adapter)
        if not named and purpose:
            named = self._serving.models.made_for(purpose)
        if named != of_body and "model" in type(body).model_fields:
            body.model = named


async def _close(scope: Scope, receive: Receive, send: Send) -> None:
    """End a connection of a protocol that is not served."""
    await send({"type": "websocket.close", "code": 1000})


def _paths(dialects: Sequence[Dialect]) -> dict[str, list[str]]:
    """Return the methods and paths of the routes of each dialect."""
    return {
        dialect.name: [f"{route.method} {path}" for route in dialect.routes for path in (route.path, *route.aliases)]
        for dialect in dialects
    }


READABLE = ("X-Request-Id", "Retry-After")
"""Headers of answers that pages of other origins may read."""


def _for_pages(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """Return an application that pages of the allowed origins may use, without a key for the question whether."""
    if not config.allowed_origins:
        return app
    return CORSMiddleware(
        app,
        config.allowed_origins,
        config.allowed_methods,
        config.allowed_headers,
        config.allow_credentials,
        expose_headers=READABLE,
    )


def build(
    services: list[Service],
    config: ServerConfig,
    dialects: Sequence[Dialect] = DIALECTS,
    clock: Callable[[], float] = time.monotonic,
) -> Application:
    """Return the application that serves `services`; see `Application`."""
    return Application(services, config, dialects, clock=clock)
