"""Rules of `docs/style.md` that a program can check; `checks/reading.py` has those that are numbers."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from tests.test_layers import MODULES, name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAY_NOTHING = {"own", "found", "given", "known", "made", "wanted", "asked"}


def nested_conditions(tree: ast.AST) -> Iterator[ast.AST]:
    """Conditional expressions that hold another."""
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            yield from (part for part in ast.walk(node) if isinstance(part, ast.IfExp) and part is not node)


def walruses(tree: ast.AST) -> Iterator[ast.AST]:
    """Assignments in the condition of a comprehension."""
    for node in ast.walk(tree):
        for condition in getattr(node, "ifs", ()):
            yield from (part for part in ast.walk(condition) if isinstance(part, ast.NamedExpr))


def long_comprehensions(tree: ast.AST) -> Iterator[ast.AST]:
    """Comprehensions of more than two loops, or of more than one condition."""
    for node in ast.walk(tree):
        loops = getattr(node, "generators", ())
        if len(loops) > 2 or sum(len(loop.ifs) for loop in loops) > 1:
            yield node


def locals_without_a_noun(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in SAY_NOTHING:
            yield node


RULES: dict[str, tuple[Callable[[ast.AST], Iterator[ast.AST]], str]] = {
    "a conditional expression holds no other": (nested_conditions, "a = 1 if b else 2 if c else 3"),
    "no walrus in a comprehension's condition": (walruses, "a = [b for c in d if (b := c.e)]"),
    "two loops that flatten, and one condition": (long_comprehensions, "a = [b for b in c if d if e]"),
    "locals have the name of their noun": (locals_without_a_noun, "found = 1"),
}


@pytest.mark.parametrize(("faults", "example"), RULES.values(), ids=RULES)
def test_a_rule_is_kept(faults: Callable[[ast.AST], Iterator[ast.AST]], example: str) -> None:
    assert [*faults(ast.parse(example))], "the rule would be missed"
    places = [f"{name(path)}:{fault.lineno}" for path in MODULES for fault in faults(ast.parse(path.read_text()))]  # type: ignore[attr-defined]
    assert not places
