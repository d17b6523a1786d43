"""Pictures to `LLM`, in each form and to each method: the values are those of the picture that Pillow has opened."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote import LLM
from tests import pictured
from tests.pictured import ERNIE_PICTURE, PICTURE, noise, saved, url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

A, B = noise(90, 130), noise(90, 130, seed=1)
TOLERANCE = 2e-6
"""Largest difference of the same value in another batch."""


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """One picture in every form, the first as Pillow opens it."""
    folder = tmp_path_factory.mktemp("forms")
    file, path = saved(A), folder / "a.png"
    path.write_bytes(file)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [
            url(file),
            path.as_uri(),
            f"http://127.0.0.1:{server.server_port}/a.png",
        ]
        yield [A, file, bytearray(file), path, *({"image": source} for source in (A, file, path, str(path), *urls))]
        server.shutdown()


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(str(pictured.qwen_vl(tmp_path_factory.mktemp("llm") / "qwen", "qwen3_vl"))) as llm:
        yield llm


def embedded(llm: LLM, prompts: list[Any]) -> list[Any]:
    return [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]


def encoded(llm: LLM, prompts: list[Any]) -> list[Any]:
    outputs = llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
    return [output.outputs.data.numpy() for output in outputs]


def scored(llm: LLM, prompts: list[Any]) -> list[Any]:
    return [output.outputs.score for output in llm.score("what is it", prompts, use_tqdm=False)]


def asked(llm: LLM, prompts: list[Any]) -> list[Any]:
    """Scores of one text for each picture as the query."""
    return [output.outputs.score for output in llm.score(prompts, ["a page"] * len(prompts), use_tqdm=False)]


def ranked(llm: LLM, prompts: list[Any]) -> list[Any]:
    documents = llm.rerank("what is it", prompts, use_tqdm=False)
    return [document.relevance_score for document in sorted(documents, key=lambda document: document.index)]


METHODS = (embedded, encoded, scored, asked, ranked)


@pytest.mark.parametrize("method", METHODS)
def test_forms_of_a_picture(llm: LLM, forms: list[Any], method: Callable[[LLM, list[Any]], list[Any]]) -> None:
    rendered = f"<|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n"
    of_vllm = [{"prompt": rendered, "multi_modal_data": {"image": image}} for image in (A, [A])]
    first, *others = map(np.asarray, method(llm, [*forms, *of_vllm, {"image": [A]}]))
    assert len(others) == len(forms) + 2
    for own in others:
        assert np.abs(own - first).max() < TOLERANCE
    (another,) = method(llm, [B])
    assert np.abs(np.asarray(another) - first).max() > 1000 * TOLERANCE, "another picture, another value"


def test_forms_of_a_picture_in_a_reward(tmp_path: Path, forms: list[Any]) -> None:
    """Of a model that is launched as FastDeploy's documentation has it."""
    folder = str(pictured.ernie_vl(tmp_path / "RM_v1008"))
    rendered = f"<|begin_of_sentence|>User: Picture 1:{ERNIE_PICTURE}\nAssistant: "
    with LLM(folder, runner="pooling", convert="embed") as llm:
        prompts = [*forms, {"prompt": rendered, "multi_modal_data": {"image": A}}, B]
        rewards = [float(output.outputs.data[0]) for output in llm.reward(prompts, use_tqdm=False)]
    assert np.ptp(rewards[:-1]) < 1e-4
    assert abs(rewards[0] - rewards[-1]) > 1e-2, "another picture, another reward"
