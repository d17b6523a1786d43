"""Prompts of a call are rendered in parts, so that the model runs while the next ones are decoded."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote import LLM
from cenote.calls import PICTURED_AT_ONCE, RENDERED_AT_ONCE, _parts
from cenote.core import Media, Sequence
from cenote.engine import waiting
from tests import PATIENCE, pictured
from tests.pictured import noise, saved

if TYPE_CHECKING:
    from pathlib import Path

A = noise(20, 20)
PICTURES: list[Any] = [A, saved(A), {"image": A, "text": "x"}, {"prompt": "<x>", "multi_modal_data": {"image": A}}]


@pytest.mark.parametrize("picture", PICTURES)
def test_prompts_with_pictures_are_fewer_at_a_time(picture: Any) -> None:
    def sizes(prompts: list[Any]) -> list[int]:
        return [len(prompts[part]) for part in _parts(prompts)]

    assert sizes([picture] * (2 * PICTURED_AT_ONCE + 1)) == [PICTURED_AT_ONCE, PICTURED_AT_ONCE, 1]
    assert sizes(["a"] * (RENDERED_AT_ONCE + 1)) == [RENDERED_AT_ONCE, 1]
    assert sizes([{"text": "a"}, [1, 2], {"prompt": "a"}]) == [3]
    half = ["a"] * (RENDERED_AT_ONCE // 2)
    rest = PICTURED_AT_ONCE // 2
    assert sizes([*half, *[picture] * (rest + 1)]) == [len(half) + rest, 1]
    assert sizes([]) == [0]


def test_the_model_begins_before_all_pictures_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    with LLM(str(pictured.clip(tmp_path / "clip"))) as llm:
        renderer: Any = llm._service.renderer.pictures
        plain, submit = type(renderer).media, type(llm._service.engine).submit

        def media(self: Any, *args: Any) -> Any:
            order.append("decode")
            return plain(self, *args)

        def submitted(self: Any, sequences: Any, **options: Any) -> Any:
            order.append("submit")
            return submit(self, sequences, **options)

        monkeypatch.setattr(type(renderer), "media", media)
        monkeypatch.setattr(type(llm._service.engine), "submit", submitted)
        count = 2 * PICTURED_AT_ONCE + 1
        outputs = llm.embed([noise(20, 20, seed) for seed in range(count)], use_tqdm=False)
    assert len({tuple(output.outputs.embedding) for output in outputs}) == count
    assert order == [*["decode"] * PICTURED_AT_ONCE, "submit"] * 2 + ["decode", "submit"]


def test_pictures_of_a_long_call_are_not_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patches of thousands of pages filled the memory: they go with their outputs, and few are made ahead."""
    size, most = 3 * 56 * 56 * 4, 4
    monkeypatch.setattr(waiting, "MOST_AHEAD", most * size)
    arrays: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def count() -> int:
        return sum(array() is not None for array in arrays)

    with LLM(str(pictured.clip(tmp_path / "clip"))) as llm:
        renderer: Any = llm._service.renderer.pictures
        plain = type(renderer).media

        def media(self: Any, *args: Any) -> Any:
            alive.append(count())
            made = plain(self, *args)
            (pixels,) = made[0].arrays.values()
            assert pixels.nbytes == size
            arrays.append(weakref.ref(pixels))
            return made

        pages = [noise(20, 20, seed) for seed in range(60)]
        expected = [llm.embed([page], use_tqdm=False)[0].outputs.embedding for page in (pages[0], pages[-1])]
        monkeypatch.setattr(type(renderer), "media", media)
        outputs = llm.embed(pages, use_tqdm=False)
        # beside those that wait: the job that is made, and those of the last batch of each stream
        assert len(arrays) == 60
        assert max(alive) <= most + PICTURED_AT_ONCE + 2 * (most + PICTURED_AT_ONCE)
        assert count() <= 2 * (most + PICTURED_AT_ONCE)
    for own, one in zip((outputs[0], outputs[-1]), expected, strict=True):
        assert np.abs(np.array(own.outputs.embedding) - one).max() < 2e-6
        assert len(own.prompt_token_ids) == pictured.CLIP_TOKENS


class Slow:
    """An engine whose requests are done when a test says so."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, sequences: list[Sequence], **_: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


def test_pictures_wait_for_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_AHEAD", 100)
    engine: Any = Slow()
    page = Media(b"", 1, 1, arrays={"pixel_values": np.zeros(60, np.uint8)})
    requests = [[Sequence([1], media=(page,), spans=((0, 1),))] for _ in range(3)]
    with waiting.UnderWay() as under_way:
        under_way.submit(engine, requests[0])
        under_way.make_room()
        under_way.submit(engine, requests[1])
        waits = threading.Thread(target=under_way.make_room)
        waits.start()
        waits.join(0.05)
        assert waits.is_alive(), "120 bytes are under way"
        engine.futures[1].set_exception(ValueError("no"))
        waits.join(PATIENCE)
        assert not waits.is_alive()
        engine.futures[0].set_result([])
        under_way.submit(engine, requests[2])
    assert [request[0].media for request in requests] == [(), (page,), (page,)], "those of failed ones may still run"
    assert engine.futures[2].cancelled()
