"""Qwen3.5 and ColQwen3.5, recurrences among attention: pictures and texts, by Transformers, one input at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from cenote import LLM
from cenote.errors import CheckpointError
from tests import pictured
from tests.pictured import PAGE, PICTURE, QUERY_SUFFIX, noise

if TYPE_CHECKING:
    from pathlib import Path

QUERIES = ["what is the revenue", "page " * 20]
PAGES = [noise(90, 130), noise(300, 60), noise(90, 130, seed=1)]
TOLERANCE = 2e-5
"""Largest difference of rows of length 1; measured: 1.8e-6."""


class Reference:
    """Transformers' own model and processor; tokens may attend both ways, as in colpali-engine."""

    def __init__(self, folder: Path, *, both_ways: bool = False) -> None:
        plain = pictured.qwen_vl(folder.parent / "plain", "qwen3_5")  # the same weights
        kind = pictured.processor_class("Qwen3VLProcessor")
        self.processor = kind.from_pretrained(plain, backend="pil", trust_remote_code=False)
        options: Any = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.model = transformers.Qwen3_5Model.from_pretrained(plain, **options).eval()
        if both_ways:
            self.model.config.text_config.is_causal = self.model.config.is_causal = False
            for layer in self.model.language_model.layers:
                if hasattr(layer, "self_attn"):
                    layer.self_attn.is_causal = False
        self.weights = load_file(folder / "model.safetensors")

    def hidden(self, text: str, images: list[Any]) -> torch.Tensor:
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        with torch.inference_mode():
            return self.model(**inputs, use_cache=False)[0][0]

    def rows(self, content: Any) -> np.ndarray:
        """The rows of a query or a page by colpali-engine's processor and model."""
        is_text = isinstance(content, str)
        text = f"{content}{QUERY_SUFFIX}" if is_text else f"{PAGE}<|im_end|><|endoftext|>"
        hidden = self.hidden(text, [] if is_text else [content])
        weight, bias = self.weights["custom_text_proj.weight"], self.weights["custom_text_proj.bias"]
        return torch.nn.functional.normalize(torch.nn.functional.linear(hidden, weight, bias), dim=-1).numpy()


@pytest.mark.parametrize("contract", ["causal", "bidirectional"])
def test_rows_of_colqwen3_5(tmp_path: Path, contract: str) -> None:
    """The first is what a config means that says nothing."""
    folder = pictured.colqwen3_5(tmp_path / "colqwen3_5", contract if contract == "bidirectional" else None)
    reference = Reference(folder, both_ways=contract == "bidirectional")
    expected = [reference.rows(content) for content in (*QUERIES, *PAGES)]
    with LLM(str(folder)) as llm:
        assert (llm.info.tasks[0], llm.info.score_types[0]) == ("token_embed", "late-interaction")
        outputs = llm.encode([*QUERIES, *PAGES], use_tqdm=False, pooling_task="token_embed")
        rows = [output.outputs.data.numpy() for output in outputs]
        scores = [output.outputs.score for output in llm.score(QUERIES[0], PAGES, use_tqdm=False)]
    for own, one in zip(rows, expected, strict=True):
        assert own.shape == one.shape
        assert np.abs(own - one).max() < TOLERANCE
    assert np.abs(expected[2] - expected[4]).max() > 0.1, "another picture, other rows"
    maxsim = [float((expected[0] @ page.T).max(1).sum()) for page in expected[2:]]
    assert scores == pytest.approx(maxsim, abs=5e-4)


def test_a_contract_that_is_not_understood(tmp_path: Path) -> None:
    folder = pictured.colqwen3_5(tmp_path / "colqwen3_5", "sideways")
    with pytest.raises(CheckpointError, match="retrieval_attention_contract is 'sideways'; expected one of causal"):
        LLM(str(folder))
    override = {
        "retrieval_attention_contract": "causal",
        "text_config": {"retrieval_attention_contract": "bidirectional"},
    }
    with pytest.raises(CheckpointError, match="the same in text_config"):
        LLM(str(folder), hf_overrides=override)


def test_vectors_of_qwen3_5(tmp_path: Path) -> None:
    """An embedder over Qwen3.5: the state of the last token."""
    folder = pictured.qwen_vl(tmp_path / "qwen3_5", "qwen3_5")
    reference = Reference(folder)
    inputs: list[tuple[str, list[Any]]] = [
        ("what is it", []),
        (f"{PICTURE}describe", [PAGES[0]]),
        (f"{PICTURE}describe", [PAGES[2]]),
        (f"q {PICTURE} and {PICTURE}", PAGES[:2]),
        (f"{PICTURE}{PICTURE} twice", [PAGES[0]] * 2),
    ]
    prompts = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in inputs]
    with LLM(str(folder)) as llm:
        outputs = llm.embed(prompts, use_tqdm=False)
    expected = [torch.nn.functional.normalize(reference.hidden(*one)[-1], dim=-1).numpy() for one in inputs]
    for output, one in zip(outputs, expected, strict=True):
        assert np.abs(np.array(output.outputs.embedding) - one).max() < TOLERANCE
    assert np.abs(expected[1] - expected[2]).max() > 0.01, "another picture, another vector"
