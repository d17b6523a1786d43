"""Tokens of prompts with pictures: `/tokenize`, and the arguments by which a request may have more of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import ServerConfig
from cenote.errors import ConfigError
from cenote.pipeline.media import Picture
from cenote.pipeline.pictures import PictureRenderer
from cenote.server.app import build
from tests import pictured
from tests.conftest import error
from tests.pictured import PICTURE, noise, saved, url

if TYPE_CHECKING:
    from collections.abc import Iterator

A, LARGE = noise(90, 130), noise(600, 400)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    llm = LLM(str(pictured.qwen_vl(tmp_path_factory.mktemp("tokens") / "qwen", "qwen3_vl")), max_model_len=400)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    llm = LLM(str(pictured.clip(tmp_path_factory.mktemp("tokens") / "clip")))
    yield llm
    llm.close()


def served(llm: LLM, **options: Any) -> TestClient:
    return TestClient(build([llm._service], ServerConfig(**options)), raise_server_exceptions=False)


def shown(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": url(saved(part))}


def messages(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*map(shown, parts)]}]}


def test_tokenize_counts_what_an_embedding_is_billed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    client = served(llm)
    body = {**messages(A, "what is it", LARGE), "add_generation_prompt": False}
    usage = client.post("/v1/embeddings", json=body).json()["usage"]
    monkeypatch.setattr(Picture, "decoded", lambda self: pytest.fail("a header is enough"))
    answer = client.post("/tokenize", json={**body, "return_token_strs": True}).json()
    text = f"<|im_start|>user\n{PICTURE}what is it{PICTURE}<|im_end|>\n"
    (expected,) = llm._service.renderer.tokenize_all([text], add_special_tokens=False)
    placeholder = llm.get_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    run = [[placeholder] * 12, [placeholder] * 54]
    first, second = (i for i, token in enumerate(expected) if token == placeholder)
    expected = [*expected[:first], *run[0], *expected[first + 1 : second], *run[1], *expected[second + 1 :]]
    assert answer["tokens"] == expected
    assert answer["count"] == usage["prompt_tokens"] == len(expected)
    assert answer["token_strs"].count("<|image_pad|>") == 66


def test_a_prompt_that_is_too_long_is_refused_by_its_headers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pictures of 54 tokens, of at most 400: nothing of them is decoded."""
    monkeypatch.setattr(Picture, "decoded", lambda self: pytest.fail("a header is enough"))
    found = error(served(llm), messages(*[LARGE] * 8))
    assert (found["code"], found["param"]) == (400, "input_tokens")
    assert "maximum context length is 400 tokens" in found["message"]


def test_tokenize_takes_arguments_of_the_image_processor(llm: LLM) -> None:
    client = served(llm)
    whole = client.post("/tokenize", json=messages(LARGE)).json()["count"]
    small = client.post("/tokenize", json={**messages(LARGE), "mm_processor_kwargs": {"max_pixels": 9 * 1024}}).json()
    assert whole - small["count"] >= 54 - 9
    wrong = {**messages(LARGE), "mm_processor_kwargs": {"patch_size": 7}}
    assert error(client, wrong, "/tokenize")["param"] == "mm_processor_kwargs"
    assert error(client, messages(A, PICTURE, PICTURE, "x"), "/tokenize")["code"] == 400


def test_tokenize_of_a_picture_that_is_an_input_of_its_own(clip: LLM) -> None:
    answer = served(clip).post("/tokenize", json=messages(A)).json()
    assert answer["count"] == len(answer["tokens"]) == pictured.CLIP_TOKENS


def test_requests_enlarge_pictures_where_the_server_trusts_them(llm: LLM) -> None:
    body = {**messages(LARGE), "encoding_format": "float", "mm_processor_kwargs": {"max_pixels": 300 * 1024}}
    found = error(served(llm), body)
    assert (found["code"], found["param"]) == (400, "mm_processor_kwargs")
    assert "--trust-request-mm-kwargs" in found["message"]
    trusting = served(llm, trust_request_mm_kwargs=True)
    answer = trusting.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > 200
    small = trusting.post("/v1/embeddings", json={**body, "mm_processor_kwargs": {}}).json()
    assert small["usage"]["prompt_tokens"] < 80
    assert answer.json()["data"][0]["embedding"] != pytest.approx(small["data"][0]["embedding"], abs=1e-3)
    edges = {"shortest_edge": 500 * 1024, "longest_edge": 600 * 1024}
    refused = {"more than 50000000": {"min_pixels": 1 << 40}, "maximum": {"size": edges}}
    for expected, kwargs in refused.items():
        found = error(trusting, {**body, "mm_processor_kwargs": kwargs})
        assert (found["code"], expected in found["message"]) == (400, True), found["message"]
    assert error(served(llm), body)["code"] == 400, "the next server of the model does not"


def tokens_of(llm: LLM, **fields: Any) -> int:
    """Tokens of a prompt with a large picture, served."""
    answer = served(llm).post("/v1/embeddings", json={**messages(LARGE), **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens"]  # type: ignore[no-any-return]


def test_the_server_s_arguments_make_pictures_smaller_or_larger(llm: LLM) -> None:
    """`--mm-processor-kwargs`: bounds of the model, which requests may lower."""
    folder = llm._service.facts.tokenizer.path  # type: ignore[union-attr]
    large = '{"size": {"longest_edge": 307200}}'
    with LLM(folder, max_model_len=400, mm_processor_kwargs=large) as growing:
        assert tokens_of(growing) > 200
        assert tokens_of(growing, mm_processor_kwargs={"max_pixels": 9216}) <= tokens_of(llm) - (54 - 9)
        body = {**messages(LARGE), "mm_processor_kwargs": {"max_pixels": 307201}}
        assert "no more than 4096 and 307200" in error(served(growing), body)["message"]

    def renderer(kwargs: dict[str, Any]) -> PictureRenderer:
        own = llm._service.renderer.pictures
        assert own is not None
        return replace(own, pictures=replace(own.pictures, kwargs=kwargs))

    shrinking = renderer({"max_pixels": 9216})
    picture = Picture(b"", *LARGE.size)
    assert len(shrinking.placed([shrinking.pictures.placeholder], [picture], {}).ids) <= 9
    for wrong, expected in (({"fps": 1}, "has 'fps'; this model takes"), ({"max_pixels": 0}, "a positive integer")):
        with pytest.raises(ConfigError, match=expected):
            renderer(wrong)


def test_small_files_of_large_pictures_are_bounded(llm: LLM) -> None:
    """Four pictures of 64 tokens, and one of them again, each of 256 patches of 1,536 numbers."""
    files = [saved(Image.new("RGB", (256, 256), colour)) for colour in ("red", "green", "blue", "white")]
    inputs = {"images": [url(file) for file in (*files, files[0])]}
    size = 256 * 1536 * 4
    answer = served(llm, max_picture_bytes=4 * size).post("/v2/embed", json=inputs)
    assert answer.status_code == 200, answer.text
    found = error(served(llm, max_picture_bytes=4 * size - 1), inputs, "/v2/embed")
    assert (found["code"], found["param"]) == (400, "image")
    assert f"at least {4 * size} bytes" in found["message"]
