"""Heads over Qwen-VL models: classes and yes or no of prompts with pictures, by Transformers' own hidden states."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cenote import LLM
from tests import pictured
from tests.pictured import PICTURE, noise

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

A, B = noise(90, 130), noise(90, 130, seed=1)
INPUTS: list[tuple[str, list[Any]]] = [
    ("what is in this page", []),
    (f"{PICTURE}describe the image", [A]),
    (f"{PICTURE}describe the image", [B]),
    (f"q {PICTURE} and {PICTURE}", [A, noise(300, 60)]),
    (f"{PICTURE}{PICTURE} twice", [A, A]),
]
TOLERANCE = 2e-5
"""Largest difference of probabilities."""
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
CLASSIFIERS = {"qwen2_5_vl": "Qwen2_5_VLForSequenceClassification", "qwen3_vl": "Qwen3VLForSequenceClassification"}
NAME = "Qwen3-VL-Reranker-2B"
SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
END = "<|im_end|>\n<|im_start|>assistant\n"


def pair(query: str, document: str, instruction: str = "") -> str:
    """The prompt of Qwen3-VL-Reranker's published code."""
    instruction = instruction or "Given a search query, retrieve relevant candidates that answer the query."
    return f"{SYSTEM}<Instruct>: {instruction}<Query>:{query}\n<Document>:{document}{END}"


def prompt(text: str, images: list[Any]) -> Any:
    return {"prompt": text, "multi_modal_data": {"image": images}} if images else text


class Reference:
    """Transformers' own model and processor."""

    def __init__(self, folder: Path, kind: str) -> None:
        made = pictured.processor_class(PROCESSORS[kind])
        self.processor = made.from_pretrained(folder, backend="pil", trust_remote_code=False)
        model: Any = getattr(transformers, pictured.GENERATORS[kind])
        self.model = model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def last(self, text: str, images: list[Any]) -> Tensor:
        """The last hidden state of the last token."""
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        with torch.inference_mode():
            return self.model.model(**inputs, use_cache=False)[0][0, -1]

    def yes(self, text: str, images: list[Any]) -> float:
        """The probability of "yes" against "no"."""
        no, yes = (self.processor.tokenizer.get_vocab()[word] for word in ("no", "yes"))
        with torch.inference_mode():
            return float(self.model.lm_head(self.last(text, images))[[no, yes]].softmax(0)[1])


@pytest.mark.parametrize("kind", [*CLASSIFIERS])
def test_classes_of_prompts_with_pictures(tmp_path: Path, kind: str) -> None:
    folder = pictured.qwen_vl(tmp_path / kind, kind)
    reference = Reference(folder, kind)
    score = 0.2 * torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "score.weight": score}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    pictured.write(folder, "config.json", {**config, **labels, "architectures": [CLASSIFIERS[kind]]})
    expected = [(score @ reference.last(*one)).softmax(0).numpy() for one in INPUTS]
    with LLM(str(folder)) as llm:
        assert llm.info.report.layout == "packed"
        assert llm.info.labels == ("a", "b", "c")
        outputs = llm.classify([prompt(*one) for one in INPUTS], use_tqdm=False)
    for output, one in zip(outputs, expected, strict=True):
        assert np.abs(np.array(output.outputs.probs) - one).max() < TOLERANCE
    assert np.abs(expected[1] - expected[2]).max() > 1e-2, "another picture, other classes"


VLLM = {
    "architectures": ["Qwen3VLForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}


@pytest.mark.parametrize(("name", "options"), [(NAME, {}), ("mine", {"hf_overrides": VLLM})])
def test_a_reranker_by_its_name_or_as_vllm_is_told(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    folder = pictured.qwen_vl(tmp_path / name, "qwen3_vl")
    reference = Reference(folder, "qwen3_vl")
    inputs = [(pair("revenue", "a page"), []), *((pair("revenue", PICTURE), [image]) for image in (A, B))]
    expected = [reference.yes(*one) for one in inputs]
    with LLM(str(folder), **options) as llm:
        assert llm.info.report.layout == "packed"
        assert "difference of logits of 'no', 'yes'" in llm.info.report.head
        outputs = llm.classify([prompt(*one) for one in inputs], use_tqdm=False)
        found = [output.outputs.probs[0] for output in outputs]
        scores = [output.outputs.score for output in llm.score("revenue", ["a page"], use_tqdm=False)]
    assert np.abs(np.array(found) - expected).max() < TOLERANCE
    assert abs(expected[1] - expected[2]) > 1e-3, "another picture, another score"
    if name == NAME:
        assert scores == [pytest.approx(expected[0], abs=TOLERANCE)]
