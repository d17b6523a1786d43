"""Prompts: the text before an input, and the differences between the two sides of a search.

Clients spell the side of an input differently (`input_type`, `task`, `prompt_name`); checkpoints name their prompts
and adapters differently too. This module matches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from cenote.conventions import Role, plain_name
from cenote.errors import BadRequest

SPELLINGS: dict[Role, tuple[str, ...]] = {
    "query": ("query", "search_query", "retrieval.query", "retrieval_query"),
    "document": ("document", "passage", "search_document", "retrieval.passage", "retrieval_passage", "corpus"),
}
"""Names of the two sides, in requests and in checkpoints; the first that a checkpoint has is used."""

ROLES: dict[str, Role] = {name: role for role, names in SPELLINGS.items() for name in names}

VOCABULARY = frozenset({
    *ROLES, "image", "classification", "clustering", "semantic_similarity", "text-matching", "separation", "retrieval",
    "code", "code.query", "code.passage", "nl2code.query", "nl2code.passage", "qa.query", "qa.passage",
    "code2code.query", "code2code.passage", "code2nl.query", "code2nl.passage", "code2completion.query",
    "code2completion.passage",
})  # fmt: skip
"""Values of `input_type` and `task` that Cohere, Voyage, Jina, NVIDIA and Google define.

Their clients must send one, so a model without a prompt for it takes the input as if none had been sent. Not so a
model with adapters, whose tasks are its own.
"""

BOTH_SIDES = "retrieval"
"""Name of an adapter for queries and documents alike."""
SAME_TASK = {"clustering": "separation", "separation": "clustering"}
"""Jina's third model calls its adapter for clustering `separation`."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The prompt of an input.

    Attributes:
        text: put before the input.
        name: the checkpoint's name of it; `None` for a text from the request.
        role: side of the input, if known.
        adapter: name of the adapter to run with; `None` = the backbone alone.
    """

    text: str = ""
    name: str | None = None
    role: Role | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of one model.

    Attributes:
        named: texts by name.
        default: name of the prompt of inputs that ask for none.
        two_sided: the model also encodes queries and documents differently in other ways.
        adapters: names of the model's adapters. Requests may use them like names of prompts, in any spelling.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    two_sided: bool = False
    adapters: tuple[str, ...] = ()

    def choose(self, *, prompt: str | None = None, name: str | None = None, input_type: str | None = None) -> Applied:
        """Return the prompt that a request asks for: its own text, a name, or the side that an input is on.

        Raises:
            BadRequest: more than one is asked for, or the model has no such prompt.
        """
        parameters = {"prompt": prompt, "prompt_name": name, "input_type": input_type}
        sent = [(key, value) for key, value in parameters.items() if value is not None]
        if not sent:
            return self._default
        (key, value), *others = sent
        if others:
            raise BadRequest(f"only one of {' and '.join(dict(sent))} can be given", param=key)
        choices = {"prompt": self._by_text, "prompt_name": self._by_name, "input_type": self._by_type}
        return choices[key](value)

    def of(self, role: Role) -> Applied:
        """Return the prompt of one side, empty if the model has none; the default where it has no sides at all."""
        default = self._default
        prompt = self._side(role)
        if prompt.name is None:
            prompt = replace(prompt, text=default.text, name=default.name)
        return replace(prompt, adapter=prompt.adapter or default.adapter)

    @cached_property
    def _default(self) -> Applied:
        """The prompt of inputs that ask for none."""
        if not self.default:
            return Applied()
        return replace(self._by_name(self.default), role=None)

    def _by_text(self, text: str) -> Applied:
        return Applied(text, adapter=self._default.adapter)

    def _by_name(self, name: str) -> Applied:
        prompt = self._find(name)
        if prompt is None:
            raise BadRequest(f"unknown prompt_name {name!r}. {self._supported()}", param="prompt_name")
        return prompt

    def _by_type(self, input_type: str) -> Applied:
        prompt = self._find(input_type)
        if prompt is not None:
            return prompt
        role = ROLES.get(input_type)
        if role is not None and self._has_side(role):
            return self._side(role)
        if input_type not in VOCABULARY or self.adapters:
            raise BadRequest(f"Unsupported input_type {input_type!r}. {self._supported()}", param="input_type")
        return self._default

    def _has_side(self, role: Role) -> bool:
        """Return whether the model encodes queries and documents differently, or has an adapter for this side."""
        has_prompts_of_sides = not ROLES.keys().isdisjoint(self.named)
        return any((self.two_sided, has_prompts_of_sides, self._adapter_of(role)))

    def _side(self, role: Role) -> Applied:
        """Return the prompt and the adapter of one side, without regard to defaults."""
        name = next(filter(self.named.__contains__, SPELLINGS[role]), None)
        return Applied(self.named.get(name or "", ""), name, role, self._adapter_of(role))

    def _find(self, name: str) -> Applied | None:
        """Return the prompt and the adapter called `name`, of which a model may have one without the other."""
        prompt_name = self._prompt_name(name)
        adapter = self._adapter(name) or self._adapter(prompt_name)
        if not prompt_name and adapter is None:
            return None
        spelling = name if adapter is None else plain_name(name)
        return Applied(self.named.get(prompt_name, ""), prompt_name or adapter, ROLES.get(spelling), adapter)

    def _prompt_name(self, name: str) -> str:
        """Return the name of the prompt called `name`, or ""; in a model with adapters, in any spelling."""
        if name in self.named:
            return name
        if self.adapters:
            return self._prompt_names.get(plain_name(name), "")
        return ""

    def _adapter(self, name: str) -> str | None:
        """Return the adapter called `name`, or that of the side which a prompt of this name is for."""
        plain = plain_name(name)
        if plain in self._adapters:
            return self._adapters[plain]
        if plain in ROLES and name in self.named:
            return self._adapter_of(ROLES[plain])
        return None

    def _adapter_of(self, role: Role) -> str | None:
        names = map(plain_name, (*SPELLINGS[role], BOTH_SIDES))
        return next(filter(None, map(self._adapters.get, names)), None)

    @cached_property
    def _prompt_names(self) -> dict[str, str]:
        return _by_spelling(self.named)

    @cached_property
    def _adapters(self) -> dict[str, str]:
        return _by_spelling(self.adapters)

    def _supported(self) -> str:
        sides = SPELLINGS if self.two_sided else ()
        names = sorted({*self.named, *self.adapters, *sides})
        if not names:
            return "This model does not define any input_type task instructions."
        return f"Supported values: {', '.join(names)}"


def _by_spelling(names: Iterable[str]) -> dict[str, str]:
    """Return `names` by their plain spelling, and by that of other names of the same task."""
    table = {plain_name(name): name for name in names}
    of_other_names = {SAME_TASK.get(plain, plain): name for plain, name in table.items()}
    return of_other_names | table
