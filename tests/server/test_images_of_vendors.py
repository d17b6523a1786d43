"""Pictures as Jina, Voyage and Infinity have them: the values of `LLM.embed`."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import ServerConfig
from cenote.server.app import build
from tests import pictured
from tests.conftest import error, expected, floats
from tests.pictured import noise, saved, url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

A, B = noise(90, 130), noise(64, 48)
TEXT = "a quick brown fox"
TOLERANCE = 2e-6
"""Largest difference of the same value in another batch."""


def base(image: Any) -> str:
    return base64.b64encode(saved(image)).decode()


class Case(NamedTuple):
    """A model, from Python and served; whether a text and a picture can be one input."""

    llm: LLM
    client: TestClient
    joins: bool

    def check(self, path: str, body: dict[str, Any], prompts: list[Any]) -> dict[str, Any]:
        """Compare the vectors of a request with those of prompts, and return the answer."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        vectors = [entry["embedding"] for entry in answer.json()["data"]]
        outputs = self.llm.embed(prompts, use_tqdm=False)
        expected = np.array([output.outputs.embedding for output in outputs])
        assert np.abs(np.array(vectors) - expected).max() < TOLERANCE
        assert np.abs(expected[0] - expected[-1]).max() > 1000 * TOLERANCE
        parsed: dict[str, Any] = answer.json()
        return parsed


