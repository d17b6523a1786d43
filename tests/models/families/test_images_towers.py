"""CLIP and SigLIP in folders of sentence-transformers, old and new: its vectors, one input at a time."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from cenote import LLM
from tests import checkpoints, pictured
from tests.pictured import SIGLIP_LENGTH, noise

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["what is the revenue", "a", "The quick brown FOX jumps"]
PICTURES = [noise(90, 130), noise(300, 60), noise(90, 130, seed=1)]
TOLERANCE = 1e-5
"""Largest difference of vectors whose length is about 5, or 1 where they are normalised."""


def assert_equal(folder: Path, inputs: list[Any]) -> list[np.ndarray]:
    """Assert that the vectors are those of sentence-transformers, which takes no batch of texts and pictures."""
    reference = SentenceTransformer(str(folder), device="cpu", processor_kwargs={"backend": "pil"})
    expected = [reference.encode([one])[0] for one in inputs]
    with LLM(str(folder)) as llm:
        assert llm.info.report.layout == "packed"
        outputs = llm.embed(inputs, use_tqdm=False)
    for output, one in zip(outputs, expected, strict=True):
        assert np.abs(np.array(output.outputs.embedding) - one).max() < TOLERANCE
    return expected


@pytest.mark.parametrize("modules", [["CLIPModel"], ["CLIPModel", "Normalize"]])
def test_the_layout_of_clip_vit_b_32(tmp_path: Path, modules: list[str]) -> None:
    """As sentence-transformers/clip-ViT-B-32 was published: a folder `0_CLIPModel` without a config of its own."""
    folder = tmp_path / "clip-ViT-B-32"
    folder.mkdir()
    pictured.clip(folder / "0_CLIPModel")
    paths = {"CLIPModel": "0_CLIPModel", "Normalize": "1_Normalize"}
    entries = [
        {"idx": index, "name": str(index), "path": paths[kind], "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(modules)
    ]
    pictured.write(folder, "modules.json", entries)
    versions = {"sentence_transformers": "2.0.0", "transformers": "4.7.0", "pytorch": "1.9.0+cu102"}
    pictured.write(folder, "config_sentence_transformers.json", {"__version__": versions})
    expected = assert_equal(folder, [*TEXTS, *PICTURES])
    assert np.abs(expected[3] - expected[5]).max() > 0.05, "another picture, another vector"
    is_unit = abs(np.linalg.norm(expected[0]) - 1) < 1e-3
    assert is_unit == ("Normalize" in modules)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip(tmp_path: Path, kind: str) -> None:
    """A folder whose texts are filled up as they were in training."""
    plain = pictured.siglip(tmp_path / kind, kind)
    if kind == "siglip2":  # the patches of the published checkpoints, which Transformers' processor takes for all
        checkpoints.edit_json(plain / "preprocessor_config.json", max_num_patches=256)
    saved = tmp_path / "saved"
    SentenceTransformer(str(plain), device="cpu", processor_kwargs={"backend": "pil"}).save_pretrained(str(saved))
    text = {"padding": "max_length", "max_length": SIGLIP_LENGTH}
    checkpoints.edit_json(saved / "sentence_bert_config.json", processing_kwargs={"text": text})
    expected = assert_equal(saved, [*TEXTS, *PICTURES])
    assert np.abs(expected[3] - expected[5]).max() > 0.05, "another picture, another vector"


def test_siglip_s_texts_are_filled_up_whatever_the_files_say(tmp_path: Path) -> None:
    """sentence-transformers fills a batch up to its longest text, so that vectors depend on the batch."""
    plain = pictured.siglip(tmp_path / "siglip", "siglip")
    saved = tmp_path / "saved"
    reference = SentenceTransformer(str(plain), device="cpu", processor_kwargs={"backend": "pil"})
    reference.save_pretrained(str(saved))
    in_batch = reference.encode(TEXTS)
    alone = np.array([reference.encode([text])[0] for text in TEXTS])
    assert np.abs(in_batch - alone).max() > 0.1
    with LLM(str(saved)) as llm, LLM(str(shutil.copytree(plain, tmp_path / "copy"))) as bare:
        rows = [[output.outputs.embedding for output in model.embed(TEXTS, use_tqdm=False)] for model in (llm, bare)]
    units = [np.array(one) / np.linalg.norm(one, axis=-1, keepdims=True) for one in rows]
    assert np.abs(units[0] - units[1]).max() < TOLERANCE
