"""Prompts with pictures: their tokens by arithmetic, tiles with text among them, and models that take none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cenote.conventions import Pictures
from cenote.core import Media
from cenote.errors import BadRequest, TooLong
from cenote.pipeline import pictures as module
from cenote.pipeline.inputs import Illustrated
from cenote.pipeline.media import Picture
from cenote.pipeline.options import TextOptions
from cenote.pipeline.pictures import PictureRenderer, Placed, kept
from tests.pictured import noise

PLACEHOLDER, ROW = 9, 7
TILES = Pictures("nowhere", "tiles", PLACEHOLDER, "<picture>")


class Tiles:
    """Two tiles of two tokens each, a token before each of them."""

    def __init__(self, pictures: Pictures, processor: Any, tokenize: Any) -> None:
        self.tokenize = tokenize

    def expansion(self, picture: Picture, kwargs: Mapping[str, Any]) -> list[int]:
        return [*self.tokenize("row"), PLACEHOLDER, PLACEHOLDER, *self.tokenize("row"), PLACEHOLDER, PLACEHOLDER]

    def processed(self, picture: Picture, kwargs: Mapping[str, Any]) -> tuple[Media, ...]:
        return tuple(Media(picture.key + bytes([tile]), 2, 4) for tile in range(2))


def renderer(pictures: Pictures = TILES) -> PictureRenderer:
    return PictureRenderer(
        pictures, "tiny", lambda *_: "", lambda text: [ROW], lambda ids: ["<picture>"], has_template=False
    )


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> PictureRenderer:
    monkeypatch.setitem(module.LAYOUTS, "tiles", Tiles)
    monkeypatch.setattr(module, "_processor", lambda folder: None)
    return renderer()


def test_a_picture_may_be_several_tiles_with_text_among_them(tiled: PictureRenderer) -> None:
    opened = tiled.headers(Illustrated((None, None), (noise(20, 20), noise(20, 20, 1))))
    placed = tiled.placed([1, PLACEHOLDER, PLACEHOLDER, 2], opened, {})
    one = [ROW, 9, 9, ROW, 9, 9]
    assert placed.ids == [1, *one, *one, 2]
    assert placed.spans == [(2, 4), (5, 7), (8, 10), (11, 13)]
    media = tiled.media(opened, {}, {})
    assert [medium.tokens for medium in media] == [stop - start for start, stop in placed.spans]
    assert len({medium.key for medium in media}) == 4


def test_a_picture_that_comes_twice_is_processed_once(tiled: PictureRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    original = Tiles.processed

    def processed(self: Tiles, picture: Picture, kwargs: Mapping[str, Any]) -> tuple[Media, ...]:
        seen.append(picture.key)
        return original(self, picture, kwargs)

    monkeypatch.setattr(Tiles, "processed", processed)
    image = noise(20, 20)
    opened = tiled.headers(Illustrated((None, None), (image, image.copy())))
    assert len(tiled.media(opened, {}, {})) == 4
    assert len(seen) == 1


def test_a_model_whose_image_processor_cannot_be_loaded_takes_none() -> None:
    missing = renderer(Pictures("/nowhere", "grid", PLACEHOLDER, "<picture>"))
    with pytest.raises(BadRequest, match="the image processor of tiny cannot be loaded"):
        missing.headers(Illustrated((None,), (noise(20, 20),)))
    refused = renderer(Pictures("", "", refusal="pictures for Tiny are not served yet, only texts"))
    with pytest.raises(BadRequest, match="not served yet"):
        refused.headers(Illustrated((None,), (noise(20, 20),)))


@pytest.mark.parametrize(("side", "first"), [("right", 0), ("left", 3)])
def test_text_is_cut_and_pictures_are_not(side: Any, first: int) -> None:
    placed = Placed([*range(10)], [(4, 6)])
    options = TextOptions(truncate=7, side=side)
    cut = kept(placed, options, cuts_beginnings=side == "left")
    assert cut.ids == [*range(first, first + 7)]
    assert cut.spans == [(4 - first, 6 - first)]
    with pytest.raises(TooLong, match="would cut a picture"):
        kept(placed, options._replace(truncate=5), cuts_beginnings=side == "left")
    assert kept(placed, TextOptions(), cuts_beginnings=True) == placed


def test_arrays_of_a_fixed_layout_have_no_batch() -> None:
    def processor(images: Any, return_tensors: str) -> dict[str, np.ndarray]:
        return {"pixel_values": np.ones((1, 3, 4, 4), np.float32), "mask": np.ones((1, 5), np.int32)}

    fixed = module.Fixed(Pictures("", "fixed", tokens=5, patches=6), processor, lambda text: [])
    opened = Picture(b"key", 20, 20, _image=noise(20, 20))
    (medium,) = fixed.processed(opened, {})
    assert {name: array.shape for name, array in medium.arrays.items()} == {"pixel_values": (3, 4, 4), "mask": (5,)}
    assert (medium.tokens, medium.patches, len(fixed.expansion(opened, {}))) == (5, 6, 5)
