"""Texts longer than a model reads, and late chunking: the values by Transformers, the ranges, and every refusal."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from starlette.testclient import TestClient
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, ByT5Tokenizer

from cenote import LLM, LateChunkingParams, PoolingParams
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.core import LateChunk, LateChunkingMetadata, Output, Sequence
from cenote.engine.blocks import ChunkedEngine, merge, split
from cenote.engine.fake import FAKE_INFO, FakeEngine
from cenote.errors import BadRequest, CheckpointError, ConfigError, EngineFailed, TooLong
from cenote.pipeline.late_chunking import late_chunks
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import checkpoints

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT = 16
LONG = "one two three four five six seven eight nine ten " * 4
TEXTS = ["hello", LONG, "the quick brown fox jumps over the lazy dog"]
DOCUMENT = "naïve café — 水 and 🐟 over the lazy dog"
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def unit(row: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = row / np.linalg.norm(row, axis=-1, keepdims=True)
    return scaled


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=2e-5, rtol=1e-4)


class Reference:
    """Transformers' eager model, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def ids(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, **options)["input_ids"]
        return ids

    def states(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            states: np.ndarray = self.model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        return states

    def chunked(self, ids: list[int], pool: Any = lambda states: states.mean(0), *, normalize: bool = True) -> Any:
        """The mean of the blocks' vectors, by their lengths."""
        blocks = [ids[i : i + LIMIT] for i in range(0, len(ids), LIMIT)]
        vectors = [pool(self.states(block)) for block in blocks]
        vectors = [unit(vector) for vector in vectors] if normalize else vectors
        mean = sum(len(b) * v for b, v in zip(blocks, vectors, strict=True)) / len(ids)
        return unit(mean) if normalize else mean


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def chunked(folder: Path, *, max_embed_len: int | None = None, pooling_type: str = "MEAN", **options: Any) -> LLM:
    pooler = {"enable_chunked_processing": True, "max_embed_len": max_embed_len, "pooling_type": pooling_type}
    return LLM(model=str(folder), max_model_len=LIMIT, pooler_config=pooler, **options)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with chunked(folder) as made:
        yield made


def vectors(outputs: Any) -> list[list[float]]:
    return [output.outputs.embedding for output in outputs]


# Chunked processing


def test_split_keeps_what_is_short_and_cuts_the_rest() -> None:
    types = [0] * 6 + [1] * 4
    sequences = [
        Sequence([1, 2, 3, 4]),
        Sequence(list(range(10)), type_ids=types, skip=2),
        Sequence(list(range(8))),
    ]
    parts, groups = split(sequences, 4)
    assert parts[0] is sequences[0]
    assert [list(p.ids) for p in parts[1:]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert [p.type_ids for p in parts[1:4]] == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1]]
    assert [p.skip for p in parts[1:4]] == [2, 0, 0]
    assert groups == [range(1), range(1, 4), range(4, 6)]


@pytest.mark.parametrize(
    ("skip", "first", "skips"), [(3, 0, [3, 0, 0]), (4, 1, [0, 0]), (5, 1, [1, 0]), (9, 2, [1]), (10, 2, [2])]
)
def test_blocks_of_nothing_but_prompt_are_left_out(skip: int, first: int, skips: list[int]) -> None:
    parts, groups = split([Sequence(list(range(10)), skip=skip)], 4)
    assert [p.skip for p in parts] == skips
    assert parts[0].ids[0] == 4 * first
    assert groups == [range(len(skips))]


@pytest.mark.parametrize(
    "sequence",
    [Sequence([1] * 5, task="token_embed"), Sequence([1] * 5, also=("sparse",)), Sequence([1] * 5, hidden=1)],
    ids=["task", "also", "hidden"],
)
def test_only_vectors_can_be_merged(sequence: Sequence) -> None:
    with pytest.raises(TooLong, match="at most 4 tokens at once, and the prompt contains 5"):
        split([sequence], 4)
    split([replace(sequence, ids=[1] * 4)], 4)


def merged(rows: list[list[float]], parts: list[Sequence], *, on: bool = True) -> list[float]:
    outputs = [Output(np.array(row, np.float32)) for row in rows]
    (output,) = merge(outputs, parts, [range(len(rows))], use_activation=on)
    assert output.data.dtype == np.float32
    return [float(x) for x in output.data]


def test_merging_weighs_by_tokens_that_count() -> None:
    parts = [Sequence([1, 2, 3, 4]), Sequence([5])]
    assert merged([[1.0, 0.0], [6.0, 5.0]], parts) == pytest.approx([2.0, 1.0])
    parts = [Sequence([1, 2, 3, 4], skip=3), Sequence([5])]
    assert merged([[1.0, 0.0], [6.0, 5.0]], parts) == pytest.approx([3.5, 2.5])


