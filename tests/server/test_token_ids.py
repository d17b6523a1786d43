"""Token ids over HTTP: those of another tokenizer are refused, run as they are, or read as text."""

from __future__ import annotations

import base64
import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from cenote import LLM, cl100k
from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.app import build
from tests.conftest import INFO, error, expected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

TEXT = "The water is deep."
TOKENS = {791: "The", 3090: " water", 374: " is", 5655: " deep", 13: "."}
"""The text in OpenAI's vocabulary cl100k_base, as LangChain's OpenAIEmbeddings sends it unless it is told not to."""
FOREIGN = [*TOKENS]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": [FOREIGN]},
    "/pooling": {"input": FOREIGN},
    "/embed": {"inputs": [FOREIGN]},
    "/embedding": {"content": FOREIGN},
}
CURE = "check_embedding_ctx_length=False"


@pytest.fixture
def vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The part of the vocabulary that the text needs, taken for the whole."""
    lines = [base64.b64encode(token.encode()) + f" {number}\n".encode() for number, token in TOKENS.items()]
    file = tmp_path / cl100k.CACHED
    file.write_bytes(b"".join(lines))
    monkeypatch.setattr(cl100k, "DIGEST", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv(cl100k.CACHE, str(tmp_path))
    return file


def _vector(answer: Any) -> Any:
    """The first vector of an answer of any dialect."""
    if isinstance(answer, dict):
        answer = answer.get("data", answer)
    if isinstance(answer, dict):
        return answer["embedding"]
    return answer[0] if isinstance(answer[0], list) else next(v for v in answer[0].values() if isinstance(v, list))


@pytest.mark.parametrize("path", PATHS)
def test_ids_without_special_tokens_are_refused(serve: Serve, path: str) -> None:
    answer = serve(token_ids="strict").post(path, json=PATHS[path])
    assert answer.status_code == 400
    assert "got 5 token ids without [CLS] or [SEP], which the tokenizer of fake always adds" in answer.text
    assert CURE in answer.text


def test_the_default_is_strict(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    client = serve(token_ids=ServerConfig().token_ids)
    assert error(client, {"input": [tokenizer(TEXT)["input_ids"], FOREIGN]})["param"] == "input"
    ids = [101, 5, 102]
    (entry,) = client.post("/v1/embeddings", json={"input": ids}).json()["data"]
    assert entry["embedding"] == pytest.approx(expected(ids))
    assert "cannot be empty" in error(client, {"input": [[]]})["message"]


@pytest.mark.parametrize("path", PATHS)
def test_native_runs_them(serve: Serve, path: str) -> None:
    answer = serve(token_ids="native").post(path, json=PATHS[path]).json()
    assert _vector(answer) == pytest.approx(expected(FOREIGN))


@pytest.mark.parametrize("path", PATHS)
def test_cl100k_reads_them_as_text(
    serve: Serve, path: str, vocabulary: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = serve(token_ids="cl100k").post(path, json=PATHS[path]).json()
    assert _vector(answer) == pytest.approx(expected(tokenizer(TEXT)["input_ids"]))


def test_cl100k_counts_the_tokens_of_the_model_and_refuses_ids_of_none(serve: Serve, vocabulary: Path) -> None:
    client = serve(token_ids="cl100k", token_ids_vocabulary=str(vocabulary))
    assert client.post("/v1/embeddings", json={"input": FOREIGN}).json()["usage"]["prompt_tokens"] == 7
    refused = error(client, {"input": [*FOREIGN, 100_257]})
    assert refused["message"].startswith("got the token id 100257, which is not in OpenAI's vocabulary cl100k_base")


def test_a_vocabulary_is_found_or_refused(vocabulary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cl100k.find(None) == vocabulary
    monkeypatch.delenv(cl100k.CACHE)
    monkeypatch.setattr(cl100k, "BUNDLED", {"no-such-package": "folder", "pytest": "folder"})
    with pytest.raises(ValidationError, match=f"found no vocabulary cl100k_base in .*folder/{cl100k.CACHED}; give the"):
        ServerConfig(token_ids="cl100k")
    other = tmp_path / "other"
    other.write_bytes(b"eA== 0\n")
    with pytest.raises(ValidationError, match=r"is not cl100k_base\.tiktoken: its SHA-256 is"):
        ServerConfig(token_ids="cl100k", token_ids_vocabulary=str(other))
    with pytest.raises(ValidationError, match="`token_ids_vocabulary` is for token_ids 'cl100k', and it is 'strict'"):
        ServerConfig(token_ids_vocabulary=str(other))
    other.write_bytes(b"no vocabulary")
    with pytest.raises(ValueError, match="is not a vocabulary"):
        cl100k.Vocabulary(other)


def test_a_tokenizer_that_adds_nothing_takes_all_ids_and_warns_once(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = None
    service = Service(FakeEngine(INFO), Renderer(plain, INFO), ("fake",))
    with TestClient(build([service], ServerConfig())) as client:
        for _ in range(2):
            (entry,) = client.post("/v1/embeddings", json={"input": FOREIGN}).json()["data"]
            assert entry["embedding"] == pytest.approx(expected(FOREIGN))
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert CURE in record.getMessage()


def test_a_part_of_a_character_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary"
    file.write_bytes(b"w6k= 0\nww== 1\n")
    assert cl100k.Vocabulary(file).text([0, 1]) == "\u00e9\ufffd"


def test_offline_nothing_is_refused(llm: LLM) -> None:
    (output,) = llm.embed([FOREIGN], use_tqdm=False)
    assert output.prompt_token_ids == FOREIGN


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The embedded model."""
    return LLM()
