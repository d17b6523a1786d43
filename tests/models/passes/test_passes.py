"""The table of passes: each can be left out, and each that can be taken back leaves the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cenote.config import ModelConfig
from cenote.core import Sequence
from cenote.models.layouts import Packed, forward
from cenote.models.load import load
from cenote.models.passes.patches import Patches
from cenote.models.passes.subject import Settings, Subject
from cenote.models.passes.table import ONLY_FASTER, PASSES, prepared
from cenote.tensors import linear, native
from cenote.tensors.packing import pack
from material.zoo import ZOO, build
from tests.checkpoints import bert, decoder
from tests.models.test_adapters import jina
from tests.models.test_parity_zoo import alone, sequences

pytestmark = pytest.mark.full  # other paths to figures that `make test` compares
ROWS = {row.name: row for row in ZOO}
SAMPLE = ("bert", "roberta", "t5-gated", "modernbert", "qwen3", "gemma2", "qwen3-moe", "deberta", "mobilebert", "bart")
NAMES = tuple(row.name for row in PASSES)


def settings() -> Settings:
    kernels = native.load()
    return Settings(kernels=kernels, products=linear.float32(kernels))


def patched(model: nn.Module) -> list[nn.Module]:
    return [x for x in model.modules() if "forward" in vars(x) or x._forward_hooks]


def check(subject: Subject, name: str) -> None:
    """The rows are those of the row's own model, eager, one sequence at a time."""
    batch = sequences(subject.full.get_input_embeddings().weight.shape[0])
    expected_TD = torch.cat(alone(build(ROWS[name]), batch))
    found_TD = forward(subject.layout, pack(batch))
    assert torch.allclose(found_TD, expected_TD, rtol=0, atol=1e-5 * max(1.0, float(expected_TD.abs().max())))


def test_the_order() -> None:
    assert NAMES == ("adapters", "prefixes", "fuse", "last_layer", "graphs", "narrow", "company")
    assert {"prefixes", "fuse", "last_layer", "graphs"} == ONLY_FASTER


CASES = [
    pytest.param(name, left_out, id=f"{name}-{'+'.join(sorted(left_out))}")
    for name in SAMPLE
    for left_out in (*({row} for row in NAMES), set(ONLY_FASTER))
]


@pytest.mark.parametrize(("name", "left_out"), CASES)
def test_each_can_be_left_out(name: str, left_out: set[str]) -> None:
    subject = prepared(build(ROWS[name]), settings(), leave_out=left_out)
    layout = subject.layout
    assert list(subject.outcomes) == [row for row in NAMES if row not in left_out]
    assert layout.name == ROWS[name].layout
    check(subject, name)
    if "prefixes" in left_out:
        assert not layout.shares_prefixes
    if "last_layer" in left_out and isinstance(layout, Packed):
        assert not layout.places
    if "fuse" in left_out:
        assert not subject.patches.of("fuse")
    if left_out == ONLY_FASTER:
        assert not patched(subject.full)


@pytest.mark.parametrize("name", SAMPLE)
def test_each_can_be_taken_back(name: str) -> None:
    subject = prepared(build(ROWS[name]), settings())
    assert patched(subject.full)
    for row in reversed(PASSES):
        if row.undo is not None:
            row.undo(subject)
    assert not patched(subject.full)
    assert not subject.layout.shares_prefixes
    for key, tensor in build(ROWS[name]).state_dict().items():
        assert torch.equal(subject.full.state_dict()[key], tensor), key
    check(subject, name)


def test_the_record_of_patches() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh(), nn.Tanh())
    first, second, third, fourth = model
    vars(fourth)["forward"] = foreign = torch.relu
    patches, x = Patches(), torch.ones(3)
    assert [patches.is_free(module) for module in model] == [True, True, True, False]
    expected = first(x)
    patches.put("one", {first: torch.neg, second: torch.abs})
    assert [patches.replaces(module) for module in model] == [True, True, False, True]
    assert torch.equal(first(x), -x)
    patches.put("other", {first: torch.exp})
    assert patches.of("one") == {second: torch.abs}
    patches.put("one", {third: torch.abs})
    assert patches.of("one") == {third: torch.abs}
    assert not patches.replaces(second)
    patches.hook("other", second, lambda *_: x)
    assert not patches.is_free(second)
    assert not patches.replaces(second)
    assert torch.equal(second(x), x)
    patches.remove("other")
    assert patches.is_free(second)
    assert torch.equal(first(x), expected)
    assert not torch.equal(second(x), x)
    patches.remove("one")
    assert patched(model) == [fourth]
    assert vars(fourth)["forward"] is foreign


def test_plain(tmp_path: Path) -> None:
    """Nothing that only makes faster is left in the model, and its answers are the same."""
    folder = decoder(tmp_path, "Qwen3Model")
    fast, plain = (load(ModelConfig(model=str(folder), plain=own))[0] for own in (False, True))
    assert fast.shares_prefixes
    assert not plain.shares_prefixes
    assert isinstance(fast.layout, Packed)
    assert isinstance(plain.layout, Packed)
    assert (fast.layout.places, plain.layout.places) == ({"last"}, set())
    assert plain.layout.kernels is None
    assert patched(fast.layout.backbone.model)
    assert not patched(plain.layout.backbone.model)
    batch = [Sequence([7] * 20 + list(range(5, 5 + n))) for n in (3, 9, 1)]
    for a, b in zip(fast.launch(batch).finish(), plain.launch(batch).finish(), strict=True):
        assert abs(a.data - b.data).max() < 1e-6  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"dtype": "float16"}], ids=str)
def test_plain_keeps_precision_and_adapters(options: dict[str, Any], tmp_path: Path) -> None:
    plain, _ = load(ModelConfig(model=str(bert(tmp_path / "bert")), plain=True, **options))
    assert plain.info.report.linears.startswith("13 of 13 in")
    adapted, _ = load(ModelConfig(model=str(jina(tmp_path / "jina")), plain=True))
    assert len(adapted.info.adapters) > 1
