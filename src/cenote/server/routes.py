"""The nouns of the route table: a dialect is a file with rows of routes and the body of its errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cenote.server.errors import Fault, openai_error

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.server.serving import Serving

    Handler = Callable[[Serving, Request, Any], Awaitable[Response]]
    """Answers a request whose body, if the route takes one, is validated."""


@dataclass(frozen=True)
class Route:
    """A row of the table.

    Attributes:
        path: under which the route is described.
        handler: its docstring describes the route.
        body: model of the JSON body; `None` = the route takes none.
        method: "GET" also answers HEAD.
        aliases: further paths.
        is_described: whether the API's description has it.
    """

    path: str
    handler: Handler
    body: type[BaseModel] | None = None
    method: Literal["GET", "POST"] = "POST"
    aliases: tuple[str, ...] = ()
    is_described: bool = True

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths of the route."""
        return (self.path, *self.aliases)


@dataclass(frozen=True)
class Dialect:
    """Routes of one family of clients, and the body that its errors have.

    Attributes:
        name: in the API's description.
        routes: rows of the table.
        error: makes the JSON body of an error.
    """

    name: str
    routes: tuple[Route, ...] = field(default=())
    error: Callable[[Fault], dict[str, Any]] = openai_error
