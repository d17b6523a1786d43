"""The proofs at load: rounding passes, and what a neighbour says never does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.models.layouts import Backbone, Packed, Padded
from cenote.models.probe import ROUNDINGS, Draw, choose, distance, one_by_one
from cenote.tensors import native
from material.zoo import ZOO, build
from tests.threads import threads

ROWS = {row.name: row for row in ZOO}
LAYOUTS = json.loads((Path(__file__).parents[1] / "data" / "layouts.json").read_text())
EXPERTS = ("mixtral", "qwen3-moe", "gpt-oss", "qwen3-next", "jamba")
DEEP = {"num_experts": 32, "num_experts_per_tok": 8, "hidden_size": 128, "num_hidden_layers": 6}
"""Of a mixture that is large enough for its rows to move with their neighbours by rounding."""


@pytest.fixture(params=[1, 2])
def count(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads that torch has."""
    with threads(request.param):
        yield request.param


def mixture(**options: Any) -> Any:
    row = ROWS["qwen3-moe"]
    return build(replace(row, options={**row.options, **options}))


class Leaky(nn.Module):
    """A model whose rows know the mean of all ids of their batch."""

    def __init__(self, net: Any, leak: float) -> None:
        super().__init__()
        self.net, self.leak = net, leak
        self.config, self.dtype, self.device = net.config, net.dtype, net.device
        self.get_input_embeddings = net.get_input_embeddings
        self.set_attn_implementation = net.set_attn_implementation

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor]:
        hidden = self.net(input_ids, position_ids=position_ids, attention_mask=attention_mask)[0]
        return (hidden + self.leak * input_ids.float().mean(),)


class Strict(Leaky):
    """A model that takes no input of more tokens than it has positions."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor]:
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(f"{input_ids.shape[1]} tokens")
        return super().forward(input_ids, position_ids, attention_mask)


class Deaf(Leaky):
    """A model that sees padding."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor]:
        return (self.net(input_ids)[0],)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_take_their_layout_with_any_number_of_threads(name: str, count: int) -> None:
    layout = choose(build(ROWS[name]), max_length=ROWS[name].max_length, kernels=native.load()).layout
    assert layout.name == LAYOUTS[name]["layout"]


def test_rounding_that_moves_rows_is_below_the_error_of_float32(count: int) -> None:
    """The rows of a deep mixture move with their neighbours; by less than they are away from float64 anyway."""
    model, exact = mixture(**DEEP), mixture(**DEEP).double()
    exact.set_experts_implementation("eager")  # grouped products take no float64
    proved = choose(model)
    probe, layout = proved.probe, proved.layout
    assert layout.name == "packed", proved.reasons
    with torch.inference_mode():
        exact_TD = torch.cat([exact(torch.tensor([ids]))[0][0] for ids in (list(s.ids) for s in probe.sequences)])
    error = float((probe.rows_TD.double() - exact_TD).abs().max()) / max(1.0, float(exact_TD.abs().max()))
    assert probe.moved(layout) <= ROUNDINGS * probe.rounding(layout)
    assert probe.moved(layout) <= error


@pytest.mark.parametrize("leak", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("kind", ["bert", "mixture"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_leak_is_told_from_rounding(kind: str, leak: float, is_packed: bool) -> None:
    """The mean of the ids, about 150, moves by about 2 when a sequence is swapped."""
    net: Any = Leaky(build(ROWS["bert"]) if kind == "bert" else mixture(**DEEP), leak)
    probe = one_by_one(Backbone(net), 41)
    layout = Packed(Backbone(net)) if is_packed else Padded(Backbone(net))
    layout.install()
    fault = probe.isolated(layout)
    assert fault.startswith("rows move by" if leak else "")
    assert bool(fault) == bool(leak)


@pytest.mark.parametrize("kind", ["bert", "qwen3-moe"])
def test_a_model_that_leaks_runs_alone(kind: str) -> None:
    net: Any = Leaky(build(ROWS[kind]), 1e-5)
    assert choose(net).layout.name == "one by one"


def test_a_model_that_sees_padding_is_not_padded() -> None:
    net: Any = Deaf(build(ROWS["mpnet"]), 0.0)
    proved = choose(net)
    assert proved.layout.name == "equal lengths"
    assert any(reason.startswith("padded: differs from the model's own output") for reason in proved.reasons)


def test_own_attention_is_back_for_the_time_being() -> None:
    net = build(ROWS["t5"])
    layout = choose(net).layout
    with layout.own_attention() as backbone:
        rows_1LD = backbone.run(input_ids=torch.tensor([[7, 8, 9]]))
    with torch.inference_mode():
        assert torch.equal(rows_1LD, build(ROWS["t5"])(torch.tensor([[7, 8, 9]]))[0])
    assert net.config._attn_implementation == "cenote"


def test_ids_are_ordinary_and_the_same_at_every_start() -> None:
    model = build(ROWS["bart"])
    ids = Draw(model)(400)
    assert ids == Draw(model)(400)
    config = model.config
    assert not {config.pad_token_id, config.bos_token_id, config.eos_token_id} & set(ids)
    assert Draw(model).text(4)[-1] == config.eos_token_id
    assert len(Draw(model).text(1)) == 1


def test_ids_are_none_of_several_end_tokens() -> None:
    model = build(ROWS["llama"], eos_token_id=[2, 7])
    assert not {2, 7} & set(Draw(model)(4000))


def test_distance() -> None:
    ones = torch.ones(2, 2)
    assert distance(ones, 3 * ones) == pytest.approx(2 / 3)
    assert distance(ones / 2, ones / 4) == 0.25
    assert distance(ones, torch.ones(2, 3)) == float("inf")
    assert not distance(ones * torch.nan, ones) <= 1


def test_a_model_that_checks_the_length_of_its_input_is_not_packed() -> None:
    """The probe's sequences together have fewer tokens than it has positions; only their crowd has more."""
    net: Any = Strict(build(ROWS["bert"]), 0.0)
    proved = choose(net)
    assert proved.probe.batch.tokens < net.config.max_position_embeddings
    assert proved.layout.name == "padded"
    assert any(reason.startswith("packed: ValueError: ") for reason in proved.reasons), proved.reasons
