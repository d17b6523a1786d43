"""The probe at load: what it lets through, what it refuses, and that a layout leaves no trace on the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cenote import LLM, PoolingParams
from cenote.core import Sequence
from cenote.errors import CheckpointError
from cenote.models.layouts import Layout, Padded, forward
from cenote.models.passes.subject import Settings
from cenote.models.passes.table import prepared
from cenote.models.probe import LONGEST_REAL_WINDOW
from cenote.models.traits import position_offset, position_rows
from cenote.tensors.packing import pack
from material.zoo import FIRST_TOKEN, SMALL, ZOO, build
from tests import checkpoints

ROWS = {architecture.name: architecture for architecture in ZOO}


def model(name: str, **options: Any) -> Any:
    row = ROWS[name]
    return build(replace(row, options={**row.options, **options}))


def choose(net: Any, max_length: int = 1 << 30, **options: Any) -> tuple[Layout, list[str]]:
    """The layout of a model that has passed through all passes, and the reasons against faster ones."""
    subject = prepared(net, Settings(max_length=max_length), **options)
    return subject.layout, subject.reasons


def draw(*lengths: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(3)
    return [Sequence(torch.randint(FIRST_TOKEN, 300, (n,), generator=generator).tolist()) for n in lengths]


def alone(net: Any, sequences: list[Sequence]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([net(torch.tensor([s.ids]))[0][0] for s in sequences])


@pytest.mark.parametrize("name", ["mistral-sliding", "modernbert", "gemma3"])
def test_windows_longer_than_the_probe_are_honoured(name: str) -> None:
    """Such a window is shortened while probing; afterwards it must be whole again, and right."""
    window = LONGEST_REAL_WINDOW + 88
    size = {"local_attention": window} if name == "modernbert" else {"sliding_window": window}
    options = {**size, "max_position_embeddings": 2048}
    sequences = [*draw(window * 2, 20), *family(window + 60, 9, 300)]
    expected = alone(model(name, **options), sequences)
    packed = model(name, **options)
    layout, _ = choose(packed)
    assert layout.name == "packed"
    assert torch.allclose(forward(layout, pack(sequences)), expected, atol=2e-5)


def test_a_part_of_a_config_that_has_no_attention(tmp_path: Path) -> None:
    """MPT's settings of attention are a config within the config, which names no implementation."""
    tokenizer = checkpoints.byte_level()
    config = transformers.MptConfig(vocab_size=len(tokenizer), d_model=32, n_layers=3, n_heads=4, max_seq_len=1024)
    folder = checkpoints.save(transformers.MptModel(config), tokenizer, tmp_path, 1)
    texts = ["Hello, my name is", "a cenote"]
    with LLM(model=str(folder), runner="pooling") as llm:
        outputs = llm.encode(texts, PoolingParams(use_activation=False), pooling_task="token_embed", use_tqdm=False)
    net = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    for output in outputs:
        with torch.inference_mode():
            expected = net(torch.tensor([output.prompt_token_ids]))[0][0]
        assert torch.allclose(output.outputs.data, expected, atol=2e-5)


LLAMA4: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "cls_token_id"},
    "intermediate_size_mlp": 96,
    "num_local_experts": 2,
    "max_position_embeddings": 2048,
    "attn_implementation": "eager",
}


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"attention_chunk_size": 600, "no_rope_layers": [1, 1, 1], "attn_temperature_tuning": False}, "padded"),
        ({"attention_chunk_size": 2048, "no_rope_layers": [0, 0, 0], "floor_scale": 600}, "padded"),
        ({"attention_chunk_size": 2048, "no_rope_layers": [0, 0, 0], "attn_temperature_tuning": False}, "packed"),
    ],
    ids=["chunks", "scaled by positions", "neither"],
)
def test_lengths_beyond_which_llama4_attends_otherwise(options: dict[str, Any], layout: str) -> None:
    """Chunks are in the mask alone, and queries are scaled by their place in the batch."""
    torch.manual_seed(0)
    net = transformers.Llama4TextModel(transformers.Llama4TextConfig(**{**LLAMA4, **options})).eval()
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    sequences = draw(590, 20, 700)
    expected = alone(net, sequences)
    proved, reasons = choose(net)
    assert proved.name == layout, reasons
    assert torch.allclose(forward(proved, pack(sequences)), expected, atol=1e-4)


def test_packing_can_be_switched_off() -> None:
    net = model("bert")
    layout, reasons = choose(net, packed=False)
    assert (layout.name, reasons) == ("padded", [])
    sequences = draw(*range(1, 30))
    assert torch.allclose(forward(layout, pack(sequences)), alone(model("bert"), sequences), atol=1e-5)


