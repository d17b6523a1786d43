"""Chunks of one text, read as a whole: Jina's `late_chunking` and Voyage's contextualized embeddings."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModel, AutoTokenizer

from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.pipeline.late_chunking import _ends, _join
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from cenote.tensors.quantize import quantize
from tests import checkpoints
from tests.conftest import INFO, error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Serve

CHUNKS = ["naïve café over", "the lazy dog", "hello"]
JOINED = " ".join(CHUNKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    options: Any = {"model": str(folder), "served_model_name": "bert", "prompts": {"query": "quick "}}
    options["pooler_config"] = {"pooling_type": "MEAN"}
    service = Service.open(ModelConfig(**options), EngineConfig())
    with TestClient(build([service], ServerConfig())) as client:
        yield client


@pytest.fixture(scope="module")
def means(folder: Path) -> Any:
    """The mean of the states of each chunk's tokens, normalised; special tokens are of the chunk beside them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def of(chunks: list[str], prompt: str = "", *, normalize: bool = True) -> np.ndarray:
        encoded = tokenizer(prompt + " ".join(chunks), return_tensors="pt")
        with torch.inference_mode():
            states = model(**encoded).last_hidden_state[0].numpy()
        counts = [len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in chunks]
        counts[0] += 1 + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        counts[-1] += 1
        assert sum(counts) == len(states)
        vectors = np.stack([part.mean(0) for part in np.split(states, np.cumsum(counts)[:-1])])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors

    return of


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=2e-5, rtol=1e-4)