MODELS: dict[str, tuple[Callable[[Path], Path], bool]] = {
    "one sequence": (lambda folder: pictured.qwen_vl(folder, "qwen3_vl"), True),
    "two towers": (pictured.clip, False),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    write, joins = MODELS[request.param]
    llm = LLM(str(write(tmp_path_factory.mktemp("vendors") / "model")))
    with TestClient(build([llm._service], ServerConfig()), raise_server_exceptions=False) as client:
        yield Case(llm, client, joins)
    llm.close()


@pytest.mark.parametrize("source", [url, base])
@pytest.mark.parametrize("key", ["image", "url", "bytes"])
def test_jina(case: Case, key: str, source: Callable[[Any], str]) -> None:
    inputs = [{key: source(A)}, TEXT, {"text": TEXT}, {key: source(B)}]
    case.check("/v1/embeddings", {"input": inputs}, [{"image": A}, TEXT, TEXT, {"image": B}])


def test_jina_with_a_text_beside_the_picture(case: Case) -> None:
    body = {"input": [{"text": TEXT, "image": url(A)}, TEXT]}
    if case.joins:
        case.check("/v1/embeddings", body, [{"text": TEXT, "image": A}, TEXT])
    else:
        assert "cannot be embedded together" in error(case.client, body)["message"]


def test_infinity(case: Case) -> None:
    body = {"input": [url(A), url(B)], "modality": "image"}
    case.check("/embeddings", body, [A, B])
    case.check("/infinity/embeddings", {"input": ["one", TEXT], "modality": "text"}, ["one", TEXT])
    assert "got the modality 'audio'" in error(case.client, body | {"modality": "audio"})["message"]


def test_nim(case: Case) -> None:
    inputs, prompts = [TEXT, url(A), "one"], [TEXT, A, "one"]
    for fields in ({}, {"modality": ["text", "image", "text"]}, {"input_type": "passage", "truncate": "END"}):
        case.check("/v1/embeddings", {"input": inputs, **fields}, prompts)
    case.check("/v1/embeddings", {"input": [url(A), url(B)], "modality": ["image"]}, [A, B])
    alone = [case.client.post("/v1/embeddings", json={"input": form}).json() for form in (url(A), [{"image": base(A)}])]
    assert alone[0]["usage"] == alone[1]["usage"]
    assert alone[0]["data"] == alone[1]["data"]
    assert error(case.client, {"input": inputs, "late_chunking": True})["code"] == 400
    short = error(case.client, {"input": inputs, "modality": ["text", "image"]})
    assert short["message"].startswith("got 2 modalities of 3 inputs")


@pytest.mark.parametrize("space", [" ", "\n"])
@pytest.mark.parametrize("fields", [{}, {"modality": "text_image"}], ids=str)
def test_nim_with_a_text_beside_the_picture(case: Case, space: str, fields: dict[str, str]) -> None:
    body = {"input": [f"{TEXT}{space}{url(A)}", f"one{space}{url(B)}"], **fields}
    if case.joins:
        prompts = [{"text": TEXT, "image": A}, {"text": "one", "image": B}]
        case.check("/v1/embeddings", body, prompts)
    else:
        assert "cannot be embedded together" in error(case.client, body)["message"]
    lone = error(case.client, {"input": TEXT, "modality": "text_image"})
    assert "got a text without a picture" in lone["message"]


def test_the_url_of_a_picture_within_a_text_is_text(case: Case) -> None:
    for text in ("(data:image/a;base64,AA)", "data:image/a;base64,AA !"):
        case.check("/v1/embeddings", {"input": ["one", text]}, ["one", text])
    text = "data:image/a;base64,AA"
    case.check("/v1/embeddings", {"input": ["one", text], "modality": "text"}, ["one", text])


def test_the_url_of_a_picture_is_text_to_a_model_of_texts(client: TestClient, tokenizer: Any) -> None:
    text = "data:image/a;base64,AA"
    body = {"input": ["one", text, f"one {text}"]}
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    lengths = [len(ids) for ids in tokenizer(body["input"])["input_ids"]]
    assert answer.json()["usage"]["prompt_tokens"] == sum(lengths)
    for entry, ids in zip(answer.json()["data"], tokenizer(body["input"])["input_ids"], strict=True):
        assert floats(entry["embedding"]) == expected(ids)


@pytest.mark.parametrize("path", ["/v1/ranking", "/nim/v1/ranking"])
def test_nim_ranking(case: Case, path: str) -> None:
    passages: list[dict[str, Any]] = [{"image": url(A)}, {"text": "one"}, {"image": url(B)}]
    documents: list[Any] = [A, "one", B]
    if case.joins:
        passages.append({"text": TEXT, "image": url(A)})
        documents.append({"text": TEXT, "image": A})
    answer = case.client.post(path, json={"query": {"text": TEXT}, "passages": passages})
    assert answer.status_code == 200, answer.text
    (query, *vectors) = [np.array(o.outputs.embedding) for o in case.llm.embed([TEXT, *documents], use_tqdm=False)]
    expected = [float(query @ vector) for vector in vectors]
    rankings = answer.json()["rankings"]
    assert [entry["index"] for entry in rankings] == np.argsort(-np.array(expected)).tolist()
    for entry in rankings:
        assert abs(entry["logit"] - expected[entry["index"]]) < TOLERANCE
    ranked = case.client.post("/rerank", json={"query": TEXT, "documents": passages}).json()["results"]
    assert [entry["index"] for entry in ranked] == [entry["index"] for entry in rankings]
    shown = {entry["index"]: entry["document"] for entry in ranked}
    assert shown[0] == {"text": None, "multi_modal": passages[0]}


@pytest.mark.parametrize("kind", ["image_base64", "image_url"])
def test_voyage(case: Case, kind: str) -> None:
    inputs = [{"content": [{"type": kind, kind: url(A)}]}, {"content": [{"type": "text", "text": TEXT}]}]
    answer = case.check("/v1/multimodalembeddings", {"inputs": inputs, "model": None}, [A, TEXT])
    (picture, text) = case.llm.embed([A, TEXT], use_tqdm=False)
    usage = answer["usage"]
    assert (usage["image_pixels"], usage["video_pixels"]) == (90 * 130, 0)
    assert usage["total_tokens"] == len(picture.prompt_token_ids) + len(text.prompt_token_ids)
    assert usage["text_tokens"] >= len(text.prompt_token_ids)
    assert usage["text_tokens"] < usage["total_tokens"]


def test_voyage_joins_parts_and_types(case: Case) -> None:
    parts = [{"type": "text", "text": TEXT}, {"type": "image_url", "image_url": url(A)}]
    body = {"inputs": [{"content": parts}], "output_dtype": "float", "encoding_format": "base64"}
    answer = case.client.post("/v1/multimodalembeddings", json=body)
    if not case.joins:
        assert answer.json() == {"detail": answer.json()["detail"]}
        assert "cannot be embedded together" in answer.json()["detail"]
        return
    vector = np.frombuffer(base64.b64decode(answer.json()["data"][0]["embedding"]), "<f4")
    (output,) = case.llm.embed([{"text": TEXT, "image": A}], use_tqdm=False)
    assert np.abs(vector - np.array(output.outputs.embedding)).max() < TOLERANCE


@pytest.mark.parametrize("kind", ["video_url", "video_base64", "audio"])
def test_voyage_refuses_other_media_by_name(case: Case, kind: str) -> None:
    body = {"inputs": [{"content": [{"type": kind, kind: "data:,"}]}]}
    answer = case.client.post("/v1/multimodalembeddings", json=body)
    assert (answer.status_code, repr(kind) in answer.json()["detail"]) == (400, True)


def test_bad_pictures_are_refused(case: Case) -> None:
    for image in ("not base64!", "file:///etc/passwd", "http://127.0.0.1/a.png", base(A)[:40]):
        assert case.client.post("/v1/embeddings", json={"input": [{"image": image}]}).status_code == 400, image
    assert "got an input with the keys" in error(case.client, {"input": [{"image": 5}]})["message"]