@pytest.mark.parametrize(
    ("second", "own", "default", "scaled"),
    [
        ([0.0, 1.0], None, True, True),
        ([0.0, 1.0], None, False, False),
        ([0.0, 1.0], False, True, False),
        ([0.0, 1.0], True, False, True),
        ([0.0, 1.009], None, True, True),
        ([0.0, 0.991], None, True, True),
        ([0.0, 1.02], None, True, False),
        ([0.0, 0.98], None, True, False),
        ([0.0, 0.0], None, True, False),
    ],
)
def test_means_of_unit_vectors_are_scaled(second: list[float], own: bool | None, default: bool, scaled: bool) -> None:
    parts = [Sequence([1, 2], params=PoolingParams(use_activation=own)), Sequence([1, 2])]
    parts[1].params = parts[0].params
    mean = np.array([0.5, second[1] / 2])
    assert merged([[1.0, 0.0], second], parts, on=default) == pytest.approx(
        (mean / np.linalg.norm(mean) if scaled else mean).tolist(), abs=1e-6
    )


def test_one_block_is_its_own_result() -> None:
    assert merged([[3.0, 4.0]], [Sequence([1, 2])]) == [3.0, 4.0]
    assert merged([[0.995, 0.0]], [Sequence([1, 2])]) == pytest.approx([0.995, 0.0])


POOLS = {"MEAN": lambda states: states.mean(0), "CLS": lambda states: states[0], "LAST": lambda states: states[-1]}


@pytest.mark.parametrize("use_activation", [None, False])
@pytest.mark.parametrize("pooling_type", POOLS)
def test_embed(folder: Path, reference: Reference, pooling_type: str, use_activation: bool | None) -> None:
    params = PoolingParams(use_activation=use_activation)
    with chunked(folder, pooling_type=pooling_type) as llm:
        outputs = llm.embed(TEXTS, pooling_params=params, use_tqdm=False)
    ids = [reference.ids(text) for text in TEXTS]
    assert len(ids[1]) > 2 * LIMIT
    assert len(ids[1]) % LIMIT
    assert [output.prompt_token_ids for output in outputs] == ids
    pool, normalize = POOLS[pooling_type], use_activation is None
    close(vectors(outputs), [reference.chunked(own, pool, normalize=normalize) for own in ids])


@pytest.mark.parametrize("length", [LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, 2 * LIMIT + 1, 100])
def test_token_ids_of_any_length(llm: LLM, reference: Reference, length: int) -> None:
    ids = [5 + i % 90 for i in range(length)]
    (one,) = llm.embed([ids], use_tqdm=False)
    (two,) = llm.encode([{"prompt_token_ids": ids}], pooling_task="embed", use_tqdm=False)
    close(one.outputs.embedding, reference.chunked(ids))
    close(two.outputs.data, reference.chunked(ids))
    assert one.prompt_token_ids == two.prompt_token_ids == ids


def test_a_decoder(tmp_path: Path) -> None:
    folder = checkpoints.decoder(tmp_path)
    reference = Reference(folder)
    ids = reference.ids(LONG)
    with chunked(folder, pooling_type="LAST") as llm:
        close(vectors(llm.embed(LONG, use_tqdm=False)), [reference.chunked(ids, POOLS["LAST"])])


def test_vectors_that_are_not_of_length_one_are_averaged_as_they_are(tmp_path: Path) -> None:
    folder = checkpoints.write_modules(
        checkpoints.bert(tmp_path), checkpoints.pooling("mean"), checkpoints.dense(checkpoints.HIDDEN, 8)
    )
    reference, weights = Reference(folder), load_file(folder / "2_Dense" / "model.safetensors")

    def dense(states: np.ndarray) -> Any:
        mean = torch.from_numpy(states.mean(0))
        return torch.tanh(weights["linear.weight"] @ mean + weights["linear.bias"]).numpy()

    ids = reference.ids(LONG)
    pooler = {"enable_chunked_processing": True}
    with LLM(model=str(folder), max_model_len=LIMIT, pooler_config=pooler) as llm:
        assert not llm.info.use_activation
        close(vectors(llm.embed(LONG, use_tqdm=False)), [reference.chunked(ids, dense, normalize=False)])


@pytest.mark.parametrize("prompt", ["represent the sentence: ", "represent the sentence: " * 8])
def test_prompts_that_pooling_skips(tmp_path: Path, prompt: str) -> None:
    folder = checkpoints.write_modules(
        checkpoints.bert(tmp_path),
        checkpoints.pooling("mean", include_prompt=False),
        settings={"prompts": {"query": prompt}, "default_prompt_name": "query"},
    )
    reference = Reference(folder)
    ids = reference.ids(prompt + LONG)
    skip = len(reference.ids(prompt)) - 1
    total, counted = np.zeros(checkpoints.HIDDEN), 0
    for i in range(0, len(ids), LIMIT):
        states = reference.states(ids[i : i + LIMIT])[max(0, skip - i) :]
        total, counted = total + states.sum(0), counted + len(states)
    pooler = {"enable_chunked_processing": True}
    with LLM(model=str(folder), max_model_len=LIMIT, pooler_config=pooler) as llm:
        (output,) = llm.embed(LONG, use_tqdm=False, pooling_params=PoolingParams(use_activation=False))
    assert output.prompt_token_ids == ids
    close(output.outputs.embedding, total / counted)


