"""What is put before an input, and how the two sides of a search are told apart.

Clients spell the side of an input differently (`input_type`, `task`, `prompt_name`); checkpoints name their prompts
and adapters differently too. Here they meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cenote.core import plain_name
from cenote.errors import BadRequest

Role = Literal["query", "document"]

SPELLINGS: dict[Role, tuple[str, ...]] = {
    "query": ("query", "search_query", "retrieval.query", "retrieval_query"),
    "document": ("document", "passage", "search_document", "retrieval.passage", "retrieval_passage", "corpus"),
}
"""Names of the two sides, of clients and checkpoints alike; the first that a checkpoint has counts."""

ROLES: dict[str, Role] = {name: role for role, names in SPELLINGS.items() for name in names}

BOTH_SIDES = "retrieval"
"""Name of an adapter for queries and documents alike."""
SAME_TASK = {"clustering": "separation", "separation": "clustering"}
"""Jina's third model calls its adapter for clustering `separation`."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The prompt of an input.

    Attributes:
        text: put before it.
        name: under which the checkpoint has it; `None` for a text that the request brought.
        role: side that the input is on, if it was said.
        adapter: with which it runs; `None` = the pure backbone.
    """

    text: str = ""
    name: str | None = None
    role: Role | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of one model.

    Attributes:
        named: name to text.
        default: name of the prompt of inputs that ask for none.
        two_sided: the model encodes queries and documents differently besides.
        adapters: names of the model's adapters, which are as good as names of prompts, in any spelling.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    two_sided: bool = False
    adapters: tuple[str, ...] = ()

    def choose(self, *, prompt: str | None = None, name: str | None = None, input_type: str | None = None) -> Applied:
        """The prompt that a request asks for: its own text, a name, or the side that an input is on.

        Raises:
            BadRequest: more than one is asked for, or the model has no such prompt.
        """
        asked = [key for key, value in (("prompt", prompt), ("prompt_name", name), ("input_type", input_type)) if value]
        if len(asked) > 1:
            raise BadRequest(f"only one of {' and '.join(asked)} can be given", param=asked[0])
        if prompt is not None:
            return Applied(prompt, adapter=self.choose().adapter)
        if name is not None:
            if (found := self._named(name)) is None:
                raise BadRequest(f"unknown prompt_name {name!r}. {self._known()}", param="prompt_name")
            return found
        if input_type is not None:
            return self._of_type(input_type)
        default = self._named(self.default) if self.default else None
        return Applied(default.text, default.name, adapter=default.adapter) if default else Applied()

    def of(self, role: Role) -> Applied:
        """The prompt of one side, empty if the model has none; the default prompt where it has no sides at all."""
        name = next((name for name in SPELLINGS[role] if name in self.named), None)
        default = self.choose()
        adapter = self._adapter_of(role) or default.adapter
        if name is not None:
            return Applied(self.named[name], name, role, adapter)
        return Applied(default.text, default.name, role, adapter)

    def _of_type(self, input_type: str) -> Applied:
        if (found := self._named(input_type)) is not None:
            return found
        role = ROLES.get(input_type)
        has_sides = self.two_sided or any(name in ROLES for name in self.named)
        adapter = self._adapter_of(role) if role else None
        if role is None or not (has_sides or adapter):
            raise BadRequest(f"Unsupported input_type {input_type!r}. {self._known()}", param="input_type")
        name = next((name for name in SPELLINGS[role] if name in self.named), None)
        return Applied(self.named[name] if name else "", name, role, adapter)

    def _named(self, name: str) -> Applied | None:
        """The prompt and the adapter called `name`, of which a model may have one without the other."""
        prompt = name if name in self.named else _spelled(name, self.named) if self.adapters else None
        adapter = self._adapter(name) or (self._adapter(prompt) if prompt else None)
        if prompt is None and adapter is None:
            return None
        role = ROLES.get(name) or ROLES.get(plain_name(name) if adapter else "")
        return Applied(self.named[prompt] if prompt else "", prompt or adapter, role, adapter)

    def _adapter(self, name: str) -> str | None:
        """The adapter for what `name` says: one of that name, else of that side."""
        role = ROLES.get(plain_name(name))
        return _spelled(name, self.adapters) or (self._adapter_of(role) if role and name in self.named else None)

    def _adapter_of(self, role: Role) -> str | None:
        """The adapter of one side."""
        names = (*SPELLINGS[role], BOTH_SIDES)
        return next((found for name in names if (found := _spelled(name, self.adapters))), None)

    def _known(self) -> str:
        names = sorted({*self.named, *self.adapters, *(SPELLINGS if self.two_sided else ())})
        if not names:
            return "This model does not define any input_type task instructions."
        return f"Supported values: {', '.join(names)}"


def _spelled(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is `name` in any spelling."""
    found = {plain_name(own): own for own in known}
    return found.get(plain_name(name)) or found.get(SAME_TASK.get(plain_name(name), ""))


@dataclass(frozen=True)
class Sides:
    """How a model encodes its two sides differently, in token ids: late interaction, or queries by a table.

    Attributes:
        lengths: tokens to which a side is cut.
        fill_to: tokens to which queries are filled up; 0 = they are not.
        fill_id: with what.
        fixed: queries are also cut to `fill_to`.
        attend: other tokens attend to those filled in.
        skipped: ids whose rows are left out.
        skipped_of: the sides from which they are; an input without a side counts as a document.
        pooled_of: the sides whose token vectors are joined into fewer; likewise.
        by_table: sparse embeddings of queries come from a table of weights; their tokens are only those of the text.
    """

    lengths: Mapping[str, int] = field(default_factory=dict)
    fill_to: int = 0
    fill_id: int = 0
    fixed: bool = True
    attend: bool = False
    skipped: frozenset[int] = frozenset()
    skipped_of: tuple[str, ...] = ("document",)
    pooled_of: tuple[str, ...] = ()
    by_table: bool = False

    def limit(self, role: Role | None, most: int) -> int | None:
        """Tokens to which an input is cut, at most `most`; `None` = the model names no length."""
        own = self.fill_to if role == "query" and self.fill_to and self.fixed else self.lengths.get(role or "")
        return None if own is None else min(most, own)

    def filled(self, ids: list[int], role: Role | None) -> tuple[list[int], int]:
        """`ids` with what fills a query up, and how many of them no token attends to."""
        missing = self.fill_to - len(ids) if role == "query" else 0
        if missing <= 0:
            return ids, 0
        return [*ids, *[self.fill_id] * missing], 0 if self.attend else missing

    def kept(self, ids: list[int], role: Role | None) -> tuple[int, ...] | None:
        """Which tokens' rows are returned; `None` = all."""
        if (role or "document") not in self.skipped_of or self.skipped.isdisjoint(ids):
            return None
        return tuple(i for i, token in enumerate(ids) if token not in self.skipped)
