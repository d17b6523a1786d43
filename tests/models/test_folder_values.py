"""Sentence-Transformers folders with values that need more files, or that inputs of some kind show, and that library.

Another checkpoint's tokenizer, modules over the states of all tokens before pooling, the text of a pair that is cut,
and tokens that alone are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from cenote import LLM
from cenote.errors import CheckpointError, TooLong
from tests import checkpoints
from tests.checkpoints import HIDDEN, Module, dense, pooling

TEXTS = ["The quick brown fox jumps over the lazy dog.", "one TWO three", "a", "hello, water stone! my name is a pit"]
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
OVER_TOKENS = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
STATES = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
CLASSES = {
    "transformer_task": "sequence-classification",
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "scores",
}


def folder_of(path: Path, *modules: Module, kind: str = "SentenceTransformer", **transformer: Any) -> Path:
    folder = checkpoints.bert(path / "model")
    settings = {"model_type": kind}
    return checkpoints.write_modules(folder, *modules, transformer={**STATES, **transformer}, settings=settings)


def embedded(folder: Path, **options: Any) -> np.ndarray:
    with LLM(model=str(folder), **options) as llm:
        return np.array([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])


def agree(folder: Path) -> np.ndarray:
    """Assert that vectors are the reference's, in Cenote's fastest layout and without any pass; return them."""
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, show_progress_bar=False)
    scale = max(1.0, float(np.abs(expected).max()))
    for options in ({}, {"plain": True}):
        np.testing.assert_allclose(embedded(folder, **options), expected, rtol=0, atol=2e-5 * scale)
    return expected


# Modules over the states of all tokens


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken", "weightedmean", ("cls", "mean")], ids=str)
def test_a_dense_before_pooling(tmp_path: Path, mode: str | tuple[str, ...]) -> None:
    """Its activation makes it another one than behind the pooling."""
    modes = (mode,) if isinstance(mode, str) else mode
    layer = dense(HIDDEN, 48, activation=TANH, **OVER_TOKENS)
    vectors = agree(folder_of(tmp_path, layer, pooling(*modes, width=48)))
    assert vectors.shape == (len(TEXTS), 48 * len(modes))
    assert np.abs(vectors).max() <= 1.0


def test_several_modules_before_and_behind_the_pooling(tmp_path: Path) -> None:
    before = (dense(HIDDEN, 24, **OVER_TOKENS), Module("Normalize", OVER_TOKENS), dense(24, 40, seed=1, **OVER_TOKENS))
    folder = folder_of(tmp_path, *before, pooling("mean", width=40), dense(40, 16, seed=2), checkpoints.NORMALIZE)
    np.testing.assert_allclose(np.linalg.norm(agree(folder), axis=1), 1.0, atol=1e-5)
    with LLM(model=str(folder)) as llm:
        assert llm.info.dimension == 16
        (rows,) = llm.encode(TEXTS[1], pooling_task="token_embed", use_tqdm=False)
        assert rows.outputs.data.shape[1] == 16


def test_a_cross_encoder_with_a_dense_over_tokens(tmp_path: Path) -> None:
    head = dense(48, 1, activation=IDENTITY, module_output_name="scores", module_input_name="sentence_embedding")
    folder = folder_of(tmp_path, dense(HIDDEN, 48, **OVER_TOKENS), pooling("mean", width=48), head, kind="CrossEncoder")
    pairs = [(TEXTS[1], TEXTS[0]), (TEXTS[3], TEXTS[1])]
    expected = CrossEncoder(str(folder), device="cpu").predict(pairs, show_progress_bar=False)
    assert scored(folder, pairs) == pytest.approx(expected, abs=2e-5)


def test_modules_over_tokens_need_a_pooling(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dense(HIDDEN, 48, **OVER_TOKENS))
    with pytest.raises(CheckpointError, match="modules over token embeddings, and no Pooling behind them"):
        LLM(model=str(folder))


# Another checkpoint's tokenizer


@pytest.mark.parametrize("named", ["tokenizer", "nothing"])
def test_a_tokenizer_elsewhere(tmp_path: Path, named: str) -> None:
    """A lower-casing one, in place of the folder's own."""
    checkpoints.wordpiece(lowercase=True).save_pretrained(tmp_path / "tokenizer")
    folder = folder_of(tmp_path, pooling("mean"), tokenizer_name_or_path=str(tmp_path / named))
    if named == "nothing":
        with pytest.raises(CheckpointError, match="there is no folder"):
            LLM(model=str(folder))
        return
    vectors = agree(folder)
    checkpoints.edit_json(folder / "sentence_bert_config.json", tokenizer_name_or_path=None)
    assert np.abs(vectors - embedded(folder)).max() > 1e-2
    mine = embedded(folder, tokenizer=str(tmp_path / "tokenizer"))
    np.testing.assert_allclose(mine, vectors, rtol=0, atol=2e-5)


# The text of a pair that is cut


def scored(folder: Path, pairs: list[tuple[str, str]], **options: Any) -> list[float]:
    with LLM(model=str(folder), auto_truncate=True, **options) as llm:
        return [llm.score(*pair, use_tqdm=False)[0].outputs.score for pair in pairs]


CUTS: list[Any] = [
    pytest.param(cuts, part, side, id=f"{cuts}-{part}-{side}")
    for cuts in (True, "longest_first", "only_first", "only_second")
    for part in ("text", "common")
    for side in ("right", "left")
]
"""The key is read from both parts alike: `make test` has two of the other part's."""