def test_bi_encoder_scores(llm: LLM, reference: Reference) -> None:
    (score,) = llm.score("hello", LONG, use_tqdm=False)
    query, document = (reference.chunked(reference.ids(text)) for text in ("hello", LONG))
    assert score.outputs.score == pytest.approx(float(query @ document), abs=1e-5)


def test_truncation_comes_first(llm: LLM, reference: Reference) -> None:
    ids = reference.ids(LONG, truncation=True, max_length=20)
    for kwargs, own in (
        ({"truncate_prompt_tokens": 20}, ids),
        ({"truncate_prompt_tokens": 20, "truncation_side": "left"}, reference.ids(LONG)[-20:]),
        ({"truncate_prompt_tokens": -1}, reference.ids(LONG)),
        ({"truncate_prompt_tokens": 20, "padding": "max_length"}, ids),
    ):
        (output,) = llm.embed(LONG, tokenization_kwargs=kwargs, use_tqdm=False)
        assert output.prompt_token_ids == own
        close(output.outputs.embedding, reference.chunked(own))


@pytest.mark.parametrize("chunks", [True, False])
def test_padding_fills_up_to_what_the_model_reads(folder: Path, chunks: bool) -> None:
    pooler = {"enable_chunked_processing": chunks}
    with LLM(model=str(folder), max_model_len=LIMIT, pooler_config=pooler) as llm:
        for kwargs in ({"padding": "max_length"}, {"padding": "max_length", "truncate_prompt_tokens": -1}):
            (output,) = llm.embed("hello", tokenization_kwargs=kwargs, use_tqdm=False)
            assert len(output.prompt_token_ids) == LIMIT


def test_max_embed_len(folder: Path, reference: Reference) -> None:
    with chunked(folder, max_embed_len=40) as llm:
        ids = [7] * 40
        close(vectors(llm.embed([ids], use_tqdm=False)), [reference.chunked(ids)])
        with pytest.raises(TooLong, match="maximum context length is 40 tokens.*contains 41 input tokens"):
            llm.embed([[7] * 41], use_tqdm=False)
        with pytest.raises(TooLong, match="maximum context length is 40 tokens.*contains at least 41 input tokens"):
            llm.embed("a " * 10_001, use_tqdm=False)
        cut = reference.ids(LONG, truncation=True, max_length=40)
        (output,) = llm.embed(LONG, tokenization_kwargs={"truncate_prompt_tokens": -1}, use_tqdm=False)
        assert output.prompt_token_ids == cut
        with pytest.raises(BadRequest, match="truncate_prompt_tokens value is greater"):
            llm.embed(LONG, tokenization_kwargs={"truncate_prompt_tokens": 41}, use_tqdm=False)


def test_a_cap_below_what_the_model_reads(folder: Path) -> None:
    for chunks in (False, True):
        pooler = {"max_embed_len": 8, "enable_chunked_processing": chunks}
        with LLM(model=str(folder), pooler_config=pooler) as llm:
            assert len(llm.embed([[7] * 8], use_tqdm=False)) == 1
            with pytest.raises(TooLong, match="maximum context length is 8 tokens.*contains 9 input tokens"):
                llm.embed([[7] * 9], use_tqdm=False)
            (tokens,) = llm.encode([[7] * 9], pooling_task="token_embed", use_tqdm=False)
            assert tokens.outputs.data.shape[0] == 9


