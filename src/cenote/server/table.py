"""The table of routes: from a method and a path to the routes that may answer, and the model that the path names.

Several dialects may have one path. The prefix of a dialect (`/tei/rerank`) decides between them, else the keys of the
body do (`Route.marks`), else the first route that needs none of them answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cenote.errors import BadRequest
from cenote.server.routes import Dialect
from cenote.server.unread import refuse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo

    from cenote.server.routes import Route

MODEL = "{model}"
"""Part of a path that stands for the name of a model."""
OF_MODEL = "/models/"
"""Before the name of a model, every path may follow it."""
CARD = "/v1/models/{model}"
"""Path of the card of a model, which is also that of the name alone behind `OF_MODEL`."""
PREFIXES = 2
"""Prefixes that a path may have: a dialect and a model, in either order."""


COMMON = Dialect("Common")
"""The dialect of paths that no dialect has."""


@dataclass(frozen=True)
class Entry:
    """A route and the dialect that has it.

    Attributes:
        strangers: fields of other bodies on the same path, which this one does not read: the dialect of each, and its
            defaults there.
    """

    dialect: Dialect
    route: Route
    strangers: Mapping[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)

    @property
    def fields(self) -> Mapping[str, FieldInfo]:
        """The fields of the body."""
        return self.route.body.model_fields if self.route.body else {}

    def check(self, body: Any) -> None:
        """Refuse a field of another dialect or server, which would change the answer there, and has no effect here.

        Args:
            body: parsed.

        Raises:
            BadRequest: it has one.
        """
        if not isinstance(body, dict):
            return
        refuse(body, self.fields)
        for name in sorted(self.strangers.keys() & body.keys()):
            dialect, defaults = self.strangers[name]
            if body[name] is not None and any(body[name] != default for default in defaults):
                raise BadRequest(
                    f"got `{name}`, a field of {dialect}, in a request that is read as one of {self.dialect.name}, "
                    "which has no such field; leave it out, or name the dialect by a prefix of the path, see "
                    "docs/dialects.md",
                    param=name,
                )


@dataclass(frozen=True)
class Match:
    """The routes of a path.

    Attributes:
        path: as the table has it, without the names of models.
        entries: in the order of the dialects; at least one.
        forced: the dialect whose prefix the path has.
        model: name of the model in the path.
    """

    path: str
    entries: tuple[Entry, ...]
    forced: Dialect | None = None
    model: str | None = None

    @cached_property
    def default(self) -> Entry:
        """The route for a body without keys."""
        return self._nearest({})

    @cached_property
    def takes_body(self) -> bool:
        """Whether a route takes a body."""
        return any(entry.route.body is not None for entry in self.entries)

    @property
    def is_shared(self) -> bool:
        """Whether several dialects have the path, of which the body tells."""
        return len(self.entries) > 1

    @cached_property
    def _telling(self) -> frozenset[str]:
        """Keys of which one at least is in every body that is not for the default route."""
        return frozenset().union(*(entry.route.marks | entry.route.either for entry in self.entries))

    def entry(self, body: Any = None) -> Entry:
        """Return the route for a parsed body."""
        if not isinstance(body, dict) or self._telling.isdisjoint(body):
            return self.default
        return self._nearest(body)

    def _nearest(self, fields: Mapping[str, Any]) -> Entry:
        return min(self.entries, key=lambda entry: entry.route.distance(fields))

    def dialect(self, body: Any = None) -> Dialect:
        """Return the dialect of errors for a parsed body."""
        return self.forced or self.entry(body).dialect


IDLE = frozenset(
    {
        "model",
        "user",
        "request_id",
        "priority",
        "cache_salt",
        "return_tokens",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "chat_template_kwargs",
        "media_io_kwargs",
    }
)
"""Fields that change nothing where they are not read: names, the order of work, and how messages become text."""


def _acquainted(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Return the routes of one path, each with the fields of the others that it does not read."""
    owners: dict[str, str] = {}
    defaults: dict[str, tuple[Any, ...]] = {}
    for entry in entries:
        for name, of_body in entry.fields.items():
            owners.setdefault(name, entry.dialect.name)
            defaults[name] = (*defaults.get(name, ()), of_body.get_default(call_default_factory=True))
    return tuple(
        replace(entry, strangers={name: (owners[name], defaults[name]) for name in owners.keys() - entry.fields - IDLE})
        for entry in entries
    )


