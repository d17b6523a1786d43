"""The web application: one table of routes, one way from a request to its response."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Router

from cenote.server import errors
from cenote.server.admission import Admission
from cenote.server.describe import described
from cenote.server.dialects import cenote, cohere, fastdeploy, openai, operations, scoring, vllm
from cenote.server.gate import Gate, UnderWay
from cenote.server.reading import read
from cenote.server.serving import Serving
from cenote.server.wire.fields import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from cenote.config import ServerConfig
    from cenote.pipeline.pipeline import Service
    from cenote.server.gate import ErrorBody
    from cenote.server.routes import Dialect, Route

log = logging.getLogger(__name__)

DIALECTS: tuple[Dialect, ...] = (
    openai.DIALECT,
    cohere.DIALECT,
    vllm.DIALECT,
    scoring.DIALECT,
    cenote.DIALECT,
    fastdeploy.DIALECT,
    operations.DIALECT,
)
LARGE = 65_536
"""Bodies with more bytes than this are parsed off the event loop."""
MOST_MESSAGES = 4096
"""Messages of a conversation."""


class Application:
    """An ASGI application that serves models. Shutting it down finishes the work that they accepted.

    Args:
        services: the models.
        config: of the server.
        dialects: whose routes it has.
        serving: the models, if another application serves them too and owns them.

    Attributes:
        routes: the rows of the table by method and path.
        under_way: requests that are being answered.
    """

    def __init__(
        self,
        services: list[Service],
        config: ServerConfig,
        dialects: Sequence[Dialect] = DIALECTS,
        serving: Serving | None = None,
    ) -> None:
        self._serving = serving or Serving(services, config)
        self._config = config
        self._limits = Limits(config.max_client_batch_size, MOST_MESSAGES, config.max_tokenize_bytes)
        dialects = [*dialects] if config.disable_fastapi_docs else [*dialects, described(dialects, config)]
        self.routes: dict[tuple[str, str], Route] = {}
        self._dialects: dict[tuple[str, str], Dialect] = {}
        for dialect in dialects:
            for route in dialect.routes:
                self._add(dialect, route)
        self.under_way = UnderWay()
        router = Router(default=self._respond, redirect_slashes=False, lifespan=self._lifespan)
        admission = self._serving.admission if serving is None else Admission([], config)
        self._app = Gate(router, config, self.under_way, admission, self._error_body)

    def operations(self) -> Application:
        """Return an application that only tells how this one does, for a listener on another thread."""
        config = self._config.model_copy(update={"disable_fastapi_docs": True})
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

    def _add(self, dialect: Dialect, route: Route) -> None:
        for key in route.keys:
            if key in self.routes:
                raise ValueError(f"two dialects have the route {' '.join(key)}; the second is {dialect.name}")
            self.routes[key] = route
            self._dialects[key] = dialect

    @asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._serving.close)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the route of a request and answer it, errors in the body of its dialect."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        key = scope["method"], self._path(scope)
        scope["route_path"] = key[1] if key in self._dialects else "other"
        error_body = self._error_body(scope)
        request = Request(scope, receive, send)
        try:
            response = await self._answer(key, request)
        except errors.Failures as error:
            response = errors.respond(error, error_body)
        except Exception as error:
            log.exception("%s %s failed", *key)
            response = errors.respond(error)
        await response(scope, receive, send)

    def _error_body(self, scope: Scope) -> ErrorBody:
        """Return the function that makes the body of an error in the dialect of a request."""
        dialect = self._dialects.get((scope["method"], self._path(scope)))
        return dialect.error if dialect else errors.openai_error

    def _path(self, scope: Scope) -> str:
        """The path without the prefix of a proxy and without a closing slash."""
        path: str = scope["path"]
        prefix = self._config.root_path
        if path.startswith(f"{prefix}/"):
            path = path.removeprefix(prefix)
        return path.rstrip("/") or "/"

    async def _answer(self, key: tuple[str, str], request: Request) -> Response:
        route = self.routes.get(key)
        if route is None:
            allowed = sorted(method for method, path in self.routes if path == key[1])
            if not allowed:
                raise HTTPException(404, "Not Found")
            raise HTTPException(405, "Method Not Allowed", {"Allow": ", ".join(allowed)})
        return await route.handler(self._serving, request, await self._body(route, request))

    async def _body(self, route: Route, request: Request) -> Any:
        """The body that `route` takes; `None` if it takes none."""
        kind = route.body
        if kind is None:
            return None
        content = await request.body()
        if len(content) <= LARGE:
            return read(content, kind, self._limits)
        return await self._serving.in_pool("parse", lambda: read(content, kind, self._limits))


def build(services: list[Service], config: ServerConfig, dialects: Sequence[Dialect] = DIALECTS) -> Application:
    """Return the application that serves `services`; see `Application`."""
    return Application(services, config, dialects)
