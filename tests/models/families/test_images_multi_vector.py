"""Folders of sentence-transformers' `MultiVectorEncoder` over ColPali and ColQwen2: its rows, one input at a time."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sentence_transformers import MultiVectorEncoder

from cenote import LLM
from cenote.errors import CheckpointError
from tests import checkpoints, pictured
from tests.pictured import noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUERIES = ["what is the revenue", "page page page", "figure, in this chart."]
PAGES = [noise(90, 130), noise(300, 60), noise(90, 130, seed=1)]
TOLERANCE = 2e-5
"""Largest difference of rows of length 1."""
PLACEHOLDERS = {"colpali": "<image>", "colqwen2": "<|image_pad|>"}
MAKERS: dict[str, Callable[[Path], Path]] = {"colpali": pictured.colpali, "colqwen2": pictured.colqwen2}


class Case:
    """A folder that sentence-transformers has saved, loaded there and here."""

    def __init__(self, kind: str, folder: Path, mask: dict[str, Any], settings: dict[str, Any]) -> None:
        self.folder = folder / "saved"
        plain = MAKERS[kind](folder / kind)
        model = MultiVectorEncoder(str(plain), device="cpu", processor_kwargs={"backend": "pil"})
        model.save_pretrained(str(self.folder))
        assert checkpoints.read_json(self.folder / "sentence_bert_config.json")["transformer_task"] == "retrieval"
        checkpoints.edit_json(self.folder / "1_MultiVectorMask" / "config.json", **mask)
        checkpoints.edit_json(self.folder / "config_sentence_transformers.json", **settings)
        self.model = MultiVectorEncoder(str(self.folder), device="cpu", processor_kwargs={"backend": "pil"})
        self.llm = LLM(str(self.folder))

    def queries(self, texts: list[str], **options: Any) -> list[np.ndarray]:
        return [self.model.encode_query([text], **options)[0].numpy() for text in texts]

    def pages(self, pages: list[Any], **options: Any) -> list[np.ndarray]:
        return [self.model.encode_document([page], **options)[0].numpy() for page in pages]

    def rows(self, inputs: list[Any], side: str) -> list[np.ndarray]:
        outputs = self.llm.encode(inputs, use_tqdm=False, pooling_task="token_embed", input_type=side)
        return [output.outputs.data.numpy() for output in outputs]


@pytest.fixture(scope="module", params=[*MAKERS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = Case(request.param, tmp_path_factory.mktemp("multi") / request.param, {}, {})
    yield made
    made.llm.close()


def assert_close(rows: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for own, one in zip(rows, expected, strict=True):
        assert own.shape == one.shape
        assert np.abs(own - one).max() < TOLERANCE


def test_rows_and_scores_are_those_of_sentence_transformers(case: Case) -> None:
    assert case.llm.info.report.layout == "packed"
    assert (case.llm.info.tasks[0], case.llm.info.score_types[0]) == ("token_embed", "late-interaction")
    queries, pages = case.queries(QUERIES), case.pages(PAGES)
    assert_close(case.rows(QUERIES, "query"), queries)
    assert_close(case.rows(PAGES, "document"), pages)
    assert_close(case.rows(QUERIES, "document"), case.pages(QUERIES))
    assert np.abs(pages[0] - pages[2]).max() > 0.1, "another picture, other rows"
    scores = [output.outputs.score for output in case.llm.score(QUERIES[0], PAGES, use_tqdm=False)]
    expected = [float(case.model.similarity([queries[0]], [page])[0][0]) for page in pages]
    assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", [*MAKERS])
def test_the_mask_and_the_prompts_of_the_files(kind: str, tmp_path: Path) -> None:
    """Patches alone are scored in pages, punctuation is left out of both sides, and a prompt stands before a query."""
    tokenizer = pictured.vocabulary(MAKERS[kind](tmp_path / "ids"))
    mask = {
        "keep_only_token_ids": [tokenizer[PLACEHOLDERS[kind]]],
        "skiplist_words": [",", "."],
        "skiplist_tasks": ["query", "document"],
    }
    prompts = {"prompts": {"query": "search: ", "document": ""}}
    made = Case(kind, tmp_path / "made", mask, prompts)
    pages = made.pages(PAGES)
    assert len(pages[0]) < len(made.model.tokenize([PAGES[0]])["input_ids"][0])
    assert_close(made.rows(PAGES, "document"), pages)
    assert np.abs(pages[0] - pages[2]).max() > 0.1, "another picture, other rows"
    assert_close(made.rows(QUERIES, "query"), made.queries(QUERIES))
    prompted, bare = made.queries(QUERIES)[0], made.queries(QUERIES, prompt="")[0]
    assert np.abs(prompted[-1] - bare[-1]).max() > 1e-3, "another prompt, other rows"
    made.llm.close()


def test_lengths_of_sides_are_refused(case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    checkpoints.edit_json(folder / "sentence_bert_config.json", query_length=20)
    with pytest.raises(CheckpointError, match="query_length, document_length and query_expansion are not honoured"):
        LLM(str(folder))
