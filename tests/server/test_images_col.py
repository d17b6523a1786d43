"""Late interaction over pictures, over HTTP: the requests that vLLM documents for ColQwen3, and a page for ColPali."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import pictured
from tests.pictured import PICTURE, noise, saved

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = noise(90, 130)
DOCUMENTS = [
    "Machine learning is a subset of artificial intelligence.",
    "Python is a programming language.",
    "Deep learning uses neural networks.",
]
QUERY = "What is machine learning?"
URL = f"data:image/png;base64,{base64.b64encode(saved(PAGE)).decode()}"
PARTS = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "Describe the image."}]
MESSAGES = {"messages": [{"role": "user", "content": PARTS}]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    return {"colqwen3": pictured.colqwen3(folder / "3", "tomoro"), "colpali": pictured.colpali(folder / "pali")}


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[TestClient]:
    configs = [ModelConfig(model=str(path), served_model_name=(name,)) for name, path in folders.items()]
    services = [Service.open(config, EngineConfig()) for config in configs]
    with TestClient(build(services, ServerConfig()), raise_server_exceptions=False) as client:
        yield client
    for service in services:
        service.engine.close()


def rows(llm: LLM, prompts: Any) -> list[np.ndarray]:
    outputs = llm.encode(prompts, use_tqdm=False, pooling_task="token_embed")
    return [output.outputs.data.numpy().astype(np.float64) for output in outputs]


def pooled(client: TestClient, body: dict[str, Any]) -> np.ndarray:
    answer = client.post("/pooling", json=body)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["data"][0]["data"])


def test_requests_for_colqwen3_run_as_written(client: TestClient, folders: dict[str, Path]) -> None:
    page = f"<|im_start|>user\n{PICTURE}Describe the image.<|im_end|>\n"
    prompts = [QUERY, *DOCUMENTS, {"prompt": page, "multi_modal_data": {"image": PAGE}}]
    with LLM(str(folders["colqwen3"])) as llm:
        query, *documents, page_rows = rows(llm, prompts)
    expected = [float((query @ document.T).max(1).sum()) for document in documents]

    body: dict[str, Any] = {"model": "colqwen3", "query": QUERY, "documents": DOCUMENTS}
    results = client.post("/rerank", json=body).json()["results"]
    assert [result["index"] for result in results] == np.argsort(expected)[::-1].tolist()
    assert [result["relevance_score"] for result in results] == pytest.approx(sorted(expected)[::-1], abs=1e-4)
    scored = client.post("/score", json={"model": "colqwen3", "text_1": QUERY, "text_2": DOCUMENTS}).json()["data"]
    assert [entry["score"] for entry in scored] == pytest.approx(expected, abs=1e-4)
    own = pooled(client, {"model": "colqwen3", "input": QUERY, "task": "token_embed"})
    assert np.abs(own - query).max() < 1e-5
    own = pooled(client, {"model": "colqwen3", **MESSAGES})
    assert own.shape == page_rows.shape
    assert np.abs(own - page_rows).max() < 1e-5


def test_a_page_of_a_model_without_a_chat_template_is_rendered_by_its_own(
    client: TestClient, folders: dict[str, Path]
) -> None:
    with LLM(str(folders["colpali"])) as llm:
        (expected,) = rows(llm, [PAGE])
    own = pooled(client, {"model": "colpali", **MESSAGES})
    assert own.shape == expected.shape
    assert np.abs(own - expected).max() < 1e-5
