"""`examples/pages.py` over a PDF of a few pages, and a model with random weights: the order of a direct MaxSim."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from cenote import LLM
from tests import pictured
from tests.pictured import noise

pytest.importorskip("pypdfium2", reason="the PDF library is of the extra `dev`")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import pages

QUESTION = "which page has the revenue"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pictured.colqwen2(tmp_path_factory.mktemp("pages") / "colqwen2"))


@pytest.fixture(scope="module")
def pdf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pages of 2 x 3 blocks of noise, at 72 pixels an inch."""
    file = tmp_path_factory.mktemp("pages") / "report.pdf"
    images = [noise(10, 15, seed).resize((200, 300), Image.Resampling.NEAREST) for seed in range(4)]
    images[0].save(file, "PDF", resolution=72, save_all=True, append_images=images[1:])
    return str(file)


def maxsim(llm: LLM, images: list[Any]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Products of all tokens for each page, the scores, and the ids of the first page."""
    options: dict[str, Any] = {"pooling_task": "token_embed", "use_tqdm": False}
    (query,) = llm.encode([QUESTION], input_type="query", **options)
    outputs = [llm.encode([image], **options)[0] for image in images]
    products = [query.outputs.data.numpy() @ output.outputs.data.numpy().T for output in outputs]
    return products, np.array([x.max(axis=1).sum() for x in products]), np.array(outputs[0].prompt_token_ids)


def test_the_order_is_that_of_a_direct_maxsim(
    model: str, pdf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rendered = pages.render(pdf)
    assert [image.size for image in rendered] == [(400, 600)] * 4
    with LLM(model) as llm:
        _, scores, _ = maxsim(llm, rendered)
    assert np.ptp(scores) > 1e-3
    monkeypatch.setattr("sys.argv", ["pages.py", model, pdf, QUESTION, "--top", "4", "--save", str(tmp_path)])
    pages.main()
    shown = re.findall(r"^page (\d): (-?[\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [int(number) - 1 for number, _ in shown] == list(np.argsort(-scores))
    assert [float(score) for _, score in shown] == pytest.approx(sorted(scores, reverse=True), abs=2e-3)
    for number, image in enumerate(rendered, start=1):
        with Image.open(tmp_path / f"page-{number}.png") as saved:
            assert ImageChops.difference(saved, image).getbbox() is not None, "its best patches have frames"


def test_the_patches_that_answered_are_the_best_of_each_token(model: str, pdf: str) -> None:
    rendered = pages.render(pdf)
    with LLM(model) as llm:
        products, _, ids = maxsim(llm, rendered)
        index = pages.Index(llm, rendered)
        answers = index.answers(QUESTION, 2)
        tokens, _ = index.query(QUESTION)
        placeholder = llm._service.renderer.pictures.pictures.placeholder  # type: ignore[union-attr]
    page = index.pages[2]
    patches = np.flatnonzero(ids == placeholder)
    assert page.patches.tolist() == patches.tolist()
    rows, columns = page.grid
    assert rows * columns == len(patches)
    assert 1.2 < rows / columns < 1.8, "a page of 2 x 3"
    best = products[2][:, patches]
    assert sorted(answer.token for answer in answers) == sorted(tokens)
    assert [answer.product for answer in answers] == pytest.approx(sorted(best.max(axis=1), reverse=True), abs=1e-4)
    first = answers[0]
    patch = int(np.unravel_index(best.argmax(), best.shape)[1])
    left, upper = patch % columns * 400 / columns, patch // columns * 600 / rows
    assert first.box[:2] == (int(left), int(upper))
    assert (first.box[2] - first.box[0], first.box[3] - first.box[1]) == pytest.approx(
        (400 / columns, 600 / rows), abs=1
    )
