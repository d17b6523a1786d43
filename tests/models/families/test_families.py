"""A family is one file and one row: a new one, with outputs of its own, is registered here and used like any other."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModel, AutoTokenizer

from cenote import LLM
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.errors import BadRequest, CheckpointError
from cenote.models import checkpoint, hub
from cenote.models.families import table
from cenote.models.families.family import Family
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import checkpoints
from tests.checkpoints import HIDDEN

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = '''
"""Waves: vectors are sine and cosine of the mean state times a frequency; sparse weights are norms of states."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from cenote.conventions import Sides
from cenote.errors import CheckpointError
from cenote.models.families.family import Family
from cenote.models.lexical import pruned
from cenote.models.poolers import Rows


@dataclass(frozen=True)
class WaveVectors:
    frequency: float
    dimension: int
    pooling: str = "waves"
    use_activation: bool = False

    def __call__(self, x_TD, batch, members, params):
        means = [x_TD[batch.starts[i] : batch.starts[i + 1]].float().mean(0) * self.frequency for i in members]
        return Rows(torch.stack([torch.cat([mean.sin(), mean.cos()]) for mean in means]))


@dataclass(frozen=True)
class Norms:
    def __call__(self, x_TD, batch, members, params):
        spans = [slice(batch.starts[i], batch.starts[i + 1]) for i in members]
        rising = [(span, batch.ids_T[span].argsort()) for span in spans]
        weights = [(x_TD[span].float().norm(dim=1)[order], batch.ids_T[span][order]) for span, order in rising]
        return pruned(weights, params.top_k)


@dataclass(frozen=True)
class Waves(Family):
    hub_files = ("waves.cfg",)
    prefixes = {"query": "quick "}

    frequency: float

    @classmethod
    def recognise(cls, files, options):
        file = files.folder / "waves.cfg"
        if not file.is_file():
            return None
        frequency = json.loads(file.read_text())["frequency"]
        if frequency <= 0:
            raise CheckpointError(f"waves.cfg: frequency must be above 0, got {frequency}")
        return cls(frequency)

    def sides(self, tokenizer):
        return Sides(lengths={"query": 4})

    def outputs(self, loaded):
        return {"embed": WaveVectors(self.frequency, 2 * loaded.files.width), "sparse": Norms()}

    def score_types(self, tasks):
        return ("sparse", "bi-encoder")
'''
FREQUENCY = 1.5
TEXTS = ["The brown fox jumps", "hello"]


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Family]:
    """The class of a module outside the package, as a row of the table."""
    file = tmp_path / "waves.py"
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("waves", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "waves", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(table, "FAMILIES", [*table.FAMILIES, module.Waves])
    waves: type[Family] = module.Waves
    return waves


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = checkpoints.bert(tmp_path / "model")
    (path / "waves.cfg").write_text(json.dumps({"frequency": FREQUENCY}))
    return path


def states(folder: Path, text: str) -> tuple[list[int], torch.Tensor]:
    """Token ids and last hidden states of Transformers' own model."""
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        states_TD = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()(**inputs).last_hidden_state[0]
    return inputs["input_ids"][0].tolist(), states_TD


def vector(folder: Path, text: str) -> np.ndarray:
    mean = states(folder, text)[1].mean(0) * FREQUENCY
    return torch.cat([mean.sin(), mean.cos()]).numpy()


def norms(folder: Path, text: str) -> tuple[list[int], np.ndarray]:
    ids, states_TD = states(folder, text)
    order = np.argsort(ids)
    return np.array(ids)[order].tolist(), states_TD.norm(dim=1).numpy()[order]


def test_from_python(family: type[Family], folder: Path) -> None:
    with LLM(str(folder)) as llm:
        assert llm.info.tasks == ("embed", "sparse", "token_embed")
        assert (llm.info.dimension, llm.info.report.pooling) == (2 * HIDDEN, "waves")
        assert llm.info.score_types == ("sparse", "bi-encoder")
        outputs = llm.embed(TEXTS, use_tqdm=False)
        sparse = llm.encode(TEXTS, pooling_task="sparse", use_tqdm=False)
        (query,) = llm.embed(TEXTS[:1], input_type="query", use_tqdm=False)
    for text, dense, weights in zip(TEXTS, outputs, sparse, strict=True):
        np.testing.assert_allclose(dense.outputs.embedding, vector(folder, text), atol=1e-5)
        ids, expected = norms(folder, text)
        assert weights.outputs.indices.tolist() == ids
        np.testing.assert_allclose(weights.outputs.data, expected, rtol=1e-5)
    np.testing.assert_allclose(query.outputs.embedding, vector(folder, "quick The"), atol=1e-5)  # cut to 4 tokens


@pytest.fixture
def client(family: type[Family], folder: Path) -> Iterator[TestClient]:
    service = Service.open(ModelConfig(model=str(folder), served_model_name=("waves",)), EngineConfig())
    with TestClient(build([service], ServerConfig())) as client:
        yield client


def test_over_http(client: TestClient, folder: Path) -> None:
    answer = client.post("/v1/embeddings", json={"model": "waves", "input": TEXTS}).json()
    for text, entry in zip(TEXTS, answer["data"], strict=True):
        np.testing.assert_allclose(entry["embedding"], vector(folder, text), atol=1e-5)
    body = {"model": "waves", "task": "sparse", "input": TEXTS[0]}
    answer = client.post("/pooling", json=body).json()
    ids, expected = norms(folder, TEXTS[0])
    entry = answer["data"][0]["data"]
    assert entry["indices"] == ids
    np.testing.assert_allclose(entry["values"], expected, rtol=1e-5)
    body = {"model": "waves", "query": "The", "documents": [TEXTS[0]]}
    answer = client.post("/rerank", json=body).json()
    query = dict(zip(*norms(folder, "quick The"), strict=True))
    document = dict(zip(ids, expected, strict=True))
    score = sum(query[i] * document[i] for i in query.keys() & document.keys())
    np.testing.assert_allclose(answer["results"][0]["relevance_score"], score, rtol=1e-5)


def test_it_is_recognised_by_its_file_alone(family: type[Family], folder: Path) -> None:
    assert "waves.cfg" in table.hub_files()
    (folder / "waves.cfg").write_text(json.dumps({"frequency": 0}))
    with pytest.raises(CheckpointError, match=r"waves\.cfg: frequency must be above 0, got 0"):
        LLM(str(folder))
    (folder / "waves.cfg").unlink()
    with LLM(str(folder)) as llm:
        assert llm.info.tasks == ("embed", "token_embed")
        assert llm.info.dimension == HIDDEN
        with pytest.raises(BadRequest, match="Unsupported task: 'sparse'"):
            llm.embed_sparse("a", use_tqdm=False)


def test_without_its_row_it_is_not_there(folder: Path) -> None:
    options = ModelConfig(model=str(folder))
    assert type(table.recognise(checkpoint.read(hub.find(options), options), options)) is Family