class Table:
    """The routes of `dialects` on a server of models with `names`.

    Attributes:
        routes: all entries by method and path.
    """

    def __init__(self, dialects: Sequence[Dialect], names: Iterable[str]) -> None:
        self.routes: dict[tuple[str, str], tuple[Entry, ...]] = {}
        for dialect in dialects:
            for route in dialect.routes:
                self._add(Entry(dialect, route))
        self.routes = {key: _acquainted(entries) for key, entries in self.routes.items()}
        self._matches = {key: Match(key[1], entries) for key, entries in self.routes.items()}
        self._names = sorted(names, key=len, reverse=True)
        self._prefixed = {dialect.prefix: dialect for dialect in dialects if dialect.prefix}
        patterns = [key for key in self.routes if MODEL in key[1]]
        self._patterns = sorted(patterns, key=lambda key: len(key[1]), reverse=True)

    def _add(self, entry: Entry) -> None:
        for key in entry.route.keys:
            others = self.routes.get(key, ())
            marks = {(other.route.marks, other.route.either) for other in others}
            if (entry.route.marks, entry.route.either) in marks:
                raise ValueError(f"two dialects have the route {' '.join(key)}; the second is {entry.dialect.name}")
            self.routes[key] = (*others, entry)

    def match(self, method: str, path: str, prefixes: int = PREFIXES) -> Match | None:
        """Return the routes of a path without a closing slash, `None` if it has none.

        Args:
            method: of the request.
            path: of the request.
            prefixes: maximum prefixes of dialects and models before the path of a route.
        """
        match = self._matches.get((method, path))
        if match is not None:
            return match
        if not prefixes:
            return self._by_pattern(method, path)
        return (
            self._of_dialect(method, path, prefixes)
            or self._of_model(method, path, prefixes)
            or self._by_pattern(method, path)
            or self._of_stranger(method, path, prefixes)
        )

    def methods(self, path: str) -> list[str]:
        """Return the methods of a path, sorted."""
        methods = {method for method, _ in self.routes}
        return sorted(method for method in methods if self.match(method, path))

    def dialect(self, path: str) -> Dialect:
        """Return the dialect of a path that has no route for the method of its request.

        Returns:
            That of the path's other methods, else the one whose prefix the path has, also behind the name of a model,
            else the one that all clients read in part.
        """
        matches = (self.match(method, path) for method in self.methods(path))
        for match in filter(None, matches):
            return match.dialect()
        rests = (rest for _, rest in self._named(path))
        return self._forced(next(rests, path))

    def _forced(self, path: str) -> Dialect:
        """Return the dialect whose prefix a path has."""
        return self._prefixed.get(path[1:].partition("/")[0], COMMON)

    def _named(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield the names of models that a path begins with, the longest first, each with the path behind it."""
        if not path.startswith(OF_MODEL):
            return
        after = f"{path.removeprefix(OF_MODEL)}/"
        for name in self._names:
            if after.startswith(f"{name}/"):
                yield name, after.removeprefix(name).rstrip("/")

    def _of_dialect(self, method: str, path: str, prefixes: int) -> Match | None:
        """Return the routes of a path that begins with a dialect: its own, else those that all dialects share."""
        dialect = self._forced(path)
        if dialect is COMMON:
            return None
        match = self.match(method, path.removeprefix(f"/{dialect.prefix}") or "/", prefixes - 1)
        if match is None:
            return None
        of_dialect = tuple(entry for entry in match.entries if entry.dialect is dialect)
        return replace(match, entries=of_dialect or match.entries, forced=match.forced or dialect)

    def _of_model(self, method: str, path: str, prefixes: int) -> Match | None:
        """Return the routes of a path that follows the name of a model, the longest of them."""
        named = next(self._named(path), None)
        if named is None:
            return None
        name, rest = named
        match = self._card(method, name, rest) or self.match(method, rest or "/", prefixes - 1)
        return match and replace(match, model=match.model or name)

    def _card(self, method: str, name: str, rest: str) -> Match | None:
        """Return the routes of a model's card, if nothing follows its name."""
        entries = () if rest else self.routes.get((method, CARD), ())
        return Match(CARD, entries, None, name) if entries else None

    def _of_stranger(self, method: str, path: str, prefixes: int) -> Match | None:
        """Return the routes of a path that begins with a name that no model has, `NAME` or `OWNER/NAME`.

        The route tells that the model is missing, in its own dialect; so it must be one that looks the model up.
        """
        if not path.startswith(OF_MODEL) or any(self._named(path)):
            return None
        parts = path.removeprefix(OF_MODEL).split("/")
        for end in range(1, min(len(parts), 2) + 1):
            name, rest = "/".join(parts[:end]), "/".join(parts[end:])
            card = self._card(method, name, rest)
            if card is not None:
                return card
            match = self.match(method, f"/{rest}", prefixes - 1)
            if match and match.model is None and all("model" in entry.fields for entry in match.entries):
                return replace(match, model=name)
        return None

    def _by_pattern(self, method: str, path: str) -> Match | None:
        """Return the routes of a path with the name of a model within it."""
        for key in self._patterns:
            head, _, tail = key[1].partition(MODEL)
            name = path[len(head) : len(path) - len(tail)]
            if key[0] == method and name and path == f"{head}{name}{tail}":
                return Match(key[1], self.routes[key], None, name)
        return None


def collisions(routes: Mapping[tuple[str, str], tuple[Entry, ...]]) -> dict[tuple[str, str], tuple[Entry, ...]]:
    """Return the routes that several dialects have, by method and path."""
    return {key: entries for key, entries in routes.items() if len(entries) > 1}
