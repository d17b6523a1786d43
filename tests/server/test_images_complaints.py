"""Complaints of users of other servers about pictures, one test each.

Each names the reports that it stands for.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import ServerConfig
from cenote.errors import CheckpointError
from cenote.server.app import build
from tests import pictured
from tests.conftest import error
from tests.models.families.test_images_heads import NAME, pair
from tests.models.families.test_images_heads import Reference as Judge
from tests.models.families.test_images_qwen_vl import Reference
from tests.pictured import PICTURE, bomb, noise, saved, url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

A, B = noise(90, 130), noise(90, 130, seed=1)
TOLERANCE = 2e-5


def part(source: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source}}


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts]}], "encoding_format": "float", **fields}


def unit(vector: Any) -> np.ndarray:
    return np.asarray(vector) / np.linalg.norm(vector)


class Case:
    """A model from Python and served.

    Args:
        folder: of the checkpoint.
        options: of `LLM`.
        served: of the server.
    """

    def __init__(self, folder: Path, served: dict[str, Any] | None = None, **options: Any) -> None:
        self.llm = LLM(str(folder), **options)
        app = build([self.llm._service], ServerConfig(**served or {}))
        self.client = TestClient(app, raise_server_exceptions=False)

    def vector(self, *sources: str, **fields: Any) -> np.ndarray:
        """The vector of a message of pictures."""
        return self.answer(body(*map(part, sources), **fields))

    def answer(self, content: dict[str, Any]) -> np.ndarray:
        answer = self.client.post("/v1/embeddings", json=content)
        assert answer.status_code == 200, answer.text
        return np.array(answer.json()["data"][0]["embedding"])

    def refusal(self, source: str) -> dict[str, Any]:
        """The error of a picture, from a server that still answers with vectors."""
        found = error(self.client, body(part(source)))
        assert self.vector(url(saved(A))).shape == (64,)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.qwen_vl(tmp_path_factory.mktemp("complaints") / "qwen3_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(str(folder), "qwen3_vl")


@pytest.fixture(scope="module")
def case(folder: Path) -> Iterator[Case]:
    domains = {"allowed_media_domains": ("*",), "allow_private_media": True}
    case = Case(folder, domains, cache_size=16)
    yield case
    case.llm.close()


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1)])
def test_a_picture_of_one_pixel(case: Case, reference: Reference, size: tuple[int, int]) -> None:
    """It ended servers whose `/health` still said 200 (Infinity #609, #367)."""
    image = noise(*size)
    expected = reference.rows(f"<|im_start|>user\n{PICTURE}<|im_end|>\n", [image])[-1]
    assert np.abs(case.vector(url(saved(image))) - unit(expected)).max() < TOLERANCE
    assert case.client.get("/health").status_code == 200


def test_vectors_are_those_of_the_model_card(folder: Path, reference: Reference, tmp_path: Path) -> None:
    """Template, default instruction and resizing were others (vLLM #33167, #32069, #33419)."""
    named = tmp_path / "Qwen3-VL-Embedding-2B"
    named.symlink_to(folder)
    begin, end = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    large = noise(900, 700)
    by_default = begin.format("Represent the user's input.")
    with LLM(str(named)) as llm:
        outputs = llm.embed([{"image": large, "text": "a page"}, large], use_tqdm=False)
        outputs += llm.embed([{"image": large, "text": "a page"}], prompt="Find it.", use_tqdm=False)
    texts = [f"{by_default}{PICTURE}a page{end}", f"{by_default}{PICTURE}{end}"]
    texts.append(f"{begin.format('Find it.')}{PICTURE}a page{end}")
    for output, text in zip(outputs, texts, strict=True):
        expected = unit(reference.rows(text, [large])[-1])
        assert np.abs(output.outputs.embedding - expected).max() < TOLERANCE


def test_a_reranker_looks_at_the_picture_of_the_document(folder: Path, tmp_path: Path) -> None:
    """With pictures at another place of the prompt all scores were about 0.5 (vLLM #33885)."""
    named = tmp_path / NAME
    named.symlink_to(folder)
    judge = Judge(folder, "qwen3_vl")
    images = [noise(60 + 30 * i, 130, seed=i) for i in range(4)]
    text = pair("revenue", PICTURE)
    with LLM(str(named)) as llm:
        inputs = [{"prompt": text, "multi_modal_data": {"image": image}} for image in images]
        scores = [output.outputs.probs[0] for output in llm.classify(inputs, use_tqdm=False)]
    expected = [judge.yes(text, [image]) for image in images]
    assert np.abs(np.array(scores) - expected).max() < TOLERANCE
    elsewhere = [judge.yes(f"{PICTURE}{pair('revenue', '')}", [image]) for image in images]
    assert np.abs(np.array(expected) - elsewhere).min() > 100 * TOLERANCE, "the place matters"
    assert np.ptp(scores) > 1e-3


def test_one_bound_of_the_size_alone(tmp_path: Path) -> None:
    """`max_pixels` without the other bound was an error 500 for GME, and vectors were slightly others (vLLM #16406)."""
    case = Case(pictured.qwen_vl(tmp_path / "gme-Qwen2-VL-2B-Instruct", "qwen2_vl"))
    reference = Reference(str(tmp_path / "gme-Qwen2-VL-2B-Instruct"), "qwen2_vl")
    large = noise(400, 300)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    size = {"shortest_edge": 4 * 28**2, "longest_edge": 9 * 28**2}
    inputs = reference.processor(text=[text], images=[large], size=size, return_tensors="pt")
    with torch.inference_mode():
        expected = unit(reference.model(**inputs, use_cache=False)[0][0, -1])
    (output,) = case.llm.embed([{"image": large}], use_tqdm=False)
    assert np.abs(output.outputs.embedding - expected).max() > 100 * TOLERANCE
    prompt = {"prompt": text, "multi_modal_data": {"image": large}}
    for kwargs in ({"max_pixels": 9 * 28**2}, {"size": {"longest_edge": 9 * 28**2}}):
        (shrunk,) = case.llm.embed([{**prompt, "mm_processor_kwargs": kwargs}], use_tqdm=False)
        assert np.abs(shrunk.outputs.embedding - expected).max() < TOLERANCE
    content = body(part(url(saved(large))), mm_processor_kwargs={"max_pixels": 9 * 28**2})
    assert case.client.post("/v1/embeddings", json=content).status_code == 200
    case.llm.close()


@pytest.mark.parametrize("packing", [True, False])
def test_vectors_do_not_depend_on_the_batch(folder: Path, packing: bool) -> None:
    """They changed with its size: padding stood on the wrong side, or was attended to (colpali #274, #173)."""
    inputs: list[Any] = ["a question", A, {"image": [A, B], "text": "x"}, noise(300, 60), "a longer text " * 9, B]
    with LLM(str(folder), packing=packing) as llm:
        alone = [llm.embed([one], use_tqdm=False)[0].outputs.embedding for one in inputs]
        for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [4, 1] * 5, [2, 2, 2]):
            outputs = llm.embed([inputs[i] for i in order], use_tqdm=False)
            for i, output in zip(order, outputs, strict=True):
                assert np.abs(np.array(output.outputs.embedding) - alone[i]).max() < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"},
        {"image_processor_type": "Qwen2VLImageProcessorFast", "device": "cuda", "return_tensors": "pt"},
        {"image_processor_type": "Qwen2VLImageProcessorPil", "transformers_version": "99.0.0"},
    ],
)
def test_files_of_other_releases(folder: Path, case: Case, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A model was not loaded, as its files and the installed Transformers did not fit (Infinity #549)."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    processor = json.loads((copied / "preprocessor_config.json").read_text())
    pictured.write(copied, "preprocessor_config.json", processor | changes)
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    pictured.write(copied, "video_preprocessor_config.json", video)
    (expected,) = case.llm.embed([A], use_tqdm=False)
    with LLM(str(copied)) as llm:
        (output,) = llm.embed([A], use_tqdm=False)
    assert np.abs(np.array(output.outputs.embedding) - expected.outputs.embedding).max() < TOLERANCE


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's own
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_broken_exif(case: Case, form: str) -> None:
    """It was an error 500 (vLLM #56527)."""
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    broken = saved(A, form, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken", **options)
    assert np.abs(case.vector(url(broken)) - case.vector(url(saved(A, form, **options)))).max() < TOLERANCE


SECRETS = (
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]/",
    "http://[::ffff:169.254.169.254]/",
    "http://100.64.0.1/",
    "http://0.0.0.0/",
)


@pytest.mark.parametrize("source", [url(bomb(9400)), url(bomb(14000)), *SECRETS], ids=lambda source: source[:40])
def test_bombs_and_addresses_of_secrets(case: Case, source: str) -> None:
    """Pictures filled the memory (vLLM #47010, sglang #28588), and URLs named hosts inside (vLLM #57157, #57825).

    Here all hosts are allowed, and private ones as well.
    """
    assert case.refusal(source)["code"] == 400


def test_no_picture_is_answered_with_another_one(case: Case, reference: Reference) -> None:
    """Hashes left out size or mode, so that the cache had the answer of another picture (dynamo #8340, exo #2151)."""
    wide, high = Image.new("L", (160, 64), 90), Image.new("L", (64, 160), 90)
    assert wide.tobytes() == high.tobytes()
    grey, palette = Image.new("L", (64, 64), 7), Image.new("P", (64, 64), 7)
    palette.putpalette([200, 0, 0] * 256)
    assert grey.tobytes() == palette.tobytes()
    sources = [wide, high, grey, palette, *(noise(64, 64, seed) for seed in range(3))]
    for _ in range(2):  # the second time from the cache
        for image in sources:
            text = f"<|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n"
            expected = unit(reference.rows(text, [image.convert("RGB")])[-1])
            (output,) = case.llm.embed([image], use_tqdm=False)
            assert np.abs(output.outputs.embedding - expected).max() < TOLERANCE
    whole, small = case.vector(url(saved(A))), case.vector(url(saved(A)), mm_processor_kwargs={"image_size": 64})
    assert np.abs(whole - small).max() > 100 * TOLERANCE, "the same file at another size is another picture"


def test_fine_tunes_with_other_names_of_weights(folder: Path, case: Case, tmp_path: Path) -> None:
    """They were not loaded (vLLM #13373). `tests/pictured.py` writes the names of each family's first release."""
    (expected,) = case.llm.embed([A], use_tqdm=False)
    with LLM(str(with_names(folder, tmp_path / "copied", r"^model\.", ""))) as llm:
        (output,) = llm.embed([A], use_tqdm=False)
    assert np.abs(np.array(output.outputs.embedding) - expected.outputs.embedding).max() < TOLERANCE


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [("model.", "lacks weights"), ("base_model.model.", "PEFT puts it there"), ("vlm.", "lacks weights")],
)
def test_names_of_weights_that_are_nobody_s_are_told(folder: Path, tmp_path: Path, prefix: str, expected: str) -> None:
    """Such models do not load here either: the error names the weights, and none of them is random."""
    with pytest.raises(CheckpointError, match=expected):
        LLM(str(with_names(folder, tmp_path / "copied", "^", prefix)))


def with_names(folder: Path, copied: Path, pattern: str, words: str) -> Path:
    """A copy of a checkpoint whose weights have other names."""
    shutil.copytree(folder, copied)
    weights = load_file(folder / "model.safetensors")
    renamed = {re.sub(pattern, words, key): tensor for key, tensor in weights.items()}
    save_file(renamed, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def test_texts_and_pictures_in_one_request_to_two_towers(tmp_path: Path) -> None:
    """They were an error in one batch (sentence-transformers #3722), or pictures were not taken at all (TEI #333)."""
    case = Case(pictured.clip(tmp_path / "clip"))
    inputs = [{"content": [{"type": "text", "text": "a page"}]}, {"content": [part(url(saved(A)))]}]
    answer = case.client.post("/v2/embed", json={"inputs": inputs, "embedding_types": ["float"]})
    assert answer.status_code == 200, answer.text
    expected = [case.llm.embed([one], use_tqdm=False)[0].outputs.embedding for one in ("a page", A)]
    found = answer.json()["embeddings"]["float"]
    assert np.abs(np.array(found) - expected).max() < TOLERANCE
    case.llm.close()


def test_a_large_picture_is_as_large_as_the_checkpoint_says(case: Case) -> None:
    """16,384 tokens were reserved for each picture (vLLM #18550)."""
    answer = case.client.post("/v1/embeddings", json=body(part(url(saved(noise(2000, 1500))))))
    tokens = answer.json()["usage"]["prompt_tokens"]
    bare = case.client.post("/v1/embeddings", json=body({"type": "text", "text": ""})).json()["usage"]["prompt_tokens"]
    assert 40 < tokens - bare <= pictured.MOST_TOKENS + 2