@pytest.mark.parametrize(("cuts", "part", "side"), CUTS)
def test_the_text_that_is_cut(tmp_path: Path, cuts: Any, part: str, side: str) -> None:
    folder = checkpoints.classifier(tmp_path / "model", num_labels=1)
    transformer = {
        **CLASSES,
        "max_seq_length": 20,
        "processing_kwargs": {part: {"truncation": cuts}},
        "processor_kwargs": {"truncation_side": side},
    }
    checkpoints.write_modules(folder, transformer=transformer, settings={"model_type": "CrossEncoder"})
    pairs = [(TEXTS[0], TEXTS[3]), (TEXTS[3], TEXTS[0]), (TEXTS[1], TEXTS[2])]
    expected = CrossEncoder(str(folder), device="cpu").predict(pairs, show_progress_bar=False)
    assert scored(folder, pairs) == pytest.approx(expected, abs=2e-5)
    if isinstance(cuts, str) and cuts != "longest_first":
        checkpoints.edit_json(folder / "sentence_bert_config.json", processing_kwargs=None)
        others = CrossEncoder(str(folder), device="cpu").predict(pairs[:2], show_progress_bar=False)
        assert np.abs(others - expected[:2]).min() > 1e-4


def test_a_text_that_cannot_be_cut_enough(tmp_path: Path) -> None:
    """The reference raises too, and so does Cenote for that pair alone."""
    folder = checkpoints.classifier(tmp_path / "model", num_labels=1)
    transformer = {**CLASSES, "max_seq_length": 12, "processing_kwargs": {"text": {"truncation": "only_first"}}}
    checkpoints.write_modules(folder, transformer=transformer, settings={"model_type": "CrossEncoder"})
    pair = (TEXTS[1], TEXTS[0])
    with pytest.raises(Exception, match="too short to respect"):
        CrossEncoder(str(folder), device="cpu").predict([pair], show_progress_bar=False)
    with pytest.raises(TooLong, match="cut one of its texts alone, of which nothing would be left"):
        scored(folder, [pair])


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<end>"


LENGTHS = [
    pytest.param(side, restores, length, id=f"{side}-{'end put back' if restores else 'end cut off'}-{length}")
    for side in ("right", "left")
    for restores in (True, False)
    for length in (100, 60, 40)
]
"""`make test` has the other lengths with two of the four ways to cut."""


@pytest.mark.parametrize(("side", "restores", "length"), LENGTHS)
def test_a_pair_of_messages_is_cut_like_a_text(tmp_path: Path, side: str, restores: bool, length: int) -> None:
    """Its template and its query too, as far as the length asks."""
    tokenizer = checkpoints.byte_level(chat_template=TEMPLATE)
    options = {"num_labels": 1, "pad_token_id": 0, "max_position_embeddings": 256}
    folder = checkpoints.classifier(tmp_path / "model", "Qwen3", tokenizer=tokenizer, **options)
    entry = {"method": "forward", "method_output_name": "logits"}
    transformer = {
        **CLASSES,
        "modality_config": {"text": entry, "message": {**entry, "format": "flat"}},
        "max_seq_length": length,
        "processor_kwargs": {"truncation_side": side},
        "processing_kwargs": {"chat_template": {"restore_suffix": restores}},
    }
    checkpoints.write_modules(folder, transformer=transformer, settings={"model_type": "CrossEncoder"})
    pairs = [(TEXTS[2], TEXTS[3] + TEXTS[0]), (TEXTS[1], TEXTS[0]), (TEXTS[3], TEXTS[0] + TEXTS[3] * 2)]
    expected = CrossEncoder(str(folder), device="cpu").predict(pairs, show_progress_bar=False)
    assert scored(folder, pairs) == pytest.approx(expected, abs=2e-5)


# Tokens that alone are compared


def test_documents_keep_only_some_tokens(tmp_path: Path) -> None:
    """A document without any of them has no vector, and its score is that of the reference."""
    vocabulary = checkpoints.wordpiece().get_vocab()
    kept = [vocabulary[word] for word in ("fox", "one", "three", ",")]
    mask = Module("MultiVectorMask", {"skiplist_words": [","], "keep_only_token_ids": kept})
    layer = dense(HIDDEN, 16, bias=False, activation=IDENTITY, **OVER_TOKENS)
    folder = folder_of(tmp_path, layer, mask, Module("Normalize", OVER_TOKENS), kind="MultiVectorEncoder")
    model = MultiVectorEncoder(str(folder), device="cpu")
    documents = [text for text in TEXTS if text != "a"]
    expected = model.encode_document(documents, show_progress_bar=False)
    assert [len(rows) for rows in expected] == [1, 2, 0]
    with LLM(model=str(folder)) as llm:
        outputs = llm.encode(documents, pooling_task="token_embed", input_type="document", use_tqdm=False)
        for output, rows in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output.outputs.data.numpy(), rows, rtol=0, atol=2e-5)
        (query,) = llm.encode("one fox", pooling_task="token_embed", input_type="query", use_tqdm=False)
        reference = model.encode_query(["one fox"], show_progress_bar=False)
        np.testing.assert_allclose(query.outputs.data.numpy(), reference[0], rtol=0, atol=2e-5)
        scores = [output.outputs.score for output in llm.score("one fox", documents, use_tqdm=False)]
    similarity = model.similarity(reference, expected)
    assert scores == pytest.approx(similarity[0].tolist(), rel=1e-5, abs=2e-5)
    assert scores[2] == -1e9
