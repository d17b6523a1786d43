"""Block-sparse attention: inputs of any length as a fresh model reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from cenote import LLM, PoolingParams
from tests import checkpoints
from tests.checkpoints import wordpiece

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RAW = PoolingParams(use_activation=False)


def ids_of(folder: Path, texts: list[str]) -> list[list[int]]:
    made = AutoTokenizer.from_pretrained(folder)
    return [made(text)["input_ids"] for text in texts]


def close(found: Any, expected: Any, scale: float) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification"])
def test_block_sparse_attention_stays_for_long_inputs(tmp_path: Path, kind: str) -> None:
    """BigBird: full attention up to 7 blocks, blocks beyond; a short input must not switch it for good."""
    made = wordpiece(model_max_length=512)
    options: dict[str, Any] = {"num_labels": 2} if kind != "Model" else {}
    folder = checkpoints.classifier(
        tmp_path,
        "BigBird",
        kind,
        tokenizer=made,
        max_position_embeddings=512,
        attention_type="block_sparse",
        block_size=16,
        num_random_blocks=1,
        **options,
    )
    texts = ["water stone " * 90, "a fox", "one two three " * 70, "the quick fox " * 70]
    auto: Callable[..., Any] = AutoModel if kind == "Model" else AutoModelForSequenceClassification
    expected, full = [], []
    for attention, rows in (("block_sparse", expected), ("original_full", full)):
        for ids in ids_of(folder, texts):
            model = auto.from_pretrained(folder, attention_type=attention).eval()  # type: ignore[attr-defined]
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([ids]))
            rows.append(nn.functional.normalize(output[0][0, 0], dim=-1) if kind == "Model" else output.logits[0])
    assert float((expected[0] - full[0]).abs().max()) > 1e-3
    with LLM(model=str(folder)) as llm:
        for _ in range(2):
            if kind == "Model":
                found = [output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)]
            else:
                found = [o.outputs.probs for o in llm.classify(texts, pooling_params=RAW, use_tqdm=False)]
            close(found, expected, scale=10.0)
