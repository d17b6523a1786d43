"""Replayed forwards give what the model gives by itself, whatever was replayed before.

On a machine with a GPU these tests record real CUDA graphs over real kernels; elsewhere a tape of operators and a
stand-in for the attention kernel take their places (`tests.tape`), which fix as much as the real ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from cenote.config import ModelConfig
from cenote.core import Sequence
from cenote.models import load as loading
from cenote.models.checkpoint import choose, read
from cenote.models.hub import embedded, find
from cenote.models.layouts import Packed, forward
from cenote.models.passes.graphs import MOST_TOKENS, worthwhile_tokens
from cenote.models.passes.subject import Settings
from cenote.models.passes.table import prepared
from cenote.models.probe import LONGEST_REAL_WINDOW
from cenote.tensors import attention, graphs
from cenote.tensors.graphs import Graphs, lay_out, rounded, shape_of
from cenote.tensors.packing import PLACES, Batch, Place, Static, pack
from material.corpus import docstrings
from material.zoo import FIRST_TOKEN, ZOO, Architecture, build
from tests import checkpoints, tape

pytestmark = pytest.mark.full  # recorded forwards, which are for GPUs; `make test` runs all rows unrecorded
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH = 96
"""Tokens of real text, which has shorter and longer texts."""
TOLERANCE = 1e-4 if DEVICE.type == "cuda" else 1e-5
PACKED = [pytest.param(row, id=row.name) for row in ZOO if row.layout == "packed"]
ROWS = {row.name: row for row in ZOO}
NOT_RECORDED = {
    "xmod": "waits",
    **dict.fromkeys(("t5", "t5-gated", "mt5", "umt5", "gemma2"), "no fused kernel"),
    **dict.fromkeys(("llama-dynamic-rope", "phi3-longrope"), "depend on the length"),
}
"""Rows that run unrecorded, and why: boolean indices, position biases and softcaps, rotary frequencies."""


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings and a fused attention kernel, for any dtype, where there is no GPU."""
    if DEVICE.type == "cuda":
        return

    def choose_kernel(q: torch.Tensor, v: torch.Tensor, rule: attention.Rule) -> Any:
        return attention._flash if rule.bias is None and rule.softcap is None else None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", tape.flash_attention_forward)
    monkeypatch.setattr(attention, "FUSED_ON", frozenset({"cpu"}))
    monkeypatch.setattr(attention, "varlen_kernel", choose_kernel)
    monkeypatch.setattr(graphs, "_recorder", lambda device: tape.record)


def draw(*lengths: int, seed: int = 0) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    return [Sequence(torch.randint(FIRST_TOKEN, 300, (n,), generator=generator).tolist()) for n in lengths]


def alone(model: torch.nn.Module, sequences: list[Sequence]) -> torch.Tensor:
    """Rows of the model's own eager forward, one sequence at a time; equal sequences run once."""
    distinct = {tuple(s.ids + (s.type_ids or [])): s for s in sequences}
    with torch.inference_mode():
        rows = {key: model(**inputs(s))[0][0] for key, s in distinct.items()}
    return torch.cat([rows[tuple(s.ids + (s.type_ids or []))] for s in sequences])


def inputs(sequence: Sequence) -> dict[str, torch.Tensor]:
    types = {} if sequence.type_ids is None else {"token_type_ids": sequence.type_ids}
    return {name: torch.tensor([own], device=DEVICE) for name, own in {"input_ids": sequence.ids, **types}.items()}


def recorded(name: str, **options: Any) -> tuple[Packed, torch.nn.Module]:
    """A row's layout, which replays, and the row's model as it is."""
    row = replace(ROWS[name], options={**ROWS[name].options, **options})
    subject = prepared(build(row).to(DEVICE), Settings(graph_tokens=1024))
    layout = subject.layout
    assert isinstance(layout, Packed), subject.reasons
    return layout, build(row).to(DEVICE)


