"""SigLIP and SigLIP 2: texts and pictures to the vectors of Transformers, one input at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from cenote import LLM, PoolingParams
from cenote.errors import BadRequest
from tests import pictured
from tests.pictured import SIGLIP_LENGTH, noise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RAW = PoolingParams(use_activation=False)
TEXTS = ["what is the revenue", "a", "The quick brown FOX jumps", "page page page figure"]
PICTURES = [noise(90, 130), noise(300, 60), noise(64, 64), noise(340, 440), noise(1, 3), noise(90, 130)]
TOLERANCE = 5e-6
"""Largest difference of vectors whose length is about 7; measured: 1e-6."""


class Case:
    """A checkpoint, loaded here and by Transformers."""

    def __init__(self, folder: Path) -> None:
        self.llm = LLM(str(folder))
        self.model = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.processor: Any = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")

    def text(self, text: str, padding: Any = "max_length") -> np.ndarray:
        inputs = self.tokenizer(text, padding=padding, max_length=SIGLIP_LENGTH, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            return self.model.get_text_features(input_ids=inputs["input_ids"]).pooler_output[0].numpy()

    def picture(self, picture: Any) -> np.ndarray:
        with torch.inference_mode():
            inputs = self.processor(images=[picture], return_tensors="pt")
            return self.model.get_image_features(**inputs).pooler_output[0].numpy()

    def vectors(self, inputs: list[Any], **options: Any) -> list[np.ndarray]:
        outputs = self.llm.embed(inputs, use_tqdm=False, pooling_params=RAW, **options)
        return [np.array(output.outputs.embedding) for output in outputs]


@pytest.fixture(scope="module", params=["siglip", "siglip2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = Case(pictured.siglip(tmp_path_factory.mktemp("siglip") / request.param, request.param))
    yield made
    made.llm.close()


def test_vectors_are_those_of_transformers_in_a_mixed_batch(case: Case) -> None:
    assert case.llm.info.report.layout == "packed"
    assert (case.llm.info.dimension, case.llm.info.tasks) == (64, ("embed",))
    expected = [*map(case.text, TEXTS), *map(case.picture, PICTURES)]
    inputs = [*TEXTS, *PICTURES]
    order = np.random.default_rng(0).permutation(len(inputs))
    for own, i in zip(case.vectors([inputs[i] for i in order]), order, strict=True):
        assert np.abs(own - expected[i]).max() < TOLERANCE, inputs[i]
    first = len(TEXTS)
    assert np.abs(expected[first] - expected[first + 1]).max() > 0.1, "another picture, another vector"
    assert np.abs(expected[0] - case.text(TEXTS[0], padding=False)).max() > 0.1, "texts that are not filled up differ"


def test_a_text_has_the_tokens_of_the_training_however_it_is_sent(case: Case) -> None:
    ids = case.tokenizer(TEXTS[0])["input_ids"]
    outputs = case.llm.embed([TEXTS[0], {"prompt_token_ids": ids}], use_tqdm=False, pooling_params=RAW)
    for output in outputs:
        assert list(output.prompt_token_ids) == ids + [case.tokenizer.pad_token_id] * (SIGLIP_LENGTH - len(ids))
        assert np.abs(np.array(output.outputs.embedding) - case.text(TEXTS[0])).max() < TOLERANCE


def test_a_text_that_is_cut_keeps_its_end(case: Case) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 4
    (own,) = case.vectors([text], tokenization_kwargs={"truncate_prompt_tokens": -1})
    assert np.abs(own - case.text(text)).max() < TOLERANCE


def test_text_and_picture_together_are_refused(case: Case) -> None:
    with pytest.raises(BadRequest, match="cannot be embedded together"):
        case.llm.embed([{"text": "a page", "image": PICTURES[0]}], use_tqdm=False)
