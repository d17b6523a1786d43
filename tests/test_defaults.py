"""One answer to which task runs and how pairs are scored when a request says nothing, from Python and over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cenote import LLM, PoolingParams
from cenote.config import ServerConfig
from cenote.core import LateChunkingParams
from cenote.outputs import EmbeddingRequestOutput
from cenote.pipeline.ranking import WAYS
from cenote.server.app import build
from cenote.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterator

QUERY = "The capital of France is Paris."
DOCUMENTS = ["Machine learning is a subset of artificial intelligence.", "Paris lies on the Seine."]


@pytest.fixture(scope="module")
def late() -> Iterator[LLM]:
    """MiniLM, whose requests get token vectors unless they say otherwise."""
    llm = LLM(pooler_config={"task": "token_embed"})
    yield llm
    llm._service.engine.close()


@pytest.fixture(scope="module")
def client(late: LLM) -> Iterator[TestClient]:
    """The same model over HTTP."""
    with TestClient(build([late._service], ServerConfig())) as client:
        yield client


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    """Token vectors of each text, by sentence-transformers, normalised as the model's vectors are."""
    from sentence_transformers import SentenceTransformer

    from cenote.models.hub import embedded

    model = SentenceTransformer(str(embedded()), device="cpu")
    texts = [QUERY, *DOCUMENTS]
    encoded = model.encode(texts, output_value="token_embeddings", convert_to_numpy=False)
    return {
        text: (matrix / matrix.norm(dim=-1, keepdim=True)).numpy() for text, matrix in zip(texts, encoded, strict=True)
    }


def maxsim(query: Any, document: Any) -> float:
    """The sum of each query token's best product."""
    return float((query @ document.T).max(axis=1).sum())


def test_rows_of_the_task_table_name_the_ways_that_use_them() -> None:
    """Each task that has a way to score is the task of that way; the first of several."""
    for task in TASKS.values():
        assert not task.way or WAYS[task.way].task == task.name


def test_token_vectors_by_default(late: LLM, client: TestClient, rows: dict[str, Any]) -> None:
    """`embed`, `encode`, `/v1/embeddings` and `/pooling` answer with one row per token."""
    assert (late.info.default_task, late.info.vector_task) == ("token_embed", "token_embed")
    for output in (late.embed(QUERY, use_tqdm=False)[0], late.encode(QUERY, use_tqdm=False)[0]):
        assert not isinstance(output, EmbeddingRequestOutput)
        np.testing.assert_allclose(output.outputs.data.numpy(), rows[QUERY], atol=1e-5)
    answer = client.post("/v1/embeddings", json={"input": QUERY}).json()
    np.testing.assert_allclose(answer["data"][0]["embedding"], rows[QUERY], atol=1e-5)
    answer = client.post("/pooling", json={"input": QUERY}).json()
    np.testing.assert_allclose(answer["data"][0]["data"], rows[QUERY], atol=1e-5)


def test_late_interaction_by_default(late: LLM, client: TestClient, rows: dict[str, Any]) -> None:
    """`score`, `rerank` and their routes compare by MaxSim."""
    expected = [maxsim(rows[QUERY], rows[text]) for text in DOCUMENTS]
    scores = [output.outputs.score for output in late.score(QUERY, DOCUMENTS, use_tqdm=False)]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    answer = client.post("/score", json={"queries": QUERY, "documents": DOCUMENTS}).json()
    np.testing.assert_allclose([entry["score"] for entry in answer["data"]], expected, atol=1e-4)
    answer = client.post("/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()
    ranked = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    np.testing.assert_allclose([ranked[i] for i in range(len(DOCUMENTS))], expected, atol=1e-4)


def test_a_request_still_chooses(late: LLM, client: TestClient) -> None:
    """A task or a way that a request names is not the default's."""
    (cosine,) = late.score(QUERY, DOCUMENTS[0], score_type="bi-encoder", use_tqdm=False)
    assert 0 < cosine.outputs.score < 1
    answer = client.post("/v1/embeddings", json={"input": QUERY, "task": "embed"}).json()
    assert len(answer["data"][0]["embedding"]) == late.info.dimension


def test_late_chunking_by_embed(late: LLM) -> None:
    """`embed` with late chunking gives the matrix of chunks, with the chunks' places."""
    params = PoolingParams(late_chunking_params=LateChunkingParams(chunk_size=4))
    (output,) = late.embed(QUERY, pooling_params=params, use_tqdm=False)
    assert not isinstance(output, EmbeddingRequestOutput)
    assert output.late_chunking is not None
    assert output.outputs.data.shape == (len(output.late_chunking.chunks), late.info.dimension)
