"""Pictures in a batch: each content once, found by explicit spans, and never taken for another by its ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cenote.conventions import Pictures
from cenote.core import Media, Sequence
from cenote.engine.cache import key_of
from cenote.engine.equal import distinct
from cenote.tensors import sharing
from cenote.tensors.packing import pack
from cenote.tensors.positions import mrope, positions_of
from cenote.tensors.sharing import common_prefix, share

PLACEHOLDER = 9
BEGIN, END = [1] * sharing.SHORTEST_PREFIX, [2, 3]


def picture(content: str, tokens: int = 4, grid: tuple[int, ...] = (1, 4, 4)) -> Media:
    return Media(content.encode(), tokens, 16, grid, {"pixel_values": np.full((16, 2), ord(content[0]), np.float32)})


def page(*pictures: Media, positions: np.ndarray | None = None) -> Sequence:
    ids, spans = list(BEGIN), []
    for one in pictures:
        spans.append((len(ids), len(ids) + one.tokens))
        ids += [PLACEHOLDER] * one.tokens
    return Sequence([*ids, *END], media=pictures, spans=tuple(spans), positions=positions)


def test_a_picture_is_there_once_by_its_content() -> None:
    batch = pack([page(picture("a"), picture("b")), Sequence([5, 6]), page(picture("b"))])
    assert [medium.key for medium in batch.media] == [b"a", b"b"]
    assert batch.sources_T is not None
    first, text, second = batch.split(batch.sources_T)
    assert first.tolist() == [-1] * len(BEGIN) + [0, 1, 2, 3, 4, 5, 6, 7, -1, -1]
    assert text.tolist() == [-1, -1]
    assert second.tolist() == [-1] * len(BEGIN) + [4, 5, 6, 7, -1, -1]
    part, _ = batch.select([2])
    assert part.sources_T is not None
    assert part.sources_T.tolist() == second.tolist()


def test_pages_of_the_same_ids_share_no_picture() -> None:
    pages = [page(picture("a")), page(picture("b")), page(picture("a"))]
    assert pages[0].ids == pages[1].ids
    assert common_prefix(pages) == len(BEGIN)
    shared = share(pack(pages))
    assert shared is not None
    assert shared.batch.host_sources_T is not None
    expanded = shared.batch.host_sources_T[shared.expand_T]
    assert expanded.tolist() == pack(pages).host_sources_T.tolist()  # type: ignore[union-attr]
    assert common_prefix([pages[0], pages[2]]) == len(BEGIN) + 4 + len(END) - 1


def test_sequences_of_different_salts_share_neither_pictures_nor_prefixes() -> None:
    """Whether somebody else has sent a picture, or a beginning, would show in the time that a forward takes."""
    pages = [replace(page(picture("a")), salt=salt) for salt in ("one", "two", "one", None)]
    batch = pack(pages)
    assert len({medium.key for medium in batch.media}) == 3
    assert batch.sources_T is not None
    assert [int(sources_L.max()) for sources_L in batch.split(batch.sources_T)] == [3, 7, 3, 11]
    assert batch.media[2].key == b"a", "without a salt the key is that of the content"
    assert batch.media[0].key == pack(pages[2:]).media[0].key, "in every batch the same"
    shared = share(batch)
    assert shared is not None
    length = len(pages[0])
    assert shared.batch.tokens == 3 * length + 1, "of the pair with one salt, the second has its last token alone"
    assert share(pack(pages[:2])) is None


def test_a_literal_placeholder_is_a_token_like_any_other() -> None:
    batch = pack([Sequence([PLACEHOLDER, PLACEHOLDER]), page(picture("a"))])
    assert batch.sources_T is not None
    assert batch.split(batch.sources_T)[0].tolist() == [-1, -1]


def test_equal_inputs_are_those_with_equal_pictures() -> None:
    pages = [page(picture("a")), page(picture("b")), page(picture("a"))]
    assert distinct(pages) == [[0, 2], [1]]
    assert key_of(pages[0]) == key_of(pages[2]) != key_of(pages[1])
    turned = page(picture("a", grid=(1, 2, 8)))
    assert key_of(turned) != key_of(pages[0])
    assert key_of(page(picture("a"), picture("b"))) != key_of(page(picture("b"), picture("a")))


def test_positions_are_those_of_each_sequence() -> None:
    pictures = Pictures("", "grid", merge=2, positions="mrope")
    one = picture("a")
    spans = [(2, 6)]
    positions_3L = positions_of(pictures, 8, [one], spans)
    assert positions_3L is not None
    # two tokens, a picture of 2 x 2 from position 2, and text that goes on 2 later
    assert positions_3L.tolist() == [[0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]]
    sequence = Sequence([1] * 8, media=(one,), spans=tuple(spans), positions=positions_3L)
    batch = pack([Sequence([7, 7, 7]), sequence])
    assert batch.positions_T.shape == (3, 11)
    assert batch.positions_T[:, :3].tolist() == [[0, 1, 2]] * 3
    assert batch.positions_T[:, 3:].tolist() == positions_3L.tolist()
    assert positions_of(pictures, 3, [], []) is None


def test_a_wide_picture_moves_the_text_behind_it_by_its_longer_side() -> None:
    assert mrope(9, [(1, 7)], [(1, 4, 6)], 2)[:, 7:].tolist() == [[4, 5]] * 3
