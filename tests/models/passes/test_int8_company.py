"""Answers of int8 models do not depend on the rest of the batch: rounding in 8 bits would make whole steps of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cenote.config import ModelConfig
from cenote.core import PoolingParams, Sequence
from cenote.models.layouts import Packed
from cenote.models.load import load
from cenote.models.model import PoolingModel
from cenote.tensors import native
from tests.checkpoints import ROUNDING, classifier
from tests.models.passes.test_narrow import named, narrowed

pytestmark = pytest.mark.full  # company of rows whose figures `make test` compares
if native.chosen("auto") == "none":
    pytest.skip("CENOTE_ISA switches the kernels off", allow_module_level=True)

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 160}
ROWS = PoolingParams(use_activation=False)
TOKENS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that rates pairs by their last token, whose heads are as wide as the native attention takes them."""
    return classifier(tmp_path_factory.mktemp("reranker"), "Qwen3", num_labels=1, head_dim=32, **SHAPE)


@pytest.fixture(scope="module")
def reranker(folder: Path) -> PoolingModel:
    model, _ = load(ModelConfig(model=str(folder), quantization="int8"))
    return model


def draw(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(5, TOKENS, length).tolist() for length in lengths]


def logit(model: PoolingModel, ids: list[int], neighbours: list[Sequence]) -> float:
    """The logit of `ids`, which run beside `neighbours`."""
    outputs = model.launch([Sequence(ids, task="classify", params=ROWS), *neighbours]).finish()
    return float(outputs[0].data.item())  # type: ignore[union-attr]


def test_a_reranker_in_int8_shares_prefixes_and_no_score_moves_by_more_than_rounding(
    reranker: PoolingModel, folder: Path
) -> None:
    """One step of 8 bits moved scores by 8e-3 when attention over a prefix rounded in another order.

    That is as much as quantising moves them in all, which the distance to the same model in float64 shows.
    """
    assert reranker.shares_prefixes
    reference = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").double().eval()
    query, *documents = draw(40, 3, 7, 7, 30, 61, 18)
    pairs = [[*query, *document] for document in documents]
    neighbours = [Sequence(ids, task="classify", params=ROWS) for ids in pairs]
    others = [Sequence(ids, task="classify", params=ROWS) for ids in draw(5, 90, 33)]
    whole = [Sequence(pairs[1], task="token_embed")]
    quantised = []
    for ids in pairs:
        alone = logit(reranker, ids, [])
        for company in (neighbours, neighbours[::-1], others, [*others, *neighbours], whole, [*whole, *neighbours]):
            # The head, in float32, rounds by the number of its rows
            assert abs(logit(reranker, ids, company) - alone) <= ROUNDING
        with torch.no_grad():
            exact = reference(input_ids=torch.tensor([ids])).logits.item()
        quantised.append(abs(alone - exact))
    assert 1e-4 < max(quantised) < 0.2, quantised


def test_sharing_goes_through_the_kernel_whose_bits_do_not_depend_on_it(reranker: PoolingModel) -> None:
    layout = reranker.layout
    assert isinstance(layout, Packed)
    query, *ends = draw(40, 3, 7)
    reranker.launch([Sequence([*query, *end], task="classify") for end in ends]).finish()
    assert layout.is_fused


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_attention_that_rounds_in_another_order_shares_nothing_in_int8(name: str) -> None:
    """Softcaps and sinks run by torch, whose sums over a prefix and the rest differ from those over the whole."""
    exact, _ = narrowed(named(name), dtype=torch.bfloat16)
    layout, _ = narrowed(named(name), int8=True)
    assert isinstance(exact, Packed)
    assert isinstance(layout, Packed)
    assert (exact.shares_prefixes, sorted(exact.places)) == (True, ["last"])
    assert (layout.shares_prefixes, sorted(layout.places)) == (False, [])
