"""The nouns of the route table: a dialect is a file with rows of routes and the body of its errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from cenote.server.errors import Fault, openai_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic import BaseModel
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.server.serving import Serving

    Handler = Callable[[Serving, Request, Any], Awaitable[Response]]
    """Answers a request whose body, if the route takes one, is validated."""


METHODS = {"GET": ("GET", "HEAD"), "POST": ("POST",)}
"""Methods that a route of each method answers."""


@dataclass(frozen=True)
class Route:
    """A row of the table.

    Attributes:
        path: under which the route is described.
        handler: its docstring describes the route.
        body: model of the JSON body; `None` = the route takes none.
        method: see `METHODS`.
        aliases: further paths. A part `{model}` of a path stands for the name of a model.
        is_described: whether the API's description has it.
        marks: keys that tell a body for this route from those of other dialects with the same path; it has all.
        is_open: whether it needs no key.
        either: keys of which one tells it just as well.
        nulls: whether a mark may be null, as clients have it that send all of their fields.
        foreign: keys that no body for this route has, whatever its marks say.
        purpose: key of `cenote.server.asked.PURPOSES`: the model of a request that names none is made for it.
    """

    path: str
    handler: Handler
    body: type[BaseModel] | None = None
    method: Literal["GET", "POST"] = "POST"
    aliases: tuple[str, ...] = ()
    is_described: bool = True
    is_open: bool = False
    marks: frozenset[str] = frozenset()
    either: frozenset[str] = frozenset()
    nulls: bool = False
    foreign: frozenset[str] = frozenset()
    purpose: str = ""

    def distance(self, body: Mapping[str, Any]) -> int:
        """Return 0 if the keys of a body tell that it is for this route, 1 if it needs no keys, and else 2."""
        if not (self.marks or self.either):
            return 1
        filled = {name for name, value in body.items() if value is not None}
        keys = body.keys() if self.nulls else filled
        has_marks = self.marks <= keys and not (self.either and self.either.isdisjoint(keys))
        return 0 if has_marks and self.foreign.isdisjoint(filled) else 2

    @property
    def keys(self) -> Iterable[tuple[str, str]]:
        """Methods and paths that the route answers."""
        return product(METHODS[self.method], (self.path, *self.aliases))


@dataclass(frozen=True)
class Dialect:
    """Routes of one family of clients, and the body that its errors have.

    Attributes:
        name: in the API's description.
        routes: rows of the table.
        error: makes the JSON body of an error.
        prefix: first part of paths that ask for this dialect, also where others have the rest of the path.
    """

    name: str
    routes: tuple[Route, ...] = field(default=())
    error: Callable[[Fault], dict[str, Any]] = openai_error
    prefix: str = ""
