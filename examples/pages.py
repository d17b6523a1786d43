"""Search in the pages of a PDF as pictures: the best ones for a question, and the patches of them that answered.

    python examples/pages.py MODEL report.pdf "Which year had the highest revenue?" [--top 3] [--save FOLDER]

MODEL compares the tokens of a query with those of a page (ColPali, ColQwen2, ColQwen3). Each token of the query counts
at the patch that it likes best (MaxSim); these patches are printed, and framed in the pictures that `--save` writes. It
needs pypdfium2 and `cenote[media]`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pypdfium2
from PIL import ImageDraw

from cenote import LLM

if TYPE_CHECKING:
    from PIL.Image import Image

    from cenote.outputs import PoolingRequestOutput

PIXELS_PER_POINT = 2.0
"""144 pixels an inch."""


def render(file: str) -> list[Image]:
    """The pages of a PDF as pictures."""
    with pypdfium2.PdfDocument(file) as document:
        return [page.render(scale=PIXELS_PER_POINT).to_pil().convert("RGB") for page in document]


@dataclass(frozen=True)
class Answer:
    """A patch of a page that a token of the query likes best.

    Attributes:
        token: of the query.
        box: left, upper, right and lower edge of the patch, in pixels of the page.
        product: of token and patch, a part of the page's score.
    """

    token: str
    box: tuple[int, int, int, int]
    product: float


@dataclass(frozen=True)
class Page:
    """A page that is searched.

    Attributes:
        image: the page.
        rows: `[T, D]` vectors of all its tokens, of length 1.
        patches: rows that are vectors of patches, from left to right and from above.
    """

    image: Image
    rows: np.ndarray
    patches: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches: all of them, in about the proportions of the page."""
        count, ratio = len(self.patches), self.image.height / self.image.width
        shapes = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
        return min(shapes, key=lambda shape: abs(np.log(shape[0] / shape[1] / ratio)))

    def box(self, patch: int) -> tuple[int, int, int, int]:
        """The edges of a patch."""
        rows, columns = self.grid
        row, column = divmod(patch, columns)
        width, height = self.image.width / columns, self.image.height / rows
        return int(column * width), int(row * height), int((column + 1) * width), int((row + 1) * height)


class Index:
    """The pages of a document, and a model that compares them with questions."""

    def __init__(self, llm: LLM, images: list[Image]) -> None:
        self._llm = llm
        self._outputs = llm.encode(images, pooling_task="token_embed", input_type="document")
        self.pages = [_page(image, output) for image, output in zip(images, self._outputs, strict=True)]

    def query(self, text: str) -> tuple[list[str], np.ndarray]:
        """The tokens of a question, and their vectors `[T, D]`."""
        (output,) = self._llm.encode([text], pooling_task="token_embed", input_type="query", use_tqdm=False)
        tokens = self._llm.get_tokenizer().convert_ids_to_tokens(list(output.prompt_token_ids))
        return tokens, output.outputs.data.numpy()

    def scores(self, text: str) -> np.ndarray:
        """The score of each page: for each token of the question its largest product, all added up."""
        output = self._llm.encode([text], pooling_task="token_embed", input_type="query", use_tqdm=False)
        return self._llm.similarity(output, self._outputs)[0].numpy()

    def answers(self, text: str, number: int) -> list[Answer]:
        """The patch of a page that each token of the question likes best, the largest products first."""
        tokens, rows = self.query(text)
        page = self.pages[number]
        products = rows @ page.rows[page.patches].T
        found = [
            Answer(token, page.box(int(patch)), float(of_token[patch]))
            for token, of_token, patch in zip(tokens, products, products.argmax(axis=1), strict=True)
        ]
        return sorted(found, key=lambda answer: -answer.product)


def _page(image: Image, output: PoolingRequestOutput) -> Page:
    """A page with its vectors; the token that it has most often stands for its patches."""
    ids = np.array(output.prompt_token_ids)
    ((placeholder, _),) = Counter(ids.tolist()).most_common(1)
    return Page(image, output.outputs.data.numpy(), np.flatnonzero(ids == placeholder))


def framed(page: Page, answers: list[Answer]) -> Image:
    """The picture of a page with a frame around each answer."""
    image = page.image.copy()
    draw = ImageDraw.Draw(image)
    for answer in answers:
        draw.rectangle(answer.box, outline="red", width=3)
    return image


def main() -> None:
    """Render, index, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("question")
    parser.add_argument("--top", type=int, default=3, help="pages that are shown")
    parser.add_argument("--patches", type=int, default=5, help="patches of each")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the best pages, with frames")
    options = parser.parse_args()
    with LLM(options.model) as llm:
        index = Index(llm, render(options.file))
        scores = index.scores(options.question)
        for number in map(int, np.argsort(-scores, kind="stable")[: options.top]):
            answers = index.answers(options.question, number)[: options.patches]
            print(f"page {number + 1}: {scores[number]:.3f}")
            for answer in answers:
                print(f"  {answer.product:6.3f}  {answer.token:<20} at {answer.box}")
            if options.save:
                options.save.mkdir(parents=True, exist_ok=True)
                framed(index.pages[number], answers).save(options.save / f"page-{number + 1}.png")


if __name__ == "__main__":
    main()
