"""Prompts of a call are rendered in parts, so that the model runs while the next ones are decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cenote import LLM
from cenote.calls import PICTURED_AT_ONCE, RENDERED_AT_ONCE, _parts
from tests import pictured
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
    assert sizes([*half, *[picture] * 2]) == [len(half) + 1, 1]
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
        outputs = llm.embed([noise(20, 20, seed) for seed in range(5)], use_tqdm=False)
    assert len({tuple(output.outputs.embedding) for output in outputs}) == 5
    assert order == ["decode", "decode", "submit"] * 2 + ["decode", "submit"]
