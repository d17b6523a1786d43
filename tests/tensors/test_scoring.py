"""Cosine, late interaction and ranking against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.util.similarity import SimilarityFunction

from cenote.core import Similarity
from cenote.tensors import similarity
from cenote.tensors.similarity import PAIRWISE, max_sim, pairwise, ranking, similarities, sparse_similarity

WIDTH = 16


def matrices(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((length, WIDTH), dtype=np.float32) for length in lengths]


def definition(query: np.ndarray, documents: list[np.ndarray]) -> np.ndarray:
    exact = torch.from_numpy(query).double()
    return np.array([(exact @ torch.from_numpy(d).double().T).max(1).values.sum().item() for d in documents])


def test_cosine_pairs_by_place() -> None:
    queries, documents = matrices(7)[0], matrices(7, seed=1)[0]
    expected = torch.nn.functional.cosine_similarity(
        torch.from_numpy(queries).double(), torch.from_numpy(documents).double()
    )
    scores = pairwise(list(queries), list(documents))
    assert scores.dtype == np.float32
    assert scores == pytest.approx(expected.numpy(), abs=1e-6)


def test_cosine_ignores_length_and_takes_zero() -> None:
    x = np.array([3, 4], np.float32)
    assert pairwise([x, x, x], [x * 10, -x, x * 0]).tolist() == pytest.approx([1, -1, 0])


@pytest.mark.parametrize(("queries", "documents"), [(1, 3), (3, 1), (0, 0)])
def test_cosine_takes_pairs_only(queries: int, documents: int) -> None:
    x = np.ones(4, np.float32)
    with pytest.raises(ValueError):
        pairwise([x] * queries, [x] * documents)


def sparse(*rows: list[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.nonzero(row)[0], np.float32(row)[np.nonzero(row)[0]]) for row in rows]


@pytest.mark.parametrize("name", PAIRWISE)
def test_similarities_by_name(name: str) -> None:
    """Against sentence-transformers, of dense vectors and of sparse ones that overlap in part, or have nothing."""
    rows = [[0, 3, 0, 0.5, 0, 1], [2, 1, 0, 0, 0, 4], [0, 0, 7, 0, 0, -2], [0, 3, 0, 0.5, 0, 1], [0] * 6]
    vectors = np.array(rows, np.float32)
    expected = SimilarityFunction.to_similarity_fn(name)(torch.tensor(vectors), torch.tensor(vectors)).numpy()
    assert len(np.unique(expected.round(4))) > 2
    for query, own, row in zip(vectors, sparse(*rows), expected, strict=True):
        np.testing.assert_allclose(pairwise([query] * 5, list(vectors), name), row, rtol=1e-6, atol=1e-6)
        found = [sparse_similarity(own, document, name) for document in sparse(*rows)]
        np.testing.assert_allclose(found, row, rtol=1e-6, atol=1e-6)
        by_kind = Similarity(vectors=name), Similarity(sparse=name)
        np.testing.assert_allclose(similarities(query, list(vectors), by_kind[0]), row, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(similarities(own, sparse(*rows), by_kind[1]), row, rtol=1e-6, atol=1e-6)


def test_mean_max_sim() -> None:
    queries, documents = matrices(3, 9), matrices(4, 1, 8, seed=1)
    expected = SimilarityFunction.to_similarity_fn("meanmaxsim")(
        [torch.tensor(query) for query in queries], [torch.tensor(document) for document in documents]
    )
    for query, row in zip(queries, expected, strict=True):
        found = similarities(query, documents, Similarity(tokens="meanmaxsim"))
        np.testing.assert_allclose(found, row, rtol=1e-5)
        np.testing.assert_allclose(max_sim(query, documents) / len(query), row, rtol=1e-5)
    nothing = np.zeros((0, WIDTH), np.float32)
    assert similarities(nothing, documents, Similarity(tokens="meanmaxsim")).tolist() == [0] * 3


@pytest.mark.parametrize("chunk", [1, 8, 9, 10, 11, 10_000])
@pytest.mark.parametrize("query_length", [1, 5])
def test_max_sim_is_exact_wherever_chunks_end(query_length: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "CHUNK", chunk)
    (query,) = matrices(query_length, seed=1)
    documents = matrices(1, 8, 1, 1, 30, 3, 7, 10, 1)
    scores = max_sim(query, documents)
    assert scores.dtype == np.float32
    assert scores == pytest.approx(definition(query, documents), rel=1e-5, abs=1e-5)


def test_max_sim_at_the_chunk_in_use() -> None:
    (query,) = matrices(32, seed=1)
    documents = matrices(*np.random.default_rng(2).integers(1, 2 * similarity.CHUNK, 40))
    assert max_sim(query, documents) == pytest.approx(definition(query, documents), rel=1e-5, abs=1e-4)


def test_max_sim_keeps_negative_scores() -> None:
    """A document whose every product is negative: padding with zeros would lift it to 0."""
    query, (document, longer) = np.ones((2, 4), np.float32), (-np.ones((1, 4), np.float32), np.ones((5, 4), np.float32))
    assert max_sim(query, [document, longer, document]).tolist() == [-8, 8, -8]


def test_max_sim_takes_slices_and_leaves_its_input() -> None:
    wide = matrices(12)[0]
    query, documents = wide[:3, ::2], [wide[3:5, ::2], wide[5:, ::2]]
    before = wide.copy()
    assert max_sim(query, documents) == pytest.approx(definition(query, documents), rel=1e-5, abs=1e-5)
    assert np.array_equal(wide, before)


def test_max_sim_without_documents_or_tokens() -> None:
    (query,) = matrices(2)
    assert max_sim(query, []).shape == (0,)
    first, empty, last = matrices(3, 0, 2)
    assert max_sim(query, [first, empty, last]).tolist() == [*max_sim(query, [first]), -1e9, *max_sim(query, [last])]
    assert max_sim(query, [empty]).tolist() == [-1e9]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ([5, 1], [(0, 2)]),
        ([5, 2], [(0, 1), (1, 2)]),
        ([7, 3, 3, 9], [(0, 1), (1, 3), (3, 4)]),
        ([6, 1, 6], [(0, 1), (1, 2), (2, 3)]),
        ([], []),
    ],
)
def test_chunks_hold_whole_documents(
    length: list[int], expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "CHUNK", 6)
    assert list(similarity._chunks(length)) == expected


@pytest.mark.parametrize("top_n", [0, None, 5, 6])
def test_ranking_of_all(top_n: int | None) -> None:
    assert ranking([0.1, 0.9, -3.0, 0.9, 0.5], top_n) == [1, 3, 4, 0, 2]


def test_ranking_of_the_first() -> None:
    assert ranking(np.array([0.1, 0.9, 0.5], np.float32), 2) == [1, 2]
    assert ranking([]) == []


def test_ranking_keeps_the_order_of_equals() -> None:
    scores = [float(place % 3) for place in range(1000)]
    assert ranking(scores) == [*range(2, 1000, 3), *range(1, 1000, 3), *range(0, 1000, 3)]
