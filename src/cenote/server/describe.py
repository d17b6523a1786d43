"""The description of the API: OpenAPI made from the route table, and pages that show it."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse

import cenote
from cenote.server import pages
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import BaseModel
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.config import ServerConfig
    from cenote.server.serving import Serving

REFERENCE = "#/components/schemas/{model}"


def openapi(dialects: Sequence[Dialect], config: ServerConfig) -> dict[str, Any]:
    """Return the OpenAPI description of the routes of `dialects`."""
    routes = [(dialect, route) for dialect in dialects for route in dialect.routes if route.is_described]
    schemas = _schemas(tuple(route.body for _, route in routes if route.body is not None))
    paths: dict[str, dict[str, Any]] = {}
    for dialect, route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(dialect, route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cenote",
            "description": "An inference engine for pooling models.",
            "version": cenote.__version__,
        },
        **({"servers": [{"url": config.root_path}]} if config.root_path else {}),
        "paths": paths,
        "components": {"schemas": schemas},
    }


@functools.cache
def _schemas(bodies: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """Return the JSON schemas of the classes of bodies, and of those within them, by name."""
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=REFERENCE)
    definitions: dict[str, Any] = schemas.get("$defs", {})
    return definitions


def _operation(dialect: Dialect, route: Route) -> dict[str, Any]:
    name = getattr(route.handler, "__name__", route.path)
    operation: dict[str, Any] = {
        "tags": [dialect.name],
        "summary": name.replace("_", " ").capitalize(),
        "description": inspect.getdoc(route.handler) or "",
        "operationId": f"{name}_{route.path.strip('/').replace('/', '_')}_{route.method.lower()}",
        "responses": {"200": {"description": "Successful Response"}},
    }
    if route.body is not None:
        schema = {"$ref": REFERENCE.format(model=route.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        operation["responses"]["400"] = {"description": "The request cannot be served"}
    return operation


def described(dialects: Sequence[Dialect], config: ServerConfig) -> Dialect:
    """Return the routes that describe those of `dialects`."""
    description = openapi(dialects, config)

    async def schema(_: Serving, request: Request, body: None) -> Response:
        """The API as OpenAPI."""
        return json_response(description)

    @functools.cache
    def page() -> HTMLResponse:
        return HTMLResponse(pages.page(description, f"{config.root_path}/openapi.json"), headers=pages.HEADERS)

    async def shown(_: Serving, request: Request, body: None) -> Response:
        """The API as a page."""
        return page()

    routes = [Route("/openapi.json", schema, method="GET", is_described=False)]
    routes += [Route(path, shown, method="GET", is_described=False) for path in PAGES]
    return Dialect("Description", tuple(routes))


PAGES = ("/docs", "/redoc")
"""Paths of the page, as web frameworks have them."""