def test_reasons_say_why_packing_failed() -> None:
    layout, reasons = choose(model("mpnet"))
    assert layout.name == "padded"
    assert any("does not call the registered attention function" in reason or "differs" in reason for reason in reasons)


def test_a_rejected_layout_leaves_the_attention_as_it_was() -> None:
    net = model("mobilebert")
    before = net.config._attn_implementation
    choose(net)
    assert net.config._attn_implementation == before


def test_a_rejected_layout_leaves_the_attention_of_each_part_as_it_was() -> None:
    """Gemma 2 within PaliGemma 2 has no other attention than eager, and its tower has."""
    text = {**{key: SMALL[key] for key in SMALL if not key.startswith(("cls", "sep", "mask"))}, "model_type": "gemma2"}
    tower = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "hidden_size": 32}
    config = transformers.PaliGemmaConfig(
        text_config={**text, "sliding_window": 32},
        vision_config={**tower, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32},
        projection_dim=64,
        image_token_id=10,
    )
    net: Any = transformers.PaliGemmaModel(config).eval()
    assert [part._attn_implementation for part in (net.config, net.config.text_config)] == ["sdpa", "eager"]
    layout, reasons = choose(net)
    assert layout.name == "padded"
    assert reasons
    parts = (net.config, net.config.text_config, net.config.vision_config)
    assert [part._attn_implementation for part in parts] == ["sdpa", "eager", "sdpa"]
    sequences = draw(3, 40)
    assert torch.allclose(forward(layout, pack(sequences)), alone(net, sequences), atol=1e-5)


def test_padded_batches_are_small_sorted_and_complete() -> None:
    layout = Padded(choose(model("mpnet"))[0].backbone, size=3)
    lengths = (5, 9, 2, 9, 7, 1, 3)
    groups = layout.groups(lengths)
    assert [[lengths[i] for i in group] for group in groups] == [[9, 9, 7], [5, 3, 2], [1]]
    assert sorted(i for group in groups for i in group) == list(range(7))


def test_damaged_weights_are_refused() -> None:
    net = model("bert")
    with torch.no_grad():
        net.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        choose(net)