def test_a_cap_beyond_what_the_model_reads_needs_blocks(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="max_embed_len is 17.*at most 16 tokens.*enable_chunked_processing"):
        LLM(model=str(folder), max_model_len=LIMIT, pooler_config={"max_embed_len": 17})


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2"])
def test_max_embed_len_is_a_positive_integer(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_embed_len"):
        LLM(pooler_config={"max_embed_len": value})


def test_other_tasks_and_servers_refuse(folder: Path, llm: LLM) -> None:
    with pytest.raises(TooLong, match="maximum context length is 16 tokens"):
        llm.encode(LONG, pooling_task="token_embed", use_tqdm=False)
    with pytest.raises(TooLong, match="Only the task 'embed' alone"):
        llm.encode(LONG, pooling_task=["embed", "token_embed"], use_tqdm=False)
    with (
        LLM(model=str(folder), max_model_len=LIMIT) as plain,
        pytest.raises(TooLong, match="maximum context length is 16 tokens"),
    ):
        plain.embed(LONG, use_tqdm=False)


def test_auto_truncate_cuts_at_the_cap_only(folder: Path, reference: Reference) -> None:
    with chunked(folder, max_embed_len=30, auto_truncate=True) as llm:
        (output,) = llm.embed(LONG, use_tqdm=False)
        (tokens,) = llm.encode(LONG, pooling_task="token_embed", use_tqdm=False)
    assert output.prompt_token_ids == reference.ids(LONG, truncation=True, max_length=30)
    assert tokens.outputs.data.shape[0] == LIMIT


def test_with_a_cache(folder: Path, reference: Reference) -> None:
    with chunked(folder, cache_size=1) as llm:
        first, second = (vectors(llm.embed([LONG, LONG, "hello"], use_tqdm=False)) for _ in range(2))
    assert first == second
    close(first[0], reference.chunked(reference.ids(LONG)))


def test_short_sequences_pass_untouched() -> None:
    engine = FakeEngine(replace(FAKE_INFO, max_model_len=4))
    sequences = [Sequence([1, 2, 3, 4]), Sequence([5])]
    ChunkedEngine(engine).submit(sequences)
    assert all(a is b for a, b in zip(engine.submitted, sequences, strict=True))


def test_progress_counts_sequences() -> None:
    told: list[int] = []
    engine = ChunkedEngine(FakeEngine(replace(FAKE_INFO, max_model_len=4)))
    assert engine.healthy()
    outputs = engine.submit([Sequence([1] * 9), Sequence([2]), Sequence([3] * 5)], progress=told.append).result()
    assert len(outputs) == sum(told) == 3
    told.clear()

    class Slow(FakeEngine):
        def submit(self, sequences: Any, *, progress: Any = None) -> Future[list[Output]]:
            for _ in sequences:
                progress(1)
            return super().submit(sequences)

    engine = ChunkedEngine(Slow(replace(FAKE_INFO, max_model_len=4)))
    engine.submit([Sequence([1] * 9), Sequence([2])], progress=told.append).result()
    assert told == [1, 1]


def test_giving_up_failing_and_closing_reach_the_engine() -> None:
    inner = FakeEngine(replace(FAKE_INFO, max_model_len=4), held=True)
    futures: list[Future[list[Output]]] = []
    submit = inner.submit

    def watched(*args: Any, **kwargs: Any) -> Future[list[Output]]:
        futures.append(submit(*args, **kwargs))
        return futures[-1]

    inner.submit = watched  # type: ignore[method-assign]
    engine = ChunkedEngine(inner)
    future = engine.submit([Sequence([1] * 9)])
    assert not future.done()
    future.cancel()
    assert futures[0].cancelled()
    inner.release()
    other = engine.submit([Sequence([1] * 9)])
    futures[1].cancel()
    assert other.cancelled()
    inner.failures.append(EngineFailed("broken"))
    assert isinstance(engine.submit([Sequence([1] * 9)]).exception(), EngineFailed)
    engine.close()
    assert inner.closed


def test_outputs_are_freed_without_the_garbage_collector() -> None:
    inner = FakeEngine(replace(FAKE_INFO, max_model_len=4), held=True)
    engine = ChunkedEngine(inner)
    gc.disable()
    try:
        future = engine.submit([Sequence([1] * 9)])
        inner.release()
        output = weakref.ref(future.result()[0].data)
        del future
        assert output() is None
    finally:
        gc.enable()


# Late chunking


def late(llm: LLM, texts: Any, size: int, **options: Any) -> Any:
    params = PoolingParams(late_chunking_params=LateChunkingParams(size), **options.pop("params", {}))
    return llm.encode(texts, params, pooling_task="token_embed", use_tqdm=False, **options)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    with LLM(model=str(folder), pooler_config={"pooling_type": "MEAN"}) as made:
        yield made


def means(states: np.ndarray, size: int) -> np.ndarray:
    return np.stack([states[i : i + size].mean(0) for i in range(0, len(states), size)])


@pytest.mark.parametrize("use_activation", [None, False])
@pytest.mark.parametrize("size", [1, 3, 5, 11, 2**63 - 1])
def test_chunks_are_means_of_contextual_states(
    plain: LLM, reference: Reference, size: int, use_activation: bool | None
) -> None:
    texts = [DOCUMENT, "hello", "one two three four five six seven eight"]
    outputs = late(plain, texts, size, params={"use_activation": use_activation})
    for text, output in zip(texts, outputs, strict=True):
        ids = reference.ids(text)
        assert output.prompt_token_ids == ids
        expected = means(reference.states(ids), size)
        assert output.outputs.data.shape == (-(-len(ids) // size), checkpoints.HIDDEN)
        close(output.outputs.data, expected if use_activation is False else unit(expected))
        metadata = output.late_chunking
        assert (metadata.chunk_size, metadata.input_tokens, metadata.strategy) == (size, len(ids), "fixed_tokens")
        ends = [chunk.token_range for chunk in metadata.chunks]
        assert ends == [(i, min(i + size, len(ids))) for i in range(0, len(ids), size)]


@pytest.mark.parametrize(("words", "rows"), [(3, 1), (8, 2), (9, 3)], ids=["one chunk", "two full", "one token more"])
def test_documents_of_whole_chunks(plain: LLM, reference: Reference, words: int, rows: int) -> None:
    text = " ".join(["stone"] * words)
    (output,) = late(plain, text, 5)
    assert len(output.prompt_token_ids) == words + 2
    assert len(output.outputs.data) == len(output.late_chunking.chunks) == rows
    close(output.outputs.data, unit(means(reference.states(reference.ids(text)), 5)))


def test_the_head_comes_after_the_mean(tmp_path: Path) -> None:
    folder = checkpoints.write_modules(
        checkpoints.bert(tmp_path), checkpoints.pooling("mean"), checkpoints.dense(checkpoints.HIDDEN, 8)
    )
    reference, weights = Reference(folder), load_file(folder / "2_Dense" / "model.safetensors")
    states = reference.states(reference.ids(DOCUMENT))
    rows = torch.from_numpy(means(states, 4)) @ weights["linear.weight"].T + weights["linear.bias"]
    with LLM(model=str(folder)) as llm:
        (output,) = late(llm, DOCUMENT, 4, params={"use_activation": True})
    close(output.outputs.data, unit(torch.tanh(rows).numpy()))


def test_beside_other_requests_in_a_batch(plain: LLM, reference: Reference) -> None:
    texts = ["hello", DOCUMENT, DOCUMENT, "stone water"]
    params = [PoolingParams(late_chunking_params=size and LateChunkingParams(size)) for size in (None, 4, 2, 3)]
    outputs = plain.encode(texts, params, pooling_task="token_embed", use_tqdm=False)
    for text, output, size in zip(texts, outputs, (1, 4, 2, 3), strict=True):
        close(output.outputs.data, unit(means(reference.states(reference.ids(text)), size)))
    assert [output.late_chunking and output.late_chunking.chunk_size for output in outputs] == [None, 4, 2, 3]


def test_one_forward_answers_further_tasks(plain: LLM, reference: Reference) -> None:
    params = PoolingParams(late_chunking_params=LateChunkingParams(4))
    (output,) = plain.encode(DOCUMENT, params, pooling_task=["token_embed", "embed"], use_tqdm=False)
    states = reference.states(reference.ids(DOCUMENT))
    close(output.outputs.data, unit(means(states, 4)))
    close(output.outputs.others["embed"].data, unit(states.mean(0)))
    assert output.late_chunking is not None


def test_results_are_cached_by_chunk_size(folder: Path) -> None:
    with LLM(model=str(folder), cache_size=1) as llm:
        for _ in range(2):
            assert [len(late(llm, DOCUMENT, size)[0].outputs.data) for size in (100, 1)] == [
                1,
                late(llm, DOCUMENT, 1)[0].late_chunking.input_tokens,
            ]
            assert [len(late(llm, DOCUMENT, 100)[0].late_chunking.chunks) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("offsets", "size", "prompt", "expected"),
    [
        ([(0, 0), (0, 3), (3, 5), (0, 0)], 2, 0, [((0, 2), (0, 3)), ((2, 4), (3, 5))]),
        ([(0, 0), (0, 3), (3, 5), (0, 0)], 3, 0, [((0, 3), (0, 5)), ((3, 4), None)]),
        ([(0, 0), (0, 3), (3, 5), (0, 0)], 9, 0, [((0, 4), (0, 5))]),
        ([(0, 1), (2, 3), (2, 3)], 2, 0, [((0, 2), (0, 3)), ((2, 3), (2, 3))]),
        ([(4, 6), (0, 2)], 2, 0, [((0, 2), (0, 6))]),
        ([(5, 5), (5, 5), (5, 8)], 2, 0, [((0, 2), None), ((2, 3), (5, 8))]),
        ([(0, 0), (0, 3), (3, 5), (5, 8)], 1, 4, [((0, 1), None), ((1, 2), None), ((2, 3), (0, 1)), ((3, 4), (1, 4))]),
        ([(0, 0), (0, 4)], 2, 4, [((0, 2), None)]),
    ],
    ids=["chunks", "special only", "larger", "shared character", "any order", "empty tokens", "prompt", "prompt only"],
)
def test_ranges(offsets: list[tuple[int, int]], size: int, prompt: int, expected: list[Any]) -> None:
    assert late_chunks(offsets, size, prompt) == [LateChunk(*chunk) for chunk in expected]


@pytest.mark.parametrize("tokenizer", [checkpoints.wordpiece(), checkpoints.byte_level()], ids=["words", "bytes"])
def test_characters_of_any_script(tmp_path: Path, tokenizer: Any) -> None:
    with LLM(model=str(checkpoints.bert(tmp_path, tokenizer=tokenizer)), max_model_len=64) as llm:
        (output,) = late(llm, DOCUMENT, 3)
    chunks = output.late_chunking.chunks
    ranges = [chunk.char_range for chunk in chunks if chunk.char_range is not None]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(DOCUMENT)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(ranges))
    covered = {i for a, b in ranges for i in range(a, b)}
    assert {i for i, c in enumerate(DOCUMENT) if c != " "} <= covered
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()).encode(DOCUMENT)
    fish = next(i for i, (a, b) in enumerate(inner.offsets) if a <= DOCUMENT.index("🐟") < b)
    a, b = chunks[fish // 3].char_range
    assert "🐟" in DOCUMENT[a:b]


def test_lower_casing_moves_no_character(tmp_path: Path) -> None:
    folder = checkpoints.write_modules(
        checkpoints.bert(tmp_path), checkpoints.pooling("mean"), transformer={"do_lower_case": True}
    )
    text = "İ İ stone"  # lower-cased, the first letter is two characters
    with LLM(model=str(folder)) as llm:
        (output,) = late(llm, text, 1)
    assert [c.char_range and text[slice(*c.char_range)] for c in output.late_chunking.chunks] == [
        None,
        "İ",
        "İ",
        "stone",
        None,
    ]


def test_prompts_before_the_text(tmp_path: Path) -> None:
    folder = checkpoints.write_modules(
        checkpoints.bert(tmp_path),
        checkpoints.pooling("mean"),
        settings={"prompts": {"query": "represent: "}, "default_prompt_name": "query"},
    )
    reference = Reference(folder)
    with LLM(model=str(folder)) as llm:
        (default,) = late(llm, "water stone", 2)
        (own,) = late(llm, "water stone", 2, prompt="the ")
    for output, prompt in ((default, "represent: "), (own, "the ")):
        ids = reference.ids(prompt + "water stone")
        assert output.prompt_token_ids == ids
        close(output.outputs.data, means(reference.states(ids), 2))
    assert [c.char_range for c in default.late_chunking.chunks] == [None, (0, 5), (6, 11)]
    assert [c.char_range for c in own.late_chunking.chunks] == [None, (0, 11), None]


def test_special_tokens_may_be_left_out(plain: LLM, reference: Reference) -> None:
    (output,) = late(plain, "water stone", 1, tokenization_kwargs={"add_special_tokens": False})
    ids = reference.ids("water stone", add_special_tokens=False)
    assert output.prompt_token_ids == ids
    close(output.outputs.data, unit(reference.states(ids)))
    assert [c.char_range for c in output.late_chunking.chunks] == [(0, 5), (6, 11)]


def test_a_model_without_special_tokens_has_none_here(tmp_path: Path) -> None:
    folder = checkpoints.write_modules(checkpoints.bert(tmp_path), checkpoints.pooling("mean"))
    settings = {"processing_kwargs": {"text": {"add_special_tokens": False}}}
    checkpoints.write_json(folder / "sentence_bert_config.json", settings)
    with LLM(model=str(folder)) as llm:
        (output,) = late(llm, "water stone", 1)
        (whole,) = llm.encode("water stone", pooling_task="token_embed", use_tqdm=False)
    ids = Reference(folder).ids("water stone", add_special_tokens=False)
    assert output.prompt_token_ids == whole.prompt_token_ids == ids
    assert [c.char_range for c in output.late_chunking.chunks] == [(0, 5), (6, 11)]


@pytest.mark.parametrize("ends", [(2, 10**6), (1, 4)], ids=str)
def test_ends_are_not_for_callers(plain: LLM, ends: tuple[int, ...]) -> None:
    params = PoolingParams(late_chunking_params=LateChunkingParams(4, ends))
    with pytest.raises(BadRequest, match="chunks have `chunk_size` tokens each; leave out `ends`"):
        plain.encode("water stone", params, pooling_task="token_embed", use_tqdm=False)


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "2", 2**63, None])
def test_sizes_that_are_refused(size: Any) -> None:
    with pytest.raises(BadRequest, match="chunk_size must be an integer from 1"):
        LateChunkingParams(size)


