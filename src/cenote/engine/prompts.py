"""What is put before an input, and how the two sides of a search are told apart.

Clients spell the side of an input differently (`input_type`, `task`, `prompt_name`); checkpoints name their prompts
differently too. Here they meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cenote.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

Role = Literal["query", "document"]

SPELLINGS: dict[Role, tuple[str, ...]] = {
    "query": ("query", "search_query", "retrieval.query", "retrieval_query"),
    "document": ("document", "passage", "search_document", "retrieval.passage", "retrieval_passage", "corpus"),
}
"""Names of the two sides, of clients and checkpoints alike; the first that a checkpoint has counts."""

ROLES: dict[str, Role] = {name: role for role, names in SPELLINGS.items() for name in names}


@dataclass(frozen=True, slots=True)
class Applied:
    """The prompt of an input.

    Attributes:
        text: put before it.
        name: under which the checkpoint has it; `None` for a text that the request brought.
        role: side that the input is on, if it was said.
    """

    text: str = ""
    name: str | None = None
    role: Role | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of one model.

    Attributes:
        named: name to text.
        default: name of the prompt of inputs that ask for none.
        two_sided: the model encodes queries and documents differently besides (late interaction).
    """

    named: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    two_sided: bool = False

    def choose(self, *, prompt: str | None = None, name: str | None = None, input_type: str | None = None) -> Applied:
        """The prompt that a request asks for: its own text, a name, or the side that an input is on.

        Raises:
            BadRequest: more than one is asked for, or the model has no such prompt.
        """
        asked = [key for key, value in (("prompt", prompt), ("prompt_name", name), ("input_type", input_type)) if value]
        if len(asked) > 1:
            raise BadRequest(f"only one of {' and '.join(asked)} can be given", param=asked[0])
        if prompt is not None:
            return Applied(prompt)
        if name is not None:
            if name not in self.named:
                raise BadRequest(f"unknown prompt_name {name!r}. {self._known()}", param="prompt_name")
            return Applied(self.named[name], name, ROLES.get(name))
        if input_type is not None:
            return self._of_type(input_type)
        return Applied(self.named[self.default], self.default) if self.default else Applied()

    def of(self, role: Role) -> Applied:
        """The prompt of one side, empty if the model has none; the default prompt where it has no sides at all."""
        name = next((name for name in SPELLINGS[role] if name in self.named), None)
        if name is not None:
            return Applied(self.named[name], name, role)
        default = self.choose()
        return Applied(default.text, default.name, role)

    def _of_type(self, input_type: str) -> Applied:
        if input_type in self.named:
            return Applied(self.named[input_type], input_type, ROLES.get(input_type))
        role = ROLES.get(input_type)
        has_sides = self.two_sided or any(name in ROLES for name in self.named)
        if role is None or not has_sides:
            raise BadRequest(f"Unsupported input_type {input_type!r}. {self._known()}", param="input_type")
        name = next((name for name in SPELLINGS[role] if name in self.named), None)
        return Applied(self.named[name] if name else "", name, role)

    def _known(self) -> str:
        names = sorted({*self.named, *(SPELLINGS if self.two_sided else ())})
        if not names:
            return "This model does not define any input_type task instructions."
        return f"Supported values: {', '.join(names)}"


@dataclass(frozen=True)
class Sides:
    """How a late-interaction model encodes its two sides, in token ids.

    Attributes:
        lengths: tokens to which a side is cut.
        fill_to: tokens to which queries are filled up; 0 = they are not.
        fill_id: with what.
        fixed: queries are also cut to `fill_to`.
        attend: other tokens attend to those filled in.
        skipped: ids whose rows are left out.
        skipped_of: the sides from which they are; an input without a side counts as a document.
    """

    lengths: Mapping[str, int] = field(default_factory=dict)
    fill_to: int = 0
    fill_id: int = 0
    fixed: bool = True
    attend: bool = False
    skipped: frozenset[int] = frozenset()
    skipped_of: tuple[str, ...] = ("document",)

    def limit(self, role: Role | None, most: int) -> int:
        """Tokens to which an input is cut, at most `most`."""
        if role == "query" and self.fill_to and self.fixed:
            return min(most, self.fill_to)
        return min(most, self.lengths.get(role or "", most))

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
