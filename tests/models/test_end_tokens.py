"""Heads that rate the state of an end token (BART's family): any mixture of inputs, and an input without one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from cenote import LLM, PoolingParams
from cenote.errors import BadRequest
from tests import checkpoints
from tests.checkpoints import classifier, sentinels

if TYPE_CHECKING:
    from pathlib import Path

LOGITS = PoolingParams(use_activation=False)
SMALL = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
INPUTS: list[Any] = ["one two", ("one two", "three"), "the </s> name", "a </s></s> b", ("a", "b"), "seven"]


@pytest.fixture(scope="module", params=["Bart", "MBart", "PLBart", "Mvp"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    tokenizer = sentinels()
    end = tokenizer.eos_token_id
    options = {**SMALL, "decoder_start_token_id": end, "forced_eos_token_id": end}
    classifier(folder, request.param, tokenizer=tokenizer, **options)
    with LLM(str(folder)) as llm:
        yield llm, folder


def reference(folder: Path, prompt: Any) -> np.ndarray:
    """Logits by the whole model, one input at a time."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = checkpoints.pretrained(transformers.AutoModelForSequenceClassification, folder)
    texts = prompt if isinstance(prompt, tuple) else (prompt,)
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.tensor([tokenizer(*texts)["input_ids"]])).logits[0].numpy()
    return logits


def test_inputs_with_different_numbers_of_end_tokens_share_a_batch(served: Any) -> None:
    llm, folder = served
    outputs = llm.classify(INPUTS, pooling_params=LOGITS, use_tqdm=False)
    for prompt, output in zip(INPUTS, outputs, strict=True):
        assert np.abs(np.array(output.outputs.probs) - reference(folder, prompt)).max() < 1e-5, prompt


WITHOUT: list[tuple[Any, dict[str, Any]]] = [
    ("one two three", {"add_special_tokens": False}),
    ("one two three four five", {"truncate_prompt_tokens": 3, "truncation_side": "right"}),
    ([5, 6, 7], {}),
]


@pytest.mark.parametrize(("prompt", "options"), WITHOUT, ids=["no special tokens", "cut", "ids"])
def test_an_input_without_an_end_token_is_refused(served: Any, prompt: Any, options: dict[str, Any]) -> None:
    llm, _ = served
    with pytest.raises(BadRequest, match="without the end token"):
        llm.classify(prompt, tokenization_kwargs=options, use_tqdm=False)


def test_neighbours_of_a_refused_input_are_answered(served: Any) -> None:
    llm, folder = served
    expected = {text: reference(folder, text) for text in ("one two", "seven")}

    def ask(i: int) -> Any:
        prompt: Any = [5, 6, 7 + i] if i % 3 == 0 else ("one two", "seven")[i % 2]
        try:
            (output,) = llm.classify(prompt, pooling_params=LOGITS, use_tqdm=False)
        except BadRequest:
            return i % 3 == 0
        return np.abs(np.array(output.outputs.probs) - expected[prompt]).max() < 1e-5

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(48)))


def test_other_heads_need_no_end_token(tmp_path: Path) -> None:
    with LLM(str(classifier(tmp_path / "model", num_labels=2))) as llm:
        (output,) = llm.classify([[5, 6, 7]], use_tqdm=False)
    assert len(output.outputs.probs) == 2