def jina(client: TestClient, **fields: Any) -> Any:
    answer = client.post("/v1/embeddings", json={"model": "bert", "input": CHUNKS, "late_chunking": True, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_jina(client: TestClient, means: Any) -> None:
    answer = jina(client)
    assert [(entry["index"], entry["object"]) for entry in answer["data"]] == [(i, "embedding") for i in range(3)]
    vectors = [entry["embedding"] for entry in answer["data"]]
    close(vectors, means(CHUNKS))
    alone = client.post("/v1/embeddings", json={"input": CHUNKS}).json()
    assert not np.allclose(vectors[1], alone["data"][1]["embedding"], atol=1e-2), "the other chunks are read too"
    tokens = client.post("/tokenize", json={"prompt": JOINED}).json()["count"]
    assert answer["usage"]["prompt_tokens"] == tokens


def test_jina_has_every_form(client: TestClient, means: Any) -> None:
    vectors = means(CHUNKS)
    coded = [entry["embedding"] for entry in jina(client, encoding_format="base64")["data"]]
    close([np.frombuffer(base64.b64decode(text), "<f4") for text in coded], vectors)
    bits = [entry["embedding"] for entry in jina(client, embedding_type="ubinary")["data"]]
    assert bits == quantize(vectors, "ubinary").tolist()
    raw = [entry["embedding"] for entry in jina(client, use_activation=False)["data"]]
    close(raw, means(CHUNKS, normalize=False))
    prompted = [entry["embedding"] for entry in jina(client, task="retrieval.query")["data"]]
    close(prompted, means(CHUNKS, "quick "))


def test_one_chunk_is_the_whole_text(client: TestClient) -> None:
    whole = client.post("/v1/embeddings", json={"input": JOINED}).json()["data"][0]["embedding"]
    close(jina(client, input=[JOINED])["data"][0]["embedding"], whole)
    close(jina(client, input=JOINED)["data"][0]["embedding"], whole)


def test_white_space_of_chunks_stays(client: TestClient, means: Any) -> None:
    spaced = [f"{CHUNKS[0]} ", f"{CHUNKS[1]}\n", CHUNKS[2]]
    close([entry["embedding"] for entry in jina(client, input=spaced)["data"]], means(CHUNKS))
    assert _join("p: ", ["a ", " b", "c", "\td"]) == ("p: a  b c\td", [4, 7, 9])


@pytest.mark.parametrize(
    ("offsets", "ends"),
    [
        ([(0, 0), (0, 3), (4, 7), (0, 0)], (2, 4)),
        ([(0, 3), (3, 7)], (1, 2)),  # a token that begins with the space before its word
        ([(0, 2), (2, 5), (5, 7)], (2, 3)),  # a token across the bound is of the first chunk
    ],
)
def test_tokens_belong_to_the_chunk_that_they_begin_in(offsets: list[tuple[int, int]], ends: tuple[int, ...]) -> None:
    assert _ends(offsets, [3]) == ends


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a chunk of spaces": ({"input": ["one", "  ", "two"]}, "chunk 1 has no tokens"),
    "an empty chunk": ({"input": ["one", ""]}, "late chunking takes plain text, got an empty one"),
    "ids": ({"input": [[5, 6]]}, "late chunking takes plain text, got token ids"),
    "nothing": ({"input": []}, "chunk 0 has no tokens"),
    "too long": ({"input": ["one two"] * 200}, "maximum context length"),
    "both": ({"late_chunking_params": {"chunk_size": 3}}, "neither messages nor `late_chunking_params`"),
    "messages": ({"input": [{"role": "user", "content": "one"}]}, "neither messages nor `late_chunking_params`"),
    "a cut": ({"truncate": True}, "late chunking reads whole documents, so it takes no truncate_prompt_tokens"),
}


@pytest.mark.parametrize(("fields", "words"), REFUSED.values(), ids=REFUSED)
def test_jina_refuses(client: TestClient, fields: dict[str, Any], words: str) -> None:
    body = {"input": CHUNKS, "late_chunking": True, **fields}
    assert words in error(client, body)["message"]


VOYAGE: dict[str, Any] = {
    "inputs": [CHUNKS, ["hello"]],
    "model": "bert",
    "input_type": None,
    "output_dtype": None,
    "output_dimension": None,
    "encoding_format": "base64",
}


@pytest.mark.parametrize(("side", "prompt"), [(None, ""), ("document", ""), ("query", "quick ")])
def test_voyage(client: TestClient, means: Any, side: str | None, prompt: str) -> None:
    answer = client.post("/v1/contextualizedembeddings", json=VOYAGE | {"input_type": side}).json()
    assert [document["index"] for document in answer["data"]] == [0, 1]
    for document, chunks in zip(answer["data"], VOYAGE["inputs"], strict=True):
        coded = [base64.b64decode(entry["embedding"]) for entry in document["data"]]
        close([np.frombuffer(text, "<f4") for text in coded], means(chunks, prompt))
        assert [entry["index"] for entry in document["data"]] == list(range(len(chunks)))
    assert answer["usage"].keys() == {"total_tokens"}


def test_voyage_has_numbers_and_small_types(client: TestClient, means: Any) -> None:
    body = VOYAGE | {"encoding_format": None, "inputs": [CHUNKS]}
    (document,) = client.post("/v1/contextualizedembeddings", json=body).json()["data"]
    close([entry["embedding"] for entry in document["data"]], means(CHUNKS))
    (document,) = client.post("/v1/contextualizedembeddings", json=body | {"output_dtype": "binary"}).json()["data"]
    assert [entry["embedding"] for entry in document["data"]] == quantize(means(CHUNKS), "binary").tolist()


def test_voyage_refuses(client: TestClient, serve: Serve) -> None:
    for body, words in (
        (VOYAGE | {"inputs": [[]]}, "at least 1 item"),
        (VOYAGE | {"inputs": [["one", " "]]}, "chunk 1 has no tokens"),
        (VOYAGE | {"model": "none"}, "The model `none` does not exist"),
    ):
        answer = client.post("/v1/contextualizedembeddings", json=body)
        assert list(answer.json()) == ["detail"]
        assert words in answer.json()["detail"]
    few = serve(FakeEngine(INFO), max_client_batch_size=3)
    answer = few.post("/v1/contextualizedembeddings", json=VOYAGE | {"model": "fake"})
    assert answer.json()["detail"] == "the request has 4 inputs; at most 3 are allowed"


def test_an_answer_may_be_too_large(folder: Path) -> None:
    service = Service.open(ModelConfig(model=str(folder)), EngineConfig())
    with TestClient(build([service], ServerConfig(max_response_bytes=900))) as client:
        for path, body in (
            ("/v1/embeddings", {"input": CHUNKS, "late_chunking": True}),
            ("/v1/contextualizedembeddings", {"inputs": [CHUNKS]}),
        ):
            answer = client.post(path, json=body)
            assert answer.json()["detail"].startswith(f"the answer would have some {3 * 32 * 12} bytes"), path


def test_pooling_has_other_late_chunking(client: TestClient) -> None:
    refused = error(client, {"input": CHUNKS, "late_chunking": True}, "/pooling")
    assert (refused["param"], refused["message"].partition(";")[0]) == (
        "late_chunking",
        "`late_chunking` is for embeddings alone",
    )


def test_inputs_that_are_objects_are_texts(client: TestClient) -> None:
    texts = client.post("/v1/embeddings", json={"input": ["one", "two"]}).json()["data"]
    for inputs in ([{"text": "one"}, {"text": "two"}], ["one", {"text": "two"}]):
        assert client.post("/v1/embeddings", json={"input": inputs}).json()["data"] == texts
    refused = error(client, {"input": [{"video": "https://example.com/a.mp4"}]})
    assert refused["message"].startswith("got an input with the keys ['video']; expected a text, {'text': ...}, or")
    assert "takes no images, only texts" in error(client, {"input": [{"image": "https://a/b.png"}, "a"]})["message"]
    assert "has no chat template" in error(client, {"input": [{"role": "user", "content": "one"}]})["message"]