def test_parameters_that_are_refused() -> None:
    with pytest.raises(BadRequest, match="must be a LateChunkingParams, got {'chunk_size': 2}"):
        PoolingParams(late_chunking_params={"chunk_size": 2})  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        LateChunkingParams(chunk_size=2, overlap=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ([[5, 6]], {}, "takes plain text, got token ids"),
        ([5, 6], {}, "takes plain text, got token ids"),
        ({"prompt_token_ids": [5, 6]}, {}, "takes plain text, got a prompt with prompt_token_ids"),
        ([("a", "b")], {}, "takes plain text, got tuple"),
        ([{"text": "a", "text_pair": "b"}], {}, "takes plain text, got a prompt with text, text_pair"),
        ("", {}, "takes plain text, got an empty one"),
        (["a", ""], {}, "takes plain text, got an empty one"),
        ({"prompt": ""}, {}, "takes plain text, got an empty one"),
        ("a", {"truncate_prompt_tokens": 5}, "takes no truncate_prompt_tokens"),
        ("a", {"truncate_prompt_tokens": -1}, "takes no truncate_prompt_tokens"),
        ("a", {"truncation_side": "left"}, "takes no truncation_side"),
        (
            "a",
            {"truncate_prompt_tokens": 5, "padding": "max_length"},
            "takes no truncate_prompt_tokens and no padding",
        ),
    ],
)
def test_inputs_that_are_refused(plain: LLM, prompts: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        late(plain, prompts, 2, tokenization_kwargs=kwargs)


def test_too_long_documents_are_refused_also_where_others_are_cut(folder: Path) -> None:
    with LLM(model=str(folder), max_model_len=LIMIT, auto_truncate=True) as llm:
        assert len(late(llm, " ".join(["stone"] * 14), 4)[0].outputs.data) == 4
        with pytest.raises(TooLong, match="maximum context length is 16 tokens.*contains 17 input tokens"):
            late(llm, " ".join(["stone"] * 15), 4)
        with pytest.raises(TooLong, match="at least 17"):
            late(llm, "stone " * 5000, 4)


@pytest.mark.parametrize("task", ["embed", "classify", "token_classify"])
def test_other_tasks_do_not_take_it(tmp_path: Path, task: str) -> None:
    head = "ForTokenClassification" if task == "token_classify" else "ForSequenceClassification"
    folder = checkpoints.classifier(tmp_path, head=head, num_labels=3)
    params = PoolingParams(late_chunking_params=LateChunkingParams(2))
    with (
        LLM(model=str(folder)) as llm,
        pytest.raises(BadRequest, match=rf"Task '{task}' only supports \[.*\['late_chunking_params'\] parameters"),
    ):
        llm.encode("a", params, pooling_task=task, use_tqdm=False)


@pytest.mark.parametrize("score_type", ["bi-encoder", "late-interaction"])
def test_scores_do_not_take_it(plain: LLM, score_type: str) -> None:
    params = PoolingParams(late_chunking_params=LateChunkingParams(2))
    with pytest.raises(BadRequest, match="scored whole"):
        plain.score("a", "b", pooling_params=params, score_type=score_type, use_tqdm=False)


def test_a_python_tokenizer_keeps_no_offsets(tmp_path: Path) -> None:
    with (
        LLM(model=str(checkpoints.bert(tmp_path, tokenizer=ByT5Tokenizer()))) as llm,
        pytest.raises(BadRequest, match="keeps no character offsets"),
    ):
        late(llm, "a", 2)


def test_late_interaction_models_are_refused(plain: LLM) -> None:
    service = plain._service
    renderer = service.renderer
    params = PoolingParams(late_chunking_params=LateChunkingParams(2))
    prompts = renderer.prompts
    try:
        renderer.prompts = replace(prompts, two_sided=True)
        with pytest.raises(BadRequest, match="is a late-interaction model"):
            plain.encode("a", params, pooling_task="token_embed", use_tqdm=False)
    finally:
        renderer.prompts = prompts


# Over HTTP


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    pooler = {"enable_chunked_processing": True, "max_embed_len": 64, "pooling_type": "MEAN"}
    blocks = ModelConfig(
        model=str(folder), served_model_name="blocks", max_model_len=LIMIT, pooler_config=pooler, chat_template=TEMPLATE
    )
    whole = ModelConfig(
        model=str(folder), served_model_name="whole", pooler_config={"pooling_type": "MEAN"}, chat_template=TEMPLATE
    )
    services = [Service.open(config, EngineConfig()) for config in (blocks, whole)]
    with TestClient(build(services, ServerConfig(token_ids="native"))) as client:
        yield client


@pytest.mark.parametrize(
    ("route", "field", "more"),
    [
        ("/v1/embeddings", "embedding", {}),
        ("/pooling", "data", {}),
        ("/pooling", "data", {"task": "embed"}),
    ],
)
def test_long_inputs(client: TestClient, reference: Reference, route: str, field: str, more: dict[str, str]) -> None:
    ids = reference.ids(LONG)
    body = {"model": "blocks", "input": [LONG, "hello"], **more}
    answer = client.post(route, json=body).json()
    close(answer["data"][0][field], reference.chunked(ids))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == len(ids) + 3
    answer = client.post(route, json={"model": "blocks", "input": ids, **more}).json()
    close(answer["data"][0][field], reference.chunked(ids))
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_long_conversations(client: TestClient, reference: Reference) -> None:
    body = {"model": "blocks", "messages": [{"role": "user", "content": LONG}], "add_special_tokens": True}
    answer = client.post("/v1/embeddings", json=body).json()
    close(answer["data"][0]["embedding"], reference.chunked(reference.ids(LONG)))


@pytest.mark.parametrize(
    ("body", "limit"),
    [({"input": [7] * 65}, 64), ({"input": [7] * 17, "task": "token_embed"}, 16), ({"input": LONG * 4}, 64)],
)
def test_limits(client: TestClient, body: dict[str, Any], limit: int) -> None:
    answer = client.post("/pooling", json={"model": "blocks", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert f"maximum context length is {limit} tokens" in error["message"]
    assert error["param"] == "input_tokens"
    plain = client.post("/pooling", json={"model": "whole", "input": [7] * 65})
    assert plain.status_code == 400


def test_requests_at_once(client: TestClient, reference: Reference) -> None:
    expected = {text: reference.chunked(reference.ids(text)) for text in TEXTS}
    faults: list[AssertionError] = []

    def ask(text: str) -> None:
        answer = client.post("/v1/embeddings", json={"model": "blocks", "input": text}).json()
        try:
            close(answer["data"][0]["embedding"], expected[text])
        except AssertionError as fault:
            faults.append(fault)

    threads = [threading.Thread(target=ask, args=(text,)) for text in TEXTS * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize(
    ("route", "field", "more"),
    [
        ("/v1/embeddings", "embedding", {}),
        ("/v1/embeddings", "embedding", {"task": "token_embed"}),
        ("/pooling", "data", {"task": "token_embed"}),
    ],
)
def test_late_chunks(client: TestClient, reference: Reference, route: str, field: str, more: dict[str, Any]) -> None:
    text = "water stone naïve 🐟"
    ids = reference.ids(text)
    body = {"model": "whole", "input": [text, "hello"], "late_chunking_params": {"chunk_size": 4}, **more}
    answer = client.post(route, json=body).json()
    first, second = answer["data"]
    close(first[field], unit(means(reference.states(ids), 4)))
    close(second[field], unit(means(reference.states(reference.ids("hello")), 4)))
    assert list(first) == ["index", "object", field, "late_chunking"]
    words = reference.tokenizer.backend_tokenizer.encode(text).offsets
    assert first["late_chunking"] == {
        "strategy": "fixed_tokens",
        "chunk_size": 4,
        "input_tokens": len(ids),
        "chunks": [
            {"token_range": [0, 4], "char_range": [0, words[3][1]]},
            {"token_range": [4, len(ids)], "char_range": [words[4][0], len(text)] if words[4][1] else None},
        ],
    }
    assert second["late_chunking"]["chunks"] == [{"token_range": [0, 3], "char_range": [0, 5]}]
    assert answer["usage"]["prompt_tokens"] == len(ids) + 3


def test_chunks_of_special_tokens_only_have_no_characters(client: TestClient) -> None:
    body = {"model": "whole", "input": "hello", "late_chunking_params": {"chunk_size": 1}}
    (entry,) = client.post("/v1/embeddings", json=body).json()["data"]
    assert [chunk["char_range"] for chunk in entry["late_chunking"]["chunks"]] == [None, [0, 5], None]


def test_without_it_entries_are_as_ever(client: TestClient) -> None:
    body = {"model": "whole", "input": "hello", "task": "token_embed", "late_chunking": False}
    (entry,) = client.post("/v1/embeddings", json=body).json()["data"]
    assert list(entry) == ["index", "object", "embedding"]
    assert len(entry["embedding"]) == 3


SIZE = {"late_chunking_params": {"chunk_size": 2}}


@pytest.mark.parametrize("route", ["/v1/embeddings", "/pooling"])
@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({**SIZE, "input": [5, 6]}, "takes plain text, got token ids", "input"),
        ({**SIZE, "input": [[5, 6]]}, "takes plain text, got token ids", "input"),
        ({**SIZE, "input": ""}, "got an empty one", "input"),
        ({**SIZE, "messages": [{"role": "user", "content": "a"}]}, "got messages", "late_chunking_params"),
        ({**SIZE, "input": [{"role": "user", "content": "a"}]}, "got messages", "late_chunking_params"),
        ({**SIZE, "truncate_prompt_tokens": 5}, "takes no truncate_prompt_tokens", "truncate_prompt_tokens"),
        ({**SIZE, "truncation_side": "right"}, "takes no truncation_side", "truncation_side"),
        ({**SIZE, "padding": "max_length"}, "takes no padding", "padding"),
        ({**SIZE, "encoding_format": "base64"}, "only the encoding_format 'float', got 'base64'", "encoding_format"),
        ({**SIZE, "task": "embed"}, "Task 'embed' only supports", "late_chunking_params"),
        ({**SIZE, "input": "stone " * 70}, "maximum context length is 64 tokens", "input_tokens"),
    ],
)
def test_refused(client: TestClient, route: str, body: dict[str, Any], message: str, param: str) -> None:
    given = {"model": "whole", "task": "token_embed", **body}
    answer = client.post(route, json=given if "messages" in given else {"input": "a", **given})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("size", [0, -1, True, 1.5, 2.0, "2", 2**63, None])
@pytest.mark.parametrize("route", ["/v1/embeddings", "/pooling"])
def test_refused_sizes(client: TestClient, route: str, size: Any) -> None:
    body = {"model": "whole", "input": "a", "task": "token_embed", "late_chunking_params": {"chunk_size": size}}
    answer = client.post(route, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "body.late_chunking_params.chunk_size"


@pytest.mark.parametrize("params", [{}, {"chunk_size": 2, "overlap": 1}, 2, "2", [2]])
def test_refused_shapes(client: TestClient, params: Any) -> None:
    body = {"model": "whole", "input": "a", "late_chunking_params": params}
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert "late_chunking_params" in answer.json()["error"]["message"]


def test_several_kinds_are_refused(client: TestClient) -> None:
    body = {"model": "whole", "input": "a", "embedding_types": ["colbert", "dense"], **SIZE}
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert "for the task 'token_embed' alone" in answer.json()["error"]["message"]


def test_metadata_is_what_the_offline_api_gives(client: TestClient, plain: LLM) -> None:
    body = {"model": "whole", "input": DOCUMENT, "late_chunking_params": {"chunk_size": 7}}
    (entry,) = client.post("/v1/embeddings", json=body).json()["data"]
    own: LateChunkingMetadata = late(plain, DOCUMENT, 7)[0].late_chunking
    assert entry["late_chunking"]["chunks"] == [
        {"token_range": [*chunk.token_range], "char_range": chunk.char_range and [*chunk.char_range]}
        for chunk in own.chunks
    ]