class Coupled(torch.nn.Module):
    """A model whose rows depend on how often it has run: no layout can reproduce it."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.calls = net, 0
        self.config, self.dtype, self.device = net.config, net.dtype, net.device
        self.get_input_embeddings = net.get_input_embeddings
        self.set_attn_implementation = net.set_attn_implementation

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        self.calls += 1
        return (self.net(input_ids, attention_mask=attention_mask)[0] + self.calls,)


def test_a_model_that_no_layout_reproduces_is_refused() -> None:
    with pytest.raises(CheckpointError, match="in any layout: .*padded: differs"):
        choose(Coupled(model("bert")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "offset", "rows"),
    [("bert", 0, 160), ("roberta", 2, 158), ("gpt2", 0, 160), ("opt", 0, 160), ("llama", 0, None)],
)
def test_position_tables(name: str, offset: int, rows: int | None) -> None:
    net = model(name)
    assert (position_offset(net), position_rows(net)) == (offset, rows)


def test_a_literal_pad_keeps_its_position_in_roberta() -> None:
    net = model("roberta")
    pad = net.config.pad_token_id
    sequences = draw(12, 9)
    sequences[0].ids[4] = sequences[1].ids[0] = sequences[1].ids[8] = pad  # type: ignore[index]
    expected = alone(net, sequences)
    layout, _ = choose(model("roberta"))
    assert layout.name == "packed"
    assert torch.allclose(forward(layout, pack(sequences)), expected, atol=1e-5)


def test_shuffling_splitting_and_mixing_moves_no_row() -> None:
    layout, _ = choose(model("modernbert"))
    sequences = draw(*(1 + 7 * i % 60 for i in range(24)))
    whole = forward(layout, pack(sequences)).split([len(s) for s in sequences])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    for size in (1, 5, 24):
        for start in range(0, 24, size):
            members = order[start : start + size]
            part = forward(layout, pack([sequences[i] for i in members])).split([len(sequences[i]) for i in members])
            for i, rows in zip(members, part, strict=True):
                assert torch.allclose(rows, whole[i], atol=2e-6)


def family(prefix: int, *leaves: int, strangers: tuple[int, ...] = ()) -> list[Sequence]:
    """Sequences that begin with the same `prefix` tokens, and some that do not, shortest first."""
    head, *rest = draw(prefix, *leaves, *strangers)
    kin = [Sequence([*head.ids, *rest[i].ids]) for i in range(len(leaves))]
    return sorted([*kin, *rest[len(leaves) :]], key=len)


def rows_run(net: Any, layout: Any, sequences: list[Sequence]) -> tuple[torch.Tensor, int]:
    """The layout's rows, and how many rows the model's own code saw."""
    seen = []
    hook = net.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    rows = forward(layout, pack(sequences))
    hook.remove()
    return rows, sum(seen)


CAUSAL = [
    "qwen3",
    "qwen3-moe",
    "qwen2",
    "qwen2-sliding",
    "llama",
    "gemma",
    "gemma2",
    "gemma3",
    "mistral-sliding",
    "ministral3",
    "gpt2",
    "gpt-bigcode",
    "gpt-neox",
    "gpt-oss",
    "opt",
    "phi3-longrope",
    "smollm3",
    "cohere2",
    "modernbert-decoder",
    "bert-causal",
]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_common_prefix_runs_once_and_is_exact(name: str) -> None:
    """The prefix is longer than the windows of the rows that have one; two leaves are equally long, one has a token."""
    net = model(name)
    sequences = family(45, 9, 20, 1, 9, strangers=(50, 33))
    expected = alone(model(name), sequences)
    layout, _ = choose(net, max_length=ROWS[name].max_length)
    assert layout.shares_prefixes
    rows, count = rows_run(net, layout, sequences)
    assert count == 45 + 9 + 20 + 1 + 9 + 50 + 33
    assert torch.allclose(rows, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_prefixes_are_shared_within_a_class_of_rotary_frequencies() -> None:
    sequences = family(45, 20, 9, 9)
    expected = alone(model("llama-dynamic-rope"), sequences)
    net = model("llama-dynamic-rope")
    rows, count = rows_run(net, choose(net)[0], sequences)
    assert count == 45 + 9 + 9 + 65, "only sequences of one length share frequencies"
    assert torch.allclose(rows, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["bert", "modernbert", "embedding-gemma", "llama-noncausal", "mpnet"])
def test_models_that_look_ahead_do_not_share(name: str) -> None:
    net = model(name)
    sequences = family(45, 9, 20, 9)
    expected = alone(model(name), sequences)
    layout, _ = choose(net)
    assert not layout.shares_prefixes
    rows, count = rows_run(net, layout, sequences)
    assert count >= 45 * 3 + 9 + 20 + 9
    assert torch.allclose(rows, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_sharing_can_be_switched_off() -> None:
    net = model("qwen3")
    sequences = family(45, 9, 20)
    layout, _ = choose(net, leave_out=("prefixes",))
    assert (layout.name, layout.shares_prefixes) == ("packed", False)
    assert rows_run(net, layout, sequences)[1] == 45 * 2 + 9 + 20


@pytest.mark.parametrize(("max_length", "shares"), [(23, False), (24, True), (40, True)])
def test_a_model_too_short_to_prove_sharing_does_not_share(
    max_length: int, shares: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cenote"):
        layout, _ = choose(model("gpt2", max_position_embeddings=max_length), max_length=max_length)
    assert (layout.name, layout.shares_prefixes) == ("packed", shares)
    assert ("takes 23 tokens at most" in caplog.text) == (not shares)


class Shifted(torch.nn.Module):
    """A causal model in which a token also sees the row before its own: packing keeps that, sharing would not."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.config, self.dtype, self.device = net, net.config, net.dtype, net.device
        self.get_input_embeddings = net.get_input_embeddings
        self.set_attn_implementation = net.set_attn_implementation

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        hidden = self.net(input_ids, position_ids=position_ids, attention_mask=attention_mask)[0]
        return (hidden + hidden.roll(1, dims=1) * (places > 0)[..., None],)


def test_a_model_that_sharing_would_change_does_not_share(caplog: pytest.LogCaptureFixture) -> None:
    sequences = family(45, 9, 20)
    expected = alone(Shifted(model("qwen3")), sequences)
    with caplog.at_level(logging.INFO, "cenote"):
        layout, _ = choose(Shifted(model("qwen3")))  # type: ignore[arg-type]
    assert (layout.name, layout.shares_prefixes) == ("packed", False)
    assert "Shifted does not share prefixes: differs from the model's own output" in caplog.text
    assert torch.allclose(forward(layout, pack(sequences)), expected, atol=1e-4)


def test_a_literal_pad_in_a_shared_prefix_keeps_its_position() -> None:
    """A decoder with RoBERTa's positions: those of the leaves follow from the pads in the prefix."""
    sequences = family(45, 9, 20)
    for s in sequences:
        s.ids[7] = 1  # type: ignore[index]
    expected = alone(model("roberta", is_decoder=True), sequences)
    net = model("roberta", is_decoder=True)
    layout, _ = choose(net)
    assert layout.shares_prefixes
    rows, count = rows_run(net, layout, sequences)
    assert count == 45 + 9 + 20
    assert torch.allclose(rows, expected, atol=1e-5)
