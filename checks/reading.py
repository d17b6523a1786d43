"""How much a reader of the package must hold in mind: `python checks/reading.py`, part of `make check`.

Four numbers a folder. Each has a goal, and above the goal a limit in `limits.json` that may only fall (by `--update`);
below its goal a number is free. A rewrite that lowers a number and reads worse is wrong.

- decisions per 100 statements: if, elif, conditional expression, loop, handler, case, comprehension and each of its
  conditions, each `and` and `or`. Docstrings are no statements; formatting does not matter.
- the most branches of a function, counted likewise, those of nested functions with it
- the most lines of a function, docstring included
- "what", "who" and "those which" per 1,000 words of docstrings
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "cenote"
LIMITS = Path(__file__).with_name("limits.json")
PARTS = (".", "cli", "engine", "models", "pipeline", "server", "tensors")
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
VAGUE = re.compile(r"\b(?:what|who|those which)\b", re.IGNORECASE)
GOALS = {"density": 25.0, "branches": 15, "lines": 50, "vague": 2.0}
DENSE = {"models": 28.0, "engine": 28.0}
"""Goals of density where reading and proving checkpoints, or several threads, need more decisions."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Reading:
    """The four numbers of a folder."""

    density: float
    branches: int
    lines: int
    vague: float


def decisions(tree: ast.AST) -> int:
    """Count the decisions in `tree`."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
    return count


def statements(tree: ast.AST) -> int:
    """Count the statements in `tree`, docstrings left out."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return sum(not _is_text(node) for node in nodes)


def docstrings(tree: ast.AST) -> list[str]:
    """Return the docstrings in `tree`, of variables too."""
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and _is_text(node)]
    return [node.value.value for node in texts]  # type: ignore[attr-defined]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def read(folder: Path) -> Reading:
    """Measure the modules below `folder`."""
    trees = [ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    words = " ".join(text for tree in trees for text in docstrings(tree))
    return Reading(
        density=round(100 * sum(map(decisions, trees)) / sum(map(statements, trees)), 1),
        branches=max(map(decisions, functions), default=0),
        lines=max((node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno), default=0),
        vague=round(1000 * len(VAGUE.findall(words)) / max(1, len(words.split())), 1),
    )


def largest(folder: Path, count: int) -> list[str]:
    """Name the functions with most decisions, a place to look at."""
    rows = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, FUNCTIONS) and node.end_lineno:
                size = node.end_lineno - node.lineno + 1
                rows.append((decisions(node), size, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return [f"{branches:3} decisions {size:3} lines  {place}" for branches, size, place in sorted(rows)[::-1][:count]]


def goal(part: str, name: str) -> float:
    """Return the number that a folder may always have."""
    return DENSE.get(part, GOALS[name]) if name == "density" else GOALS[name]


def _advice(value: float, limit: float, aim: float) -> str:
    return "lower the limit: --update" if max(value, aim) < limit else ""


def main() -> int:
    """Compare each folder with its limits; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="lower the limits to the numbers of today")
    parser.add_argument("--largest", metavar="N", type=int, help="name the N functions with most decisions")
    parser.add_argument("--folder", default=".", help="folder of --largest, below src/cenote")
    arguments = parser.parse_args()
    if arguments.largest:
        print("\n".join(largest(PACKAGE / arguments.folder, arguments.largest)))
        return 0
    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    numbers = {part: asdict(read(PACKAGE / part)) for part in PARTS}
    if arguments.update:
        numbers = {
            part: {name: max(goal(part, name), min(value, limits[part][name])) for name, value in row.items()}
            for part, row in numbers.items()
        }
        LIMITS.write_text(json.dumps(numbers, indent=2) + "\n")
        return 0
    above = 0
    for part, row in numbers.items():
        for name, value in row.items():
            limit = max(goal(part, name), limits[part][name])
            above += value > limit
            mark = "above the limit" if value > limit else _advice(value, limits[part][name], goal(part, name))
            print(f"{part:9} {name:9} {value:6} (limit {limit}) {mark}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
