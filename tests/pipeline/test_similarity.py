"""`similarity_fn_name` of a checkpoint decides what its scores are, as `similarity` of sentence-transformers does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from starlette.testclient import TestClient

from cenote import LLM
from cenote.cli.serve import report
from cenote.config import ServerConfig
from cenote.errors import CheckpointError
from cenote.server.app import build
from tests import checkpoints
from tests.checkpoints import pooling

QUERIES = ["quick fox", "The the the dog.", "water of natural stone"]
DOCUMENTS = ["The quick brown fox jumps over the lazy dog.", "water", "one two three four five six seven eight nine"]
VECTORS = ["cosine", "dot", "euclidean", "manhattan"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("masked"), masked_lm=True)


def named(path: Path, name: str | None) -> Path:
    checkpoints.edit_json(path / "config_sentence_transformers.json", similarity_fn_name=name)
    return path


def dense(masked: Path, path: Path, name: str | None) -> Path:
    checkpoints.bert(path)
    checkpoints.write_modules(path, pooling("mean"), settings={"model_type": "SentenceTransformer"})
    return named(path, name)


def sparse(masked: Path, path: Path, name: str | None) -> Path:
    modules = [Transformer(str(masked), transformer_task="fill-mask"), SpladePooling()]
    SparseEncoder(modules=modules, device="cpu").save_pretrained(str(path), create_model_card=False)
    return named(path, name)


def of_tokens(masked: Path, path: Path, name: str | None) -> Path:
    modules = [Transformer(str(masked)), Normalize(module_input_name="token_embeddings")]
    MultiVectorEncoder(modules=modules, device="cpu").save_pretrained(str(path), create_model_card=False)
    return named(path, name)


KINDS: dict[str, tuple[Any, Any, str, list[str]]] = {
    "dense": (dense, SentenceTransformer, "bi-encoder", VECTORS),
    "sparse": (sparse, SparseEncoder, "sparse", VECTORS),
    "tokens": (of_tokens, MultiVectorEncoder, "late-interaction", ["maxsim", "meanmaxsim"]),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in [*KINDS[kind][3], None]])
def test_scores_are_the_reference_s(masked: Path, tmp_path: Path, kind: str, name: str | None) -> None:
    write, reference, score_type, _ = KINDS[kind]
    path = write(masked, tmp_path / "model", name)
    model = reference(str(path), device="cpu")
    assert name in (None, model.similarity_fn_name)
    expected = model.similarity(model.encode_query(QUERIES), model.encode_document(DOCUMENTS)).cpu().numpy()
    with LLM(model=str(path)) as llm:
        assert llm.info.score_types[0] == score_type
        for query, row in zip(QUERIES, expected, strict=True):
            scores = [o.outputs.score for o in llm.score(query, DOCUMENTS, use_tqdm=False)]
            np.testing.assert_allclose(scores, row, rtol=1e-5, atol=1e-5)
            ranked = llm.rerank(query, DOCUMENTS, use_tqdm=False)
            assert [entry.index for entry in ranked] == np.argsort(-row).tolist()
        pairs = llm.score(QUERIES, DOCUMENTS, use_tqdm=False)
        np.testing.assert_allclose([o.outputs.score for o in pairs], np.diag(expected), rtol=1e-5, atol=1e-5)
        encoded = [llm.encode(texts, use_tqdm=False) for texts in (QUERIES, DOCUMENTS)]
        np.testing.assert_allclose(llm.similarity(*encoded), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_vectors_over_the_vocabulary_are_compared_as_sparse_ones(masked: Path, tmp_path: Path, kind: str) -> None:
    write, reference, *_ = KINDS[kind]
    path = write(masked, tmp_path / "model", "dot")
    model = reference(str(path), device="cpu")
    expected = model.similarity(model.encode_query(QUERIES), model.encode_document(DOCUMENTS)).cpu().numpy()
    with LLM(model=str(path)) as llm:
        sides = [llm.embed(texts, use_tqdm=False) for texts in (QUERIES, DOCUMENTS)]
        np.testing.assert_allclose(llm.similarity(*sides), expected, rtol=1e-5)


def test_served_and_reported(masked: Path, tmp_path: Path) -> None:
    path = dense(masked, tmp_path / "model", "manhattan")
    model = SentenceTransformer(str(path), device="cpu")
    expected = model.similarity(model.encode(QUERIES[:1]), model.encode(DOCUMENTS))[0].tolist()
    with LLM(model=str(path)) as llm, TestClient(build([llm._service], ServerConfig())) as client:
        answer = client.post("/score", json={"queries": QUERIES[0], "documents": DOCUMENTS}).json()
        assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected, rel=1e-5)
        answer = client.post("/rerank", json={"query": QUERIES[0], "documents": DOCUMENTS}).json()
        assert [entry["relevance_score"] for entry in answer["results"]] == pytest.approx(sorted(expected)[::-1])
        assert "scores pairs as: bi-encoder, late-interaction; vectors by manhattan" in report(llm._service)


def test_names_of_the_other_kind_say_nothing(masked: Path, tmp_path: Path) -> None:
    """As in sentence-transformers: what a converted checkpoint still says of its former kind."""
    for kind, name in (("dense", "meanmaxsim"), ("tokens", "dot"), ("tokens", "MaxSim"), ("sparse", "maxsim")):
        write, reference, *_ = KINDS[kind]
        path = write(masked, tmp_path / f"{kind}-{name}", name)
        model = reference(str(path), device="cpu")
        expected = model.similarity(model.encode_query(QUERIES[0]), model.encode_document(DOCUMENTS)).cpu().numpy()
        with LLM(model=str(path)) as llm:
            scores = [o.outputs.score for o in llm.score(QUERIES[0], DOCUMENTS, use_tqdm=False)]
            np.testing.assert_allclose(scores, expected.reshape(-1), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_names_are_refused(masked: Path, tmp_path: Path, kind: str) -> None:
    path = KINDS[kind][0](masked, tmp_path / "model", None)
    named(path, "xtr")
    with pytest.raises(CheckpointError, match="similarity_fn_name is 'xtr'; honoured are cosine, dot, .*, meanmaxsim"):
        LLM(model=str(path))
    shutil.rmtree(path)
