"""What is put before an input, and how the two sides of a search are told apart.

Clients spell the side of an input differently (`input_type`, `task`, `prompt_name`); checkpoints name their prompts
and adapters differently too. Here they meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cenote.core import Role, plain_name
from cenote.errors import BadRequest

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
