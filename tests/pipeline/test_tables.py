"""Tokens and types beyond the model's tables, text that is no Unicode, and prompts that are neither text nor ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from cenote import LLM
from cenote.errors import BadRequest
from tests.checkpoints import bert, classifier, wordpiece

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def short_table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose tokenizer knows a token more than the embedding has rows: nobody has resized it."""
    tokenizer = wordpiece()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    folder = bert(tmp_path_factory.mktemp("tables") / "short", tokenizer=tokenizer, vocab_size=rows)
    with LLM(str(folder)) as llm:
        yield llm, rows


def test_a_token_beyond_the_embedding_is_refused_by_name(short_table: Any) -> None:
    llm, rows = short_table
    for prompt in ("see <image>", ["well", "see <image> two"]):
        with pytest.raises(BadRequest, match=rf"the token '<image>' \(id {rows}\).* 0 to {rows - 1}"):
            llm.embed(prompt, use_tqdm=False)
    assert len(llm.embed(["well"], use_tqdm=False)) == 1


def test_the_report_warns_of_tokens_beyond_the_embedding(short_table: Any) -> None:
    llm, rows = short_table
    (warning,) = [text for text in llm.info.report.warnings if "tokenizer" in text]
    assert f"1 tokens more than the {rows} rows" in warning
    assert "'<image>'" in warning


def test_tokens_beyond_the_embedding_of_pairs_chunks_and_entities(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": rows}
    with LLM(str(classifier(tmp_path / "pairs", num_labels=1, **options))) as llm:
        with pytest.raises(BadRequest, match="'<image>'"):
            llm.score("one", ["two", "<image>"], use_tqdm=False)
        with pytest.raises(BadRequest, match="'<image>'"):
            llm.classify([("one <image>", "two")], use_tqdm=False)
    folder = classifier(tmp_path / "entities", head="ForTokenClassification", num_labels=2, **options)
    with LLM(str(folder)) as llm, pytest.raises(BadRequest, match="'<image>'"):
        llm.token_classify("one <image>", use_tqdm=False)


def test_a_type_beyond_the_table_is_refused(tmp_path: Path) -> None:
    with LLM(str(classifier(tmp_path / "one type", num_labels=1, type_vocab_size=1))) as llm:
        assert llm.info.type_vocab_size == 1
        with pytest.raises(BadRequest, match="tokens of type 1, but one type knows types below 1"):
            llm.score("one", ["two"], use_tqdm=False)
        assert len(llm.classify(["one"], use_tqdm=False)) == 1
    with LLM(str(classifier(tmp_path / "two types", num_labels=1))) as llm:
        assert llm.info.type_vocab_size == 2
        assert len(llm.score("one", ["two"], use_tqdm=False)) == 1


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_text_that_is_no_unicode_is_refused_alike(tmp_path: Path, kind: str) -> None:
    tokenizer = wordpiece() if kind == "fast" else ByT5Tokenizer()
    with LLM(str(classifier(tmp_path / "model", num_labels=1, tokenizer=tokenizer))) as llm:
        assert llm._service.renderer.renders_quickly == (kind == "fast")
        for call in (
            lambda: llm.embed(["well", "a\ud800b"], use_tqdm=False),
            lambda: llm.embed(["a\udfff" * 100], tokenization_kwargs={"truncate_prompt_tokens": 5}, use_tqdm=False),
            lambda: llm.score("a", ["b", "\ud800"], use_tqdm=False),
            lambda: llm.rerank("\ud800", ["b"], use_tqdm=False),
            lambda: llm.rerank("a", ["b\ud800"], max_tokens_per_doc=3, use_tqdm=False),
        ):
            with pytest.raises(BadRequest, match="valid Unicode"):
                call()
        assert len(llm.classify(["a\0b", "\0", "\0" * 5], use_tqdm=False)) == 3, "NUL is a character as any other"


@pytest.mark.parametrize(
    "prompt",
    [
        b"x",
        bytearray(b"x"),
        pytest.param(memoryview(b"x"), id="memoryview"),
        [True],
        [5, True],
        [[False, 5]],
        pytest.param(np.array([True]), id="array of bool"),
        5,
        [None],
        [1.5],
    ],
    ids=repr,
)
def test_neither_text_nor_ids_is_refused(short_table: Any, prompt: Any) -> None:
    llm, _ = short_table
    with pytest.raises(BadRequest):
        llm.embed(prompt, use_tqdm=False)


@pytest.mark.parametrize("prompt", [[5, 6], (5, 6), np.array([5, 6]), [np.int32(5), 6], [[5, 6]]], ids=repr)
def test_ids_of_any_kind_are_taken(short_table: Any, prompt: Any) -> None:
    llm, _ = short_table
    (output,) = llm.embed(prompt, use_tqdm=False)
    assert output.prompt_token_ids == [5, 6]
