"""Pictures in the engine: batches are bounded by tokens and patches, and nothing cuts a picture into blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cenote.core import Media, Output, Sequence
from cenote.engine.blocks import ChunkedEngine
from cenote.engine.engine import LocalEngine
from cenote.engine.fake import FAKE_INFO, FakeEngine, fake_vector
from cenote.errors import TooLong


class Recording:
    """A model that notes its batches."""

    def __init__(self, patch_cost: float) -> None:
        self.info = replace(FAKE_INFO, patch_cost=patch_cost)
        self.batches: list[list[Sequence]] = []

    def launch(self, sequences: Any) -> Any:
        self.batches.append(list(sequences))
        return self

    def ready(self) -> bool:
        return True

    def finish(self) -> list[Any]:
        return [Output(fake_vector(sequence, 8)) for sequence in self.batches[-1]]


def page(number: int, patches: int = 40) -> Sequence:
    return Sequence([7] * 10, media=(Media(bytes([number]), 8, patches),), spans=((1, 9),))


@pytest.mark.parametrize(("patch_cost", "most"), [(0.0, 10), (0.25, 5), (1.0, 2)])
def test_patches_count_for_the_size_of_a_batch(patch_cost: float, most: int) -> None:
    model = Recording(patch_cost)
    engine = LocalEngine(model, max_batch_tokens=100)
    outputs = engine.submit([page(number) for number in range(10)]).result(30)
    engine.close()
    assert max(map(len, model.batches)) == most
    assert len({output.data.tobytes() for output in outputs}) == 10, "equal ids, other pictures"


def test_a_picture_of_more_patches_than_a_batch_runs_alone() -> None:
    model = Recording(1.0)
    engine = LocalEngine(model, max_batch_tokens=100)
    engine.submit([page(0, 1000), page(1), page(2)]).result(30)
    engine.close()
    assert [len(batch) for batch in model.batches if batch[0].patches == 1000] == [1]


def test_a_picture_is_not_cut_into_blocks() -> None:
    engine = ChunkedEngine(FakeEngine(replace(FAKE_INFO, max_model_len=8)))
    with pytest.raises(TooLong, match="Pictures are not cut"):
        engine.submit([page(0)])
