"""Search in the documentation of the standard library: dense vectors, token vectors and, with a SPLADE model, weights.

    python examples/search.py "read a file line by line" [--sparse MODEL] [--documents 1000] [--top 5]

Every way of searching ranks all documents; the last table joins the ranks (reciprocal rank fusion). Without a model's
name the embedded all-MiniLM-L6-v2 gives both kinds of vectors, from one forward.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cenote import LLM

TASKS = ["embed", "token_embed"]
FUSION_CONSTANT = 60


@dataclass(frozen=True)
class Document:
    """A function or class of the standard library and what its docstring says."""

    name: str
    text: str


def documents(count: int) -> list[Document]:
    """The first `count` documented functions and classes, modules in alphabetical order."""
    found: list[Document] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                found.append(Document(f"{file.stem}.{node.name}", text))
                if len(found) == count:
                    return found
    return found


class Index:
    """Embeddings of all documents, by each way of searching."""

    def __init__(self, texts: list[str], dense: LLM, sparse: LLM | None = None) -> None:
        self._dense, self._sparse = dense, sparse
        self._vectors = dense.encode(texts, pooling_task=TASKS)
        self._matrices = [output.outputs.others["token_embed"] for output in self._vectors]
        self._weights = sparse.embed_sparse(texts) if sparse else []

    def scores(self, query: str) -> dict[str, np.ndarray]:
        """A score for every document, by way of searching."""
        (found,) = self._dense.encode([query], pooling_task=TASKS, use_tqdm=False)
        scores = {"dense": self._dense.similarity([found], self._vectors)[0].numpy()}
        late = [found.outputs.others["token_embed"]]
        scores["late interaction"] = self._dense.similarity(late, self._matrices)[0].numpy()
        if self._sparse is not None:
            asked = self._sparse.embed_sparse([query], use_tqdm=False)
            scores["sparse"] = self._sparse.similarity(asked, self._weights)[0].numpy()
        return scores


def fused(scores: dict[str, np.ndarray]) -> np.ndarray:
    """Reciprocal rank fusion: the sum over all ways of 1 / (60 + rank)."""
    ranks = [np.argsort(np.argsort(-own, kind="stable")) for own in scores.values()]
    return np.sum([1 / (FUSION_CONSTANT + 1 + rank) for rank in ranks], axis=0)


def main() -> None:
    """Index, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query")
    parser.add_argument("--dense", help="model for vectors (default: all-MiniLM-L6-v2)")
    parser.add_argument("--sparse", help="SPLADE model; none = no sparse search")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()
    found = documents(options.documents)
    sparse = LLM(options.sparse, convert="sparse", auto_truncate=True) if options.sparse else None
    index = Index([document.text for document in found], LLM(options.dense, auto_truncate=True), sparse)
    scores = index.scores(options.query)
    for name, own in [*scores.items(), ("all together", fused(scores))]:
        print(f"\n{name}")
        for place in np.argsort(-own, kind="stable")[: options.top]:
            print(f"  {own[place]:8.3f}  {found[place].name:<40} {found[place].text.splitlines()[0][:70]}")


if __name__ == "__main__":
    main()
