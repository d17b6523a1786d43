"""CLIP: texts and pictures to the vectors of Transformers and sentence-transformers, one input at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from cenote import LLM, PoolingParams
from cenote.errors import BadRequest
from tests import pictured
from tests.pictured import noise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RAW = PoolingParams(use_activation=False)
TEXTS = ["what is the revenue", "a", "the quick brown fox jumps", "page page page figure", "what is <|endoftext|> this"]
PICTURES = [noise(90, 130), noise(300, 60), noise(64, 64), noise(340, 440), noise(1, 3), noise(90, 130)]
TOLERANCE = 5e-6
"""Largest difference of vectors whose length is about 5; measured: 1e-6."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[np.ndarray]:
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.inference_mode():
        texts = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0] for text in TEXTS]
        processed = [processor(images=[picture], return_tensors="pt") for picture in PICTURES]
        pictures = [model.get_image_features(**one).pooler_output[0] for one in processed]
    return [vector.numpy() for vector in (*texts, *pictures)]


def vectors(llm: LLM, inputs: list[Any], **options: Any) -> list[np.ndarray]:
    outputs = llm.embed(inputs, use_tqdm=False, pooling_params=RAW, **options)
    return [np.array(output.outputs.embedding) for output in outputs]


def test_vectors_are_those_of_transformers_in_a_mixed_batch(llm: LLM, expected: list[np.ndarray]) -> None:
    assert llm.info.report.layout == "packed"
    assert (llm.info.dimension, llm.info.tasks) == (24, ("embed",))
    inputs = [*TEXTS, *PICTURES]
    order = np.random.default_rng(0).permutation(len(inputs))
    rows = vectors(llm, [inputs[i] for i in order])
    for own, i in zip(rows, order, strict=True):
        assert np.abs(own - expected[i]).max() < TOLERANCE, inputs[i]
    assert np.abs(expected[len(TEXTS)] - expected[len(TEXTS) + 1]).max() > 0.1, "another picture, another vector"


def test_a_picture_counts_the_tokens_of_its_tower(llm: LLM) -> None:
    (output,) = llm.embed([PICTURES[0]], use_tqdm=False)
    assert len(output.prompt_token_ids) == pictured.CLIP_TOKENS
    assert np.linalg.norm(output.outputs.embedding) == pytest.approx(1, abs=1e-5)


def test_the_end_of_a_text_that_is_cut_stays(llm: LLM, folder: Path) -> None:
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the quick brown fox jumps over the lazy dog " * 4
    with torch.inference_mode():
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        reference = model.get_text_features(**inputs).pooler_output[0].numpy()
    (own,) = vectors(llm, [text], tokenization_kwargs={"truncate_prompt_tokens": -1})
    assert np.abs(own - reference).max() < TOLERANCE


def test_text_and_picture_together_are_refused(llm: LLM) -> None:
    with pytest.raises(BadRequest, match="cannot be embedded together"):
        llm.embed([{"text": "a page", "image": PICTURES[0]}], use_tqdm=False)
    with pytest.raises(BadRequest, match="cannot be embedded together"):
        llm.embed([{"prompt": "", "multi_modal_data": {"image": PICTURES[:2]}}], use_tqdm=False)
    (own,) = vectors(llm, [{"prompt": "", "multi_modal_data": {"image": PICTURES[0]}}])
    assert np.abs(own - vectors(llm, [PICTURES[0]])[0]).max() < TOLERANCE


def test_the_old_end_of_text_is_the_highest_id(folder: Path, tmp_path: Path) -> None:
    overrides = {"text_config": {"eos_token_id": 2}}
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.text_model.eos_token_id = 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with LLM(str(folder), hf_overrides=overrides) as llm, torch.inference_mode():
        for own, text in zip(vectors(llm, TEXTS), TEXTS, strict=True):
            reference = model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0].numpy()
            assert np.abs(own - reference).max() < TOLERANCE


def test_a_sentence_transformers_folder_gives_its_vectors(folder: Path, tmp_path: Path) -> None:
    reference = SentenceTransformer(str(folder), device="cpu")
    reference.save(str(tmp_path / "st"))
    inputs = [*TEXTS[:4], *PICTURES[:2], noise(90, 130, seed=1)]
    expected = [reference.encode([one])[0] for one in inputs]  # texts and pictures apart: it takes no mixed batch
    with LLM(str(tmp_path / "st")) as llm:
        outputs = llm.embed(inputs, use_tqdm=False)
    for output, one in zip(outputs, expected, strict=True):
        assert np.abs(np.array(output.outputs.embedding) - one).max() < TOLERANCE
    assert np.abs(expected[4] - expected[6]).max() > 0.1, "another picture, another vector"
