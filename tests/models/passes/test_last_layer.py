"""The last layer runs for the tokens that are looked at alone, and never for fewer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cenote.config import ModelConfig, PoolerConfig
from cenote.core import Output, PoolingParams, Sequence
from cenote.models import load as loading
from cenote.models.layouts import forward
from cenote.models.model import PoolingModel
from cenote.models.passes.last_layer import LastLayer, find
from cenote.models.passes.table import prepared
from cenote.tensors.packing import pack
from material.zoo import ZOO, build
from tests.checkpoints import bert, classifier, decoder, pooling, write_modules

LENGTHS = (5, 1, 17, 5, 30)


def draw(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(5, 30, (n,), generator=generator).tolist() for n in lengths]


def load(folder: Path, pooling_type: str | None = None) -> PoolingModel:
    config = PoolerConfig(pooling_type=pooling_type) if pooling_type else PoolerConfig()
    return loading.load(ModelConfig(model=str(folder), pooler_config=config))[0]


def watch(model: PoolingModel) -> list[int]:
    """Gathers the number of rows for which the feed-forward part of the last layer runs."""
    seen: list[int] = []
    layer = find_last(model)
    part = layer.mlp if hasattr(layer, "mlp") else layer.output
    part.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    return seen


def find_last(model: PoolingModel) -> torch.nn.Module:
    lists = [x for x in model.layout.backbone.model.modules() if isinstance(x, torch.nn.ModuleList)]
    return next(x[-1] for x in lists if isinstance(vars(x[-1]).get("forward"), LastLayer))


def run(model: PoolingModel, *sequences: Sequence) -> list[np.ndarray]:
    outputs = model.launch(sequences).finish()
    assert all(isinstance(output, Output) for output in outputs), outputs
    return [output.data for output in outputs if isinstance(output, Output)]


@pytest.mark.parametrize(
    ("kind", "mode", "rows"),
    [("bert", "CLS", 5), ("bert", "LAST", 5), ("bert", "MEAN", 58), ("qwen3", "LAST", 5), ("qwen3", "CLS", 58)],
)
def test_vectors_are_those_of_the_whole_layer(kind: str, mode: str, rows: int, tmp_path: Path) -> None:
    folder = bert(tmp_path) if kind == "bert" else decoder(tmp_path, "Qwen3Model")
    model = load(folder, mode)
    sequences = [Sequence(ids) for ids in draw(*LENGTHS)]
    seen = watch(model)
    got = run(model, *sequences)
    assert seen == [rows]
    model.layout.places = frozenset()  # type: ignore[union-attr]
    wanted = run(model, *sequences)
    assert seen == [rows, sum(LENGTHS)]
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_one_request_for_all_tokens_makes_the_layer_whole(tmp_path: Path) -> None:
    model = load(bert(tmp_path), "CLS")
    ids = draw(*LENGTHS)
    alone = [run(model, Sequence(own))[0] for own in ids]
    tokens = run(model, Sequence(ids[2], task="token_embed"))[0]
    seen = watch(model)
    mixed = run(model, *(Sequence(own) for own in ids), Sequence(ids[2], task="token_embed"))
    assert seen == [sum(LENGTHS) + 17]
    for got, wanted in zip(mixed, [*alone, tokens], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_prompts_that_pooling_skips_make_the_layer_whole(tmp_path: Path) -> None:
    model = load(write_modules(bert(tmp_path), pooling("cls")))
    ids = draw(9, 12)
    seen = watch(model)
    skipped, plain = run(model, Sequence(ids[0], skip=3), Sequence(ids[1]))
    assert seen == [21]
    np.testing.assert_allclose(run(model, Sequence(ids[1]))[0], plain, atol=1e-6)
    assert seen == [21, 1]
    tokens = run(model, Sequence(ids[0], task="token_embed", params=PoolingParams(use_activation=False)))[0]
    np.testing.assert_allclose(skipped, tokens[3], atol=1e-6)


@pytest.mark.parametrize(("family", "rows"), [("Bert", 5), ("Qwen3", 5), ("ModernBert", 5)])
def test_classes_are_those_of_the_whole_layer(family: str, rows: int, tmp_path: Path) -> None:
    options = {"classifier_pooling": "cls"} if family == "ModernBert" else {}
    model = load(classifier(tmp_path, family, num_labels=3, **options))
    sequences = [Sequence(ids, task="classify") for ids in draw(*LENGTHS)]
    seen = watch(model)
    got = run(model, *sequences)
    assert seen == [rows]
    model.layout.places = frozenset()  # type: ignore[union-attr]
    for a, b in zip(got, run(model, *sequences), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_literal_padding_token_at_the_end_makes_the_layer_whole(tmp_path: Path) -> None:
    """Transformers' decoders classify by the last token that is no padding."""
    model = load(classifier(tmp_path, "Qwen3", num_labels=3))
    pad = model.layout.backbone.model.config.pad_token_id
    one, two = draw(6, 8)
    seen = watch(model)
    ended = run(model, Sequence([*one, pad], task="classify"), Sequence(two, task="classify"))[0]
    assert seen == [15]
    np.testing.assert_allclose(ended, run(model, Sequence(one, task="classify"))[0], atol=1e-6)


def test_shared_prefixes_and_the_last_layer_together(tmp_path: Path) -> None:
    model = load(decoder(tmp_path, "Qwen3Model"), "LAST")
    assert model.shares_prefixes
    prefix, *ends = draw(40, 3, 7, 7, 12)
    sequences = [Sequence([*prefix, *end]) for end in ends] + [Sequence(ends[3])]
    alone = [run(model, sequence)[0] for sequence in sequences]
    seen = watch(model)
    for got, wanted in zip(run(model, *sequences), alone, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert seen == [6], "one row for the prefix, one for each end, one for the text without it"


def test_a_layer_that_does_more_than_it_shows_runs_for_all_tokens() -> None:
    """One that looks at its whole input apart from attention would give other values for fewer tokens."""
    net = build(next(row for row in ZOO if row.name == "bert"))
    layer = find(net)
    assert layer is not None
    layer.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True) * 1e-2)
    packed = pack([Sequence(ids) for ids in draw(9)])
    layout = prepared(net).layout
    assert layout.name != "packed" or not layout.places
    assert torch.isfinite(forward(layout, packed, "first")).all()
