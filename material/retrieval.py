"""Search in the documentation of the standard library, and its measure.

Every query is the qualified name of a function or class in words, and the one right answer is its docstring.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS = 128
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Pairs:
    """What is looked for, and at the same place where it is found."""

    queries: tuple[str, ...]
    documents: tuple[str, ...]


def words(name: str) -> str:
    """A qualified name in words: split at dots, underscores and humps.

    >>> words("http.client.HTTPConnection.set_tunnel")
    'http client http connection set tunnel'
    """
    return " ".join(WORD.findall(name)).lower()


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of the public functions and classes in `node`, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if child.name.startswith("_"):
                continue
            own = f"{name}.{child.name}"
            if text := ast.get_docstring(child):
                yield own, text
            yield from documented(child, own) if isinstance(child, ast.ClassDef) else ()
        elif isinstance(child, (ast.If, ast.Try)):
            yield from documented(child, name)


@functools.cache
def library() -> dict[str, str]:
    """Docstrings by the name in words of what they describe, each once."""
    found: dict[str, str] = {}
    texts: set[str] = set()
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if LEFT_OUT & {*parts} or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for name, text in documented(ast.parse(file.read_text(encoding="utf-8")), module):
            if words(name) not in found and text not in texts:
                found[words(name)] = text
                texts.add(text)
    return found


def collect(count: int) -> Pairs:
    """`count` pairs, evenly spread over the library; no two have the same query or the same document."""
    found = [*library().items()]
    assert len(found) >= count, f"the standard library here has {len(found)} pairs"
    chosen = [found[i * len(found) // count] for i in range(count)]
    return Pairs(tuple(query for query, _ in chosen), tuple(text for _, text in chosen))


def ndcg_at_10(queries_ND: np.ndarray, documents_ND: np.ndarray) -> float:
    """nDCG@10 by dot product, where the right answer of each query stands at its own place.

    With one right answer the best gain is 1, and a query's is 1 / log2(1 + rank), 0 behind rank 10. Of documents with
    the same score the first comes first.
    """
    scores_NN = queries_ND @ documents_ND.T
    own_N1 = scores_NN.diagonal()[:, None]
    ranks_N = 1 + (scores_NN > own_N1).sum(axis=1) + np.tril(scores_NN == own_N1, -1).sum(axis=1)
    return float(np.where(ranks_N <= 10, 1 / np.log2(1 + ranks_N), 0).mean())
