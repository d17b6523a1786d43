"""Scores out of vectors: cosine of pairs, late interaction of a query with documents, and the order of scores.

All on the CPU, in float32, on the arrays in which an engine hands out its results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Array = np.ndarray[Any, np.dtype[np.float32]]
    Indices = np.ndarray[Any, np.dtype[np.int64]]

CHUNK = 128
"""Document tokens that `max_sim` multiplies at once, more only where one document has more.

Short documents are joined up to here, because a multiplication of a few rows costs mostly its call. Longer ones are
multiplied where they lie: larger chunks cost a copy of them, and leave the cache before their maximum is taken.
"""


def cosine(queries: Sequence[Array], documents: Sequence[Array]) -> Array:
    """Cosine of each query with the document at the same place, as `torch.nn.functional.cosine_similarity`.

    Args:
        queries: N vectors `[D]`, float32.
        documents: N vectors `[D]`, float32.

    Returns:
        `[N]` float32.

    Raises:
        ValueError: there are no pairs, the lists differ in length, or the vectors do.
    """
    queries_ND, documents_ND = np.stack(queries), np.stack(documents)
    if queries_ND.shape != documents_ND.shape:
        raise ValueError(f"queries {queries_ND.shape} and documents {documents_ND.shape} do not pair up")
    scores_N: Array = F.cosine_similarity(torch.from_numpy(queries_ND), torch.from_numpy(documents_ND), dim=1).numpy()
    return scores_N


def max_sim(query_QD: Array, documents: Sequence[Array]) -> Array:
    """Late interaction (ColBERT, arXiv:2004.12832): sum over query tokens of their largest dot product in a document.

    Args:
        query_QD: vectors of the query's tokens, `[Q, D]` float32.
        documents: N matrices `[T, D]`, float32, each with its own T of at least 1. They are never padded.

    Returns:
        `[N]` float32.

    Raises:
        ValueError: a document has no tokens.
    """
    lengths = [len(document) for document in documents]
    if 0 in lengths:
        raise ValueError(f"document {lengths.index(0)} has no tokens")
    with torch.inference_mode():
        query_DQ = torch.from_numpy(query_QD).T.contiguous()
        largest_NQ = torch.empty(len(documents), len(query_QD))
        for first, end in _chunks(lengths):
            if end - first == 1:
                largest_NQ[first] = (torch.from_numpy(documents[first]) @ query_DQ).amax(0)
                continue
            products_TQ = torch.from_numpy(np.concatenate(documents[first:end])) @ query_DQ
            largest_NQ[first:end] = torch.segment_reduce(
                products_TQ, "max", lengths=torch.tensor(lengths[first:end]), axis=0, unsafe=True
            )
        scores_N: Array = largest_NQ.sum(1).numpy()
    return scores_N


def dot(first_K: Indices, first: Array, second_K: Indices, second: Array) -> float:
    """Dot product of two sparse vectors, each as rising indices `[K]` and values `[K]`."""
    places = np.intersect1d(first_K, second_K, assume_unique=True, return_indices=True)
    here, there = places[1:]
    return float(first[here].astype(np.float64) @ second[there].astype(np.float64))


def similarities(query: Array | tuple[Indices, Array], documents: Sequence[Any]) -> Array:
    """How alike `query` is to each document: cosine of vectors, MaxSim of matrices, dot product of sparse vectors.

    Args:
        query: `[D]`, `[Q, D]`, or rising indices `[K]` with their values.
        documents: N of the same form.

    Returns:
        `[N]` float32.

    Raises:
        ValueError: the forms or sizes differ.
    """
    if isinstance(query, tuple):
        return np.array([dot(*query, *document) for document in documents], dtype=np.float32)
    if query.ndim == 1:
        return cosine([query] * len(documents), documents)
    return max_sim(query, documents)


def ranking(scores: Sequence[float] | Array, top_n: int | None = None) -> list[int]:
    """Places of `scores` by falling score, equal ones in their order; the first `top_n`, or all for 0 and `None`."""
    order: list[int] = np.argsort(-np.asarray(scores), kind="stable").tolist()
    return order[: top_n or None]


def _chunks(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours with at most `CHUNK` rows together, or of a single one with more."""
    first = rows = 0
    for place, length in enumerate(lengths):
        if place > first and rows + length > CHUNK:
            yield first, place
            first, rows = place, 0
        rows += length
    if lengths:
        yield first, len(lengths)
