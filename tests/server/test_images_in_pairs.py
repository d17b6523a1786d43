"""Pictures among queries and documents, and in Cohere's requests: the values of `LLM.embed` and `LLM.encode`."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import ServerConfig
from cenote.errors import BadRequest
from cenote.server.app import build
from tests import checkpoints, pictured
from tests.conftest import error
from tests.pictured import noise, saved, url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

A, B, C = noise(90, 130), noise(64, 64), noise(60, 90)
RANKS = ("/rerank", "/v1/rerank", "/v2/rerank")
TOLERANCE = 2e-6
"""Largest difference of the same score in another batch."""


class Case(NamedTuple):
    """A model, from Python and served."""

    llm: LLM
    client: TestClient

    def vectors(self, prompts: list[Any], role: str, task: str = "") -> list[np.ndarray]:
        """Vectors of inputs, `[D]`, or `[T, D]` where the model compares tokens."""
        task = task or self.llm.info.vector_task
        outputs = self.llm.encode(prompts, pooling_task=task, use_tqdm=False, input_type=role)
        return [output.outputs.data.numpy().astype(np.float64) for output in outputs]

    def scores(self, query: Any, documents: list[Any]) -> np.ndarray:
        """Scores by their definition: the cosine, or the sum of the largest product of each row."""
        (left,) = self.vectors([query], "query")
        rows = self.vectors(documents, "document")
        if left.ndim == 1:
            return np.array([left @ right / np.linalg.norm(left) / np.linalg.norm(right) for right in rows])
        return np.array([(left @ right.T).max(axis=1).sum() for right in rows])


def opened(llm: LLM) -> Iterator[Case]:
    with TestClient(build([llm._service], ServerConfig()), raise_server_exceptions=False) as client:
        yield Case(llm, client)
    llm.close()


MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "one vector": (lambda folder: pictured.qwen_vl(folder, "qwen3_vl"), {}),
    "vectors of tokens": (
        lambda folder: pictured.qwen_vl(folder, "qwen2_5_vl"),
        {"pooler_config": {"task": "token_embed"}},
    ),
    "two towers": (pictured.clip, {}),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    write, options = MODELS[request.param]
    yield from opened(LLM(str(write(tmp_path_factory.mktemp("pairs") / "model")), **options))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from opened(LLM(str(checkpoints.bert(tmp_path_factory.mktemp("texts") / "bert"))))


def part(image: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(image)}}


def content(*parts: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": one} if isinstance(one, str) else part(one) for one in parts]}


DOCUMENTS = [A, "a page about foxes", B, C]
ON_THE_WIRE = [content(A), "a page about foxes", content(B), content(C)]


def test_scores_are_those_of_the_vectors(case: Case) -> None:
    for query in ("what is in this page", B):
        expected = case.scores(query, DOCUMENTS)
        outputs = case.llm.score(query, DOCUMENTS, use_tqdm=False)
        assert np.abs(np.array([output.outputs.score for output in outputs]) - expected).max() < TOLERANCE
        ranked = case.llm.rerank(query, DOCUMENTS, use_tqdm=False)
        assert [rank.index for rank in ranked] == np.argsort(-expected).tolist()
        assert ranked[0].document is DOCUMENTS[ranked[0].index]
    difference = np.abs(case.scores(A, [B]) - case.scores(A, [C])).max()
    assert difference > 10 * TOLERANCE, "another picture, another score"


def test_pairs_one_to_one(case: Case) -> None:
    outputs = case.llm.score([A, "a fox"], [B, C], use_tqdm=False)
    expected = [*case.scores(A, [B]), *case.scores("a fox", [C])]
    assert np.abs(np.array([output.outputs.score for output in outputs]) - expected).max() < TOLERANCE


def test_content_parts_from_python(case: Case) -> None:
    (output,) = case.llm.score("a fox", content(A), use_tqdm=False)
    assert abs(output.outputs.score - case.scores("a fox", [A])[0]) < TOLERANCE
    parts = {"content": [{"type": "image_pil", "image_pil": A}]}
    (output,) = case.llm.score(parts, "a fox", use_tqdm=False)
    assert abs(output.outputs.score - case.scores(A, ["a fox"])[0]) < TOLERANCE


@pytest.mark.parametrize("names", [("data_1", "data_2"), ("queries", "documents"), ("queries", "items")])
def test_score_over_http(case: Case, names: tuple[str, str]) -> None:
    for query, shown in (("a fox", "a fox"), (B, content(B))):
        answer = case.client.post("/score", json=dict(zip(names, (shown, ON_THE_WIRE), strict=True)))
        assert answer.status_code == 200, answer.text
        values = [entry["score"] for entry in answer.json()["data"]]
        assert np.abs(np.array(values) - case.scores(query, DOCUMENTS)).max() < TOLERANCE
    one = case.client.post("/score", json=dict(zip(names, ("a fox", content(A)), strict=True))).json()
    tokens = sum(len(output.prompt_token_ids) for output in case.llm.score("a fox", A, use_tqdm=False))
    assert one["usage"]["prompt_tokens"] == tokens


@pytest.mark.parametrize("path", RANKS)
def test_rerank_over_http(case: Case, path: str) -> None:
    expected = case.scores(B, DOCUMENTS)
    body = {"query": content(B), "documents": ON_THE_WIRE, "top_n": 3}
    answer = case.client.post(path, json=body | ({} if path != "/v2/rerank" else {"return_documents": True}))
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [result["index"] for result in results] == np.argsort(-expected)[:3].tolist()
    for result in results:
        assert abs(result["relevance_score"] - expected[result["index"]]) < TOLERANCE
        item = ON_THE_WIRE[result["index"]]
        parts = None if isinstance(item, str) else item["content"]
        shown = result["document"].get("multi_modal", result["document"].get("content"))
        assert shown == parts
        assert result["document"].get("text") == (item if isinstance(item, str) else None)


def test_text_and_pictures_in_one_document(case: Case) -> None:
    document = content("describe", A)
    if case.llm.info.architecture == "CLIPModel":
        found = error(case.client, {"data_1": "a fox", "data_2": document}, "/score")
        assert "cannot be embedded together" in found["message"]
        return
    (entry,) = case.client.post("/score", json={"data_1": "a fox", "data_2": document}).json()["data"]
    expected = case.scores("a fox", [{"text": "describe", "image": A}])
    assert abs(entry["score"] - expected[0]) < TOLERANCE


def test_cohere_images(case: Case) -> None:
    pages = case.vectors([A, B], "document", "embed")
    for path in ("/v2/embed", "/v1/embed"):
        body = {"input_type": "document", "embedding_types": ["float"]}
        answer = case.client.post(path, json={**body, "images": [url(A), url(B)]})
        assert answer.status_code == 200, answer.text
        got = np.array(answer.json()["embeddings"]["float"])
        assert np.abs(got - pages).max() < TOLERANCE
        tokens = sum(len(output.prompt_token_ids) for output in case.llm.encode([A, B], use_tqdm=False))
        assert answer.json()["meta"]["billed_units"] == {"input_tokens": 0, "image_tokens": tokens}
        mixed = case.client.post(path, json={**body, "inputs": [content(B), content("a fox"), content(A)]})
        (text,) = case.vectors([{"text": "a fox"}], "document", "embed")
        got = np.array(mixed.json()["embeddings"]["float"])
        assert np.abs(got - [pages[1], text, pages[0]]).max() < TOLERANCE
    if case.llm.info.architecture != "CLIPModel":
        inputs = [content("describe", A), content(B, "describe")]
        got = np.array(case.client.post("/v2/embed", json={**body, "inputs": inputs}).json()["embeddings"]["float"])
        (expected,) = case.vectors([{"text": "describe", "image": A}], "document", "embed")
        assert np.abs(got[0] - expected).max() < TOLERANCE
        assert np.abs(got[1] - expected).max() > 10 * TOLERANCE, "another order and another picture"


OTHERS = {
    "input_audio": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    "audio_url": {"type": "audio_url", "audio_url": {"url": "x"}},
    "image_embeds": {"type": "image_embeds", "image_embeds": "x"},
    "video_url": {"type": "video_url", "video_url": {"url": "x"}},
    "video_embeds": {"type": "video_embeds", "video_embeds": "x"},
    "audio_embeds": {"audio_embeds": "x"},
    "uuid": {**part(A), "uuid": "x"},
}


def bodies(wrong: dict[str, Any]) -> dict[str, Any]:
    """A body with a content part for each route that takes them."""
    item = {"content": [wrong]}
    ranking = {"query": "a fox", "documents": ["a", item]}
    return {
        "/score": {"data_1": item, "data_2": "a fox"},
        **dict.fromkeys(RANKS, ranking),
        "/v1/embeddings": {"messages": [{"role": "user", "content": [wrong]}]},
        "/pooling": {"messages": [{"role": "user", "content": [wrong]}]},
    }


@pytest.mark.parametrize("name", OTHERS)
def test_other_parts_are_refused_by_name(case: Case, name: str) -> None:
    for path, body in bodies(OTHERS[name]).items():
        found = error(case.client, body, path)
        assert found["code"] == 400
        assert name in found["message"], path
    found = error(case.client, {"inputs": [{"content": [OTHERS[name]]}]}, "/v2/embed")
    assert found["code"] == 400
    assert name in found["message"]


@pytest.mark.parametrize("name", ["image_url", *(name for name in OTHERS if name != "uuid")])
def test_a_text_model_says_its_name(text_model: Case, name: str) -> None:
    wrong = {**OTHERS, "image_url": part(A)}[name]
    for path, body in bodies(wrong).items():
        found = error(text_model.client, body, path)
        assert found["code"] == 400
        assert f"{text_model.llm.info.name} takes no images, only texts" in found["message"], path
        assert name in found["message"]


def test_a_text_model_says_its_name_in_cohere_s_form_and_from_python(text_model: Case) -> None:
    for body in ({"images": [url(A)]}, {"inputs": [content(A)]}):
        assert "takes no images, only texts" in error(text_model.client, body, "/v2/embed")["message"]
    for document in (A, content(A)):
        with pytest.raises(BadRequest, match="takes no images, only texts"):
            text_model.llm.score("a", document, use_tqdm=False)


def test_limits_of_tokens_are_for_texts(case: Case) -> None:
    with pytest.raises(BadRequest, match="cut texts alone"):
        case.llm.score("a", [A], use_tqdm=False, max_tokens_per_doc=5)
    with pytest.raises(BadRequest, match="got token ids"):
        case.llm.score([[1, 2]], ["a"], use_tqdm=False)


def test_urls_of_allowed_hosts_are_fetched(tmp_path: Path) -> None:
    """The options reach the renderer of the model; `tests/pipeline/test_fetching.py` has the rest."""
    llm = LLM(str(pictured.clip(tmp_path / "clip")))
    (tmp_path / "a.png").write_bytes(saved(A))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{files.server_port}"
        options = {"allowed_media_domains": (place,), "allow_private_media": True}
        wanted = {"images": [f"http://{place}/a.png"]}
        (expected,) = llm.embed([A], use_tqdm=False)
        with TestClient(build([llm._service], ServerConfig(**options))) as client:  # type: ignore[arg-type]
            answer = client.post("/v2/embed", json=wanted)
            missing = error(client, {"images": [f"http://{place}/b.png"]}, "/v2/embed")
        with TestClient(build([llm._service], ServerConfig())) as client:
            refused = error(client, wanted, "/v2/embed")
        with TestClient(build([llm._service], ServerConfig(allowed_media_domains=(place,)))) as client:
            private = error(client, wanted, "/v2/embed")
        files.shutdown()
    llm.close()
    assert np.abs(np.array(answer.json()["embeddings"]["float"]) - expected.outputs.embedding).max() < TOLERANCE
    assert (missing["code"], refused["code"], private["code"]) == (422, 400, 400)
    assert "--allowed-media-domains" in refused["message"]
    assert "--allow-private-media" in private["message"]
