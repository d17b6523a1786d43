"""Scores out of vectors: similarity of pairs, late interaction of a query with documents, and the order of scores.

All on the CPU, in float32, on the arrays in which an engine hands out its results.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cenote.core import Similarity

    Array = np.ndarray[Any, np.dtype[np.float32]]
    Floats = np.ndarray[Any, np.dtype[Any]]
    """float32 or float64."""
    Indices = np.ndarray[Any, np.dtype[np.int64]]
    Sparse = tuple[Indices, Array]
    """Rising indices `[K]` and values `[K]`."""

SHORTEST = 1e-8
"""Length that a vector has at least in a cosine, as in torch's: a zero vector is like no other."""


def _cosine(x_ND: Floats, y_ND: Floats) -> Floats:
    lengths_2N = np.maximum(np.linalg.norm(np.stack([x_ND, y_ND]), axis=2), SHORTEST)
    cosines_N: Floats = (x_ND / lengths_2N[0][:, None] * (y_ND / lengths_2N[1][:, None])).sum(1)
    return cosines_N


PAIRWISE: dict[str, Callable[[Floats, Floats], Floats]] = {
    "cosine": _cosine,
    "dot": lambda x_ND, y_ND: (x_ND * y_ND).sum(1),
    "euclidean": lambda x_ND, y_ND: -np.sqrt(np.square(x_ND - y_ND).sum(1)),
    "manhattan": lambda x_ND, y_ND: -np.abs(x_ND - y_ND).sum(1),
}
"""Similarities of two vectors, `[N, D], [N, D] -> [N]`, by the names that sentence-transformers gives them; distances
are negative, so that more is more alike."""

OF_NOTHING = -1e9
"""Score of a document all of whose tokens are left out, as in sentence-transformers: below every other."""

CHUNK = 128
"""Document tokens that `max_sim` multiplies at once, more only where one document has more.

Short documents are joined up to here, because a multiplication of a few rows costs mostly its call. Longer ones are
multiplied where they lie: larger chunks cost a copy of them, and leave the cache before their maximum is taken.
"""


def pairwise(queries: Sequence[Array], documents: Sequence[Array], name: str = "cosine") -> Array:
    """Return the similarity of each query with the document at the same place.

    Args:
        queries: N vectors `[D]`, float32.
        documents: N vectors `[D]`, float32.
        name: a key of `PAIRWISE`.

    Returns:
        `[N]` float32.

    Raises:
        ValueError: there are no pairs, the lists differ in length, or the vectors do.
    """
    queries_ND, documents_ND = np.stack(queries), np.stack(documents)
    if queries_ND.shape != documents_ND.shape:
        raise ValueError(f"queries {queries_ND.shape} and documents {documents_ND.shape} do not pair up")
    return PAIRWISE[name](queries_ND, documents_ND)


def max_sim(query_QD: Array, documents: Sequence[Array], *, is_apart: bool = False) -> Array:
    """Late interaction (ColBERT, arXiv:2004.12832): sum over query tokens of their largest dot product in a document.

    Args:
        query_QD: vectors of the query's tokens, `[Q, D]` float32.
        documents: N matrices `[T, D]`, float32, each with its own T. They are never padded.
        is_apart: multiply each document by itself, so that no bit of its score depends on the others.

    Returns:
        `[N]` float32; documents without tokens get `OF_NOTHING`.
    """
    lengths_N = np.fromiter(map(len, documents), int)
    if not lengths_N.all():
        scores_N = np.full(len(documents), OF_NOTHING, np.float32)
        scores_N[lengths_N > 0] = max_sim(
            query_QD, [document for document in documents if len(document)], is_apart=is_apart
        )
        return scores_N
    lengths = lengths_N.tolist()
    query_DQ = np.ascontiguousarray(query_QD.T)
    largest_NQ = np.empty((len(documents), len(query_QD)), np.float32)
    chunks = itertools.pairwise(range(len(lengths) + 1)) if is_apart else _chunks(lengths)
    for first, end in chunks:
        if end - first == 1:
            np.max(documents[first] @ query_DQ, axis=0, out=largest_NQ[first])
            continue
        products_TQ = np.concatenate(documents[first:end]) @ query_DQ
        starts = np.cumsum([0, *lengths[first : end - 1]])
        np.maximum.reduceat(products_TQ, starts, axis=0, out=largest_NQ[first:end])
    sums_N: Array = largest_NQ.sum(1)
    return sums_N


def late_interaction(
    query_QD: Array, documents: Sequence[Array], name: str = "maxsim", *, is_apart: bool = False
) -> Array:
    """`max_sim`, or with the name "meanmaxsim" its mean over the query's tokens instead of the sum; `[N]` float32."""
    scores_N = max_sim(query_QD, documents, is_apart=is_apart)
    return scores_N / np.float32(max(1, len(query_QD))) if name == "meanmaxsim" else scores_N


def sparse_similarity(first: Sparse, second: Sparse, name: str = "dot") -> float:
    """Return the similarity of two sparse vectors, in float64; `name` is a key of `PAIRWISE`."""
    if name == "dot":  # an entry that only one of them has counts nothing
        here, there = np.intersect1d(first[0], second[0], assume_unique=True, return_indices=True)[1:]
        return float(first[1][here].astype(np.float64) @ second[1][there].astype(np.float64))
    indices_K = np.union1d(first[0], second[0])
    pair_2K = np.zeros((2, len(indices_K)))
    for row_K, (indices, values) in zip(pair_2K, (first, second), strict=True):
        row_K[np.searchsorted(indices_K, indices)] = values
    return float(PAIRWISE[name](pair_2K[:1], pair_2K[1:]).item())


def similarities(query: Array | Sparse, documents: Sequence[Any], similarity: Similarity) -> Array:
    """Return the similarity of `query` to each document, by the rule of `similarity` for their kind.

    Args:
        query: `[D]`, `[Q, D]`, or rising indices `[K]` with their values.
        documents: N of the same form.
        similarity: of vectors, of sparse vectors and of matrices.

    Returns:
        `[N]` float32.

    Raises:
        ValueError: the forms or sizes differ.
    """
    if isinstance(query, tuple):
        scores = [sparse_similarity(query, document, similarity.sparse) for document in documents]
        return np.array(scores, dtype=np.float32)
    if query.ndim == 1:
        return pairwise([query] * len(documents), documents, similarity.vectors)
    return late_interaction(query, documents, similarity.tokens, is_apart=similarity.is_apart)


def ranking(scores: Sequence[float] | Array, top_n: int | None = None) -> list[int]:
    """Return places by falling score, equal ones in their order; the first `top_n`, or all for 0 and `None`."""
    order: list[int] = np.argsort(-np.asarray(scores), kind="stable").tolist()
    return order[: top_n or None]


def _chunks(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ranges of neighbours with at most `CHUNK` rows together, or of a single one with more."""
    first = rows = 0
    for place, length in enumerate(lengths):
        if place > first and rows + length > CHUNK:
            yield first, place
            first, rows = place, 0
        rows += length
    if lengths:
        yield first, len(lengths)
