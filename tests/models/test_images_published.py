"""Embedders over Qwen-VL that are known by their names: their scripts' prompts, of texts as well, by Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from cenote import LLM
from cenote.errors import TooLong
from tests import pictured
from tests.models.families.test_images_qwen_vl import Reference, unit
from tests.pictured import PICTURE, noise

if TYPE_CHECKING:
    from pathlib import Path

A, B = noise(90, 130), noise(90, 130, seed=1)
BLANK = Image.new("RGB", (56, 56))
TOLERANCE = 2e-5


class Row(NamedTuple):
    """A model, and the parts of its script's prompt.

    Attributes:
        kind: of its checkpoint.
        system: its own system message.
        end: of the prompt.
    """

    kind: str
    system: str
    end: str = ""

    def prompt(self, content: str, system: str = "") -> str:
        message = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{self.end}"
        return f"<|im_start|>system\n{system or self.system}<|im_end|>\n{message}"


ASSISTANT = "You are a helpful assistant."
ROWS = {
    "gme-Qwen2-VL-2B-Instruct": Row("qwen2_vl", ASSISTANT, "<|endoftext|>"),
    "Qwen3-VL-Embedding-2B": Row("qwen3_vl", "Represent the user's input."),
    "dse-qwen2-2b-mrl-v1": Row("qwen2_vl", ASSISTANT, "<|endoftext|>"),
}
INPUTS: list[tuple[Any, str, list[Any]]] = [
    ("what is it", "what is it", []),
    ({"text": "what is it", "image": A}, f"{PICTURE}what is it", [A]),
    ({"image": A, "text": "what is it"}, f"{PICTURE}what is it", [A]),
    ({"image": B, "text": "what is it"}, f"{PICTURE}what is it", [B]),
    ({"image": [A, B]}, f"{PICTURE}{PICTURE}", [A, B]),
    (A, PICTURE, [A]),
]
"""Inputs, and the user's messages of GME and Qwen3-VL-Embedding with their pictures."""


@pytest.mark.parametrize("name", [name for name in ROWS if "dse" not in name])
def test_prompts_of_texts_and_pictures(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    folder = str(pictured.qwen_vl(tmp_path / name, row.kind))
    reference = Reference(folder, row.kind)
    expected = [unit(reference.rows(row.prompt(content), images)[-1]) for _, content, images in INPUTS]
    with LLM(folder) as llm:
        outputs = llm.embed([one for one, *_ in INPUTS], use_tqdm=False)
        (rendered,) = llm.embed([row.prompt("what is it")], use_tqdm=False)
        instructed = llm.embed(["what is it", A], prompt="Find the page", use_tqdm=False)
        scores = [output.outputs.score for output in llm.score("what is it", [A, B], use_tqdm=False)]
    for output, one in zip(outputs, expected, strict=True):
        assert np.abs(np.array(output.outputs.embedding) - one).max() < TOLERANCE
    assert np.abs(expected[2] - expected[3]).max() > 0.01, "another picture, another vector"
    assert list(rendered.prompt_token_ids) == list(outputs[0].prompt_token_ids), "rendered once"
    system = "Find the page." if row.kind == "qwen3_vl" else "Find the page"
    for output, (content, images) in zip(instructed, (("what is it", []), (PICTURE, [A])), strict=True):
        one = unit(reference.rows(row.prompt(content, system), images)[-1])
        assert np.abs(np.array(output.outputs.embedding) - one).max() < TOLERANCE
    other = unit(reference.rows(row.prompt(PICTURE), [B])[-1])
    assert scores == pytest.approx([float(expected[0] @ expected[5]), float(expected[0] @ other)], abs=1e-4)


def test_dse_reads_texts_beside_a_black_picture(tmp_path: Path) -> None:
    """As its model card does: queries and documents of text stand behind a black picture of 56 x 56 pixels."""
    name = "dse-qwen2-2b-mrl-v1"
    row = ROWS[name]
    folder = str(pictured.qwen_vl(tmp_path / name, row.kind))
    reference = Reference(folder, row.kind)

    def vector(content: str, image: Any) -> np.ndarray:
        return unit(reference.rows(row.prompt(f"{PICTURE}{content}"), [image])[-1])

    query, document = vector("Query: what is it", BLANK), vector("Document: what is it", BLANK)
    pages = [vector("What is shown in this image?", image) for image in (A, B)]
    with LLM(folder) as llm:
        inputs = ["what is it", "Query: what is it", {"text": "what is it"}, A, B, row.prompt("what is it")]
        vectors = [np.array(output.outputs.embedding) for output in llm.embed(inputs, use_tqdm=False)]
        scores = [output.outputs.score for output in llm.score("what is it", ["what is it", A, B], use_tqdm=False)]
        options = {"truncate_prompt_tokens": 40}
        (cut,) = llm.embed(["a page " * 30], use_tqdm=False, tokenization_kwargs=options)
        with pytest.raises(TooLong, match="would cut a picture|no room for its pictures"):
            llm.embed(["a page " * 30], use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": 25})
    for own in vectors[:3]:
        assert np.abs(own - query).max() < TOLERANCE
    for own, expected in zip(vectors[3:5], pages, strict=True):
        assert np.abs(own - expected).max() < TOLERANCE
    assert np.abs(vectors[5] - unit(reference.rows(row.prompt("what is it"), [])[-1])).max() < TOLERANCE
    end = reference.processor.tokenizer(f"<|im_end|>\n<|im_start|>assistant\n{row.end}")["input_ids"]
    assert len(cut.prompt_token_ids) == 40
    assert list(cut.prompt_token_ids)[-len(end) :] == end, "a text that is cut keeps the end of the template"
    assert scores == pytest.approx([float(query @ one) for one in (document, *pages)], abs=1e-4)
    assert abs(scores[1] - scores[2]) > 1e-3, "another picture, another score"
    assert np.abs(query - vectors[5]).max() > 0.01, "without the picture the vector is another one"