@given(st.integers(1, 100_000))
def test_shapes_are_few_and_close(tokens: int) -> None:
    found = rounded(tokens)
    assert tokens <= found <= max(64, 1.25 * tokens)
    assert found in {base * (4 + k) // 4 for base in (64 << n for n in range(12)) for k in range(4)}
    assert rounded(found) == found


@given(st.lists(st.integers(1, 700), min_size=1, max_size=300), st.booleans())
def test_what_fills_a_batch_up_lies_apart(lengths: list[int], typed: bool) -> None:
    types = [None, *([[1] * n for n in lengths[1:]] if typed else [None] * (len(lengths) - 1))]
    batch = pack([Sequence([7] * n, type_ids=own) for n, own in zip(lengths, types, strict=True)])
    shape = shape_of(batch)
    if len(lengths) > graphs.MOST_SEQUENCES:
        assert shape is None
        return
    assert shape is not None
    ids, positions, offsets, *more = lay_out(batch, shape)
    assert offsets[: len(lengths) + 1].tolist() == list(batch.starts)
    assert len(offsets) == shape.sequences + 1
    assert offsets[-1] == shape.tokens == len(ids) == len(positions)
    assert all(0 <= length <= shape.max_length for length in np.diff(offsets))
    assert len(more) == (batch.host_type_ids_T is not None)
    owners = [x_T for x_T in (batch.host_ids_T, batch.host_positions_T, batch.host_type_ids_T) if x_T is not None]
    for laid, own in zip((ids, positions, *more), owners, strict=True):
        assert laid[: batch.tokens].tolist() == own.tolist()
        assert not laid[batch.tokens :].any()


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("architecture", PACKED)
def test_equals_eager_one_by_one(architecture: Architecture) -> None:
    """Six batches, of which four have one shape."""
    layout, model = recorded(architecture.name)
    reason = NOT_RECORDED.get(architecture.name, "")
    assert reason in layout.unrecorded
    assert (layout.graphs is None) == bool(reason) == bool(layout.unrecorded)
    if "length" in reason:
        return  # and the model by itself keeps the frequencies of the longest sequence so far
    first, second = draw(17, 3, 40, 10), draw(5, 20, 33, 8, seed=1)
    batches = [first, second, draw(2), first, draw(100, 64, 12), draw(*[1] * 7) * 10]
    results = [forward(layout, pack(batch, DEVICE)) for batch in batches]
    lengths = [sum(map(len, batch)) for batch in batches]
    rows_of = alone(model, [*chain(*batches)]).split(lengths)
    for expected, found in zip(rows_of, results, strict=True):
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        assert torch.allclose(found, expected, rtol=0, atol=allowed), float((found - expected).abs().max())
    for place in layout.places:
        for number in (0, 1, 4):
            whole, expected = pack(batches[number], DEVICE), rows_of[number]
            found = forward(layout, whole, place)
            rows, allowed = whole.rows_at(place), TOLERANCE * max(1.0, float(expected.abs().max()))
            assert torch.allclose(found[rows], expected[rows], rtol=0, atol=allowed)
            assert found.isnan().any()
    if layout.graphs is not None:
        shapes = [(shape.tokens, shape.max_length) for shape, _ in layout.graphs.replays]
        assert shapes == [(80, 128), (64, 128), (192, 128), *[(80, 128), (192, 128)] * len(layout.places)]


@pytest.mark.usefixtures("like_a_gpu")
def test_types_are_shapes_of_their_own() -> None:
    layout, model = recorded("bert")
    plain = draw(9, 30)
    typed = [Sequence(s.ids, type_ids=[0] * 4 + [1] * (len(s) - 4)) for s in plain]
    for batch in (plain, typed, plain, typed[::-1]):
        assert torch.allclose(forward(layout, pack(batch, DEVICE)), alone(model, batch), atol=TOLERANCE)
    assert layout.graphs is not None
    assert [shape.typed for shape, _ in layout.graphs.replays] == [False, True]


@pytest.mark.usefixtures("like_a_gpu")
def test_literal_padding_tokens_and_longer_sequences() -> None:
    """RoBERTa's positions depend on the ids; lengths beyond 128 are shapes of their own."""
    layout, model = recorded("xlm-roberta")
    batch = draw(20, 33, 9)
    batch[1] = Sequence([*batch[1].ids[:10], 1, 1, *batch[1].ids[12:]])
    for sequences in (batch, draw(130, 20), draw(150, 20)):
        assert torch.allclose(forward(layout, pack(sequences, DEVICE)), alone(model, sequences), atol=TOLERANCE)
    assert layout.graphs is not None
    assert [shape.max_length for shape, _ in layout.graphs.replays] == [128, 512, 512]


@pytest.mark.usefixtures("like_a_gpu")
def test_windows_that_the_probe_shortened_are_whole_again() -> None:
    window = LONGEST_REAL_WINDOW + 88
    layout, model = recorded("mistral-sliding", sliding_window=window, max_position_embeddings=2048)
    sequences = draw(window + 100, 20)
    assert torch.allclose(forward(layout, pack(sequences, DEVICE)), alone(model, sequences), atol=2 * TOLERANCE)
    assert layout.graphs is not None
    assert len(layout.graphs.replays) == 1


@pytest.mark.usefixtures("like_a_gpu")
def test_what_fits_no_shape_runs_unrecorded() -> None:
    """Too many tokens, too many sequences, hidden tokens, shared prefixes."""
    layout, model = recorded("bert")
    assert layout.graphs is not None
    for sequences in (draw(*[100] * 11), [*draw(*[2] * 8) * 32, *draw(2, seed=1)]):
        assert torch.allclose(forward(layout, pack(sequences, DEVICE)), alone(model, sequences), atol=TOLERANCE)
    part_hidden = [replace(s, hidden=2) for s in draw(9, 12)]
    rows = forward(layout, pack(part_hidden, DEVICE))
    assert torch.allclose(rows[:7], alone(model, [Sequence(part_hidden[0].ids[:7])]), atol=TOLERANCE)
    assert not layout.graphs.replays
    causal, model = recorded("qwen3")
    assert causal.graphs is not None
    prefix, one, other = draw(30, 5, 9)
    sequences = [Sequence([*prefix.ids, *s.ids]) for s in (one, other)]
    assert torch.allclose(forward(causal, pack(sequences, DEVICE)), alone(model, sequences), atol=TOLERANCE)
    assert not causal.graphs.replays


def plus_position(batch: Static, place: Place | None) -> torch.Tensor:
    rows = torch.stack([batch.ids_T, batch.positions_T], dim=1).float()
    return rows if place is None else rows[batch.rows_at(place)]


def test_results_are_tensors_of_their_own() -> None:
    """The buffers behind them are written again before anybody has read the first result."""
    runs = Graphs(plus_position, DEVICE, 256)
    batches = [pack(draw(n, 5, seed=n), DEVICE) for n in (9, 50, 12, 200, 9)]
    results = [runs.run(batch) for batch in batches]
    for batch, found in zip(batches, results, strict=True):
        assert found is not None
        assert found.tolist() == torch.stack([batch.ids_T, batch.positions_T], dim=1).tolist()
    assert len(runs.replays) == 2
    for place in PLACES:
        at = runs.run(batches[1], place)
        assert at is not None
        assert results[1] is not None
        assert at.tolist() == results[1][batches[1].rows_at(place)].tolist()
    assert len(runs.replays) == 4


def test_a_shape_that_cannot_be_recorded_is_tried_once() -> None:
    calls = []

    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        calls.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    runs = Graphs(plus_position, DEVICE, 256, refuse)
    batch = pack(draw(9), DEVICE)
    assert runs.run(batch) is None
    assert runs.run(batch) is None
    assert len(calls) == 1
    assert runs.fault == "RuntimeError: operation not permitted when stream is capturing"


def test_running_out_of_memory_while_recording_is_the_engine_s_affair() -> None:
    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = Graphs(plus_position, DEVICE, 256, refuse)
    with pytest.raises(torch.OutOfMemoryError):
        runs.run(pack(draw(9), DEVICE))
    assert not runs.replays


@pytest.mark.usefixtures("like_a_gpu")
def test_a_forward_that_depends_on_what_it_recorded_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds 0, but takes one half of the difference from the host."""
    original = Packed._run

    def stale(self: Packed, batch: Batch | Static, place: Place | None = None) -> torch.Tensor:
        on_host = int(batch.ids_T.cpu().numpy().sum())
        return original(self, batch, place) + (batch.ids_T.sum() - on_host)

    monkeypatch.setattr(Packed, "_run", stale)
    layout = prepared(build(ROWS["bert"]).to(DEVICE), Settings(graph_tokens=1024)).layout
    assert isinstance(layout, Packed)
    assert layout.graphs is None
    assert layout.unrecorded


@pytest.mark.usefixtures("like_a_gpu")
def test_batches_that_overlap_keep_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of real weights: three batches are launched before the first is finished, as an engine does."""
    texts = list(docstrings(12))
    reference = SentenceTransformer(str(embedded()), device=str(DEVICE))
    reference.max_seq_length = LENGTH
    expected = reference.encode(texts, batch_size=1)
    settings_of = loading.settings_of
    monkeypatch.setattr(loading, "settings_of", lambda *args: replace(settings_of(*args), graph_tokens=2048))
    model, checkpoint = loading.load(ModelConfig(device=str(DEVICE), dtype="float32", native_kernels=False))
    ids = checkpoint.tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    parts = [[Sequence(own) for own in ids[i : i + 4]] for i in range(0, 12, 4)]
    token_rows = [replace(s, task="token_embed") for s in parts[0]]
    launched = [model.launch(part) for part in (*parts, token_rows, parts[0])]
    found = [output for pending in launched for output in pending.finish()]
    assert isinstance(model.layout, Packed)
    assert model.layout.graphs is not None
    assert model.layout.graphs.replays
    vectors = np.array([output.data for output in (*found[:12], *found[16:])])
    assert np.abs(vectors - np.concatenate((expected, expected[:4]))).max() < TOLERANCE
    assert [len(output.data) for output in found[12:16]] == [len(s) for s in parts[0]]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there, it can be recorded")
def test_what_cannot_be_recorded_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = checkpoints.write_modules(checkpoints.bert(tmp_path), checkpoints.pooling("mean"), checkpoints.NORMALIZE)
    settings_of = loading.settings_of
    monkeypatch.setattr(loading, "settings_of", lambda *args: replace(settings_of(*args), graph_tokens=2048))
    model, _ = loading.load(ModelConfig(model=str(folder)))
    (note,) = model.info.report.warnings
    assert note.startswith("runs without CUDA graphs: NotImplementedError: no fused kernel does the attention of Bert")
    (found,) = model.launch([Sequence([2, 100, 3])]).finish()
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder)(torch.tensor([[2, 100, 3]]))[0]
    assert np.abs(found.data - torch.nn.functional.normalize(states[0].mean(0), dim=0).numpy()).max() < 1e-6


def test_recordings_are_for_batches_that_launch_longer_than_they_run() -> None:
    small = torch.nn.Sequential(*[torch.nn.Linear(384, 384) for _ in range(36)])
    large = torch.nn.Sequential(*[torch.nn.Linear(4096, 4096, device="meta") for _ in range(200)])
    embeddings = torch.nn.Sequential(torch.nn.Embedding(1_000_000, 4096, device="meta"), *small)
    assert worthwhile_tokens(small) == MOST_TOKENS
    assert worthwhile_tokens(embeddings) == MOST_TOKENS
    assert 100 < worthwhile_tokens(large) < 500


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 0),
        ({"max_cudagraph_capture_size": 300}, 0),
        ({"cuda_graphs": True}, MOST_TOKENS),
        ({"cuda_graphs": True, "max_cudagraph_capture_size": 300}, 300),
        ({"cuda_graphs": True, "max_cudagraph_capture_size": 0}, 0),
        ({"cuda_graphs": True, "enforce_eager": True}, 0),
    ],
    ids=str,
)
def test_recordings_are_made_where_they_are_asked_for(options: dict[str, Any], tokens: int) -> None:
    config = ModelConfig(**options)
    checkpoint = choose(read(find(config), config), config)

    class Full(torch.nn.Sequential):
        device, base_model = torch.device("cuda"), torch.nn.Sequential(*[torch.nn.Linear(384, 384) for _ in range(36)])

    built: Any = loading.Built(Full(), 512, "none", ())  # type: ignore[arg-type]
    assert loading.settings_of(checkpoint, built, config).graph_tokens == tokens
