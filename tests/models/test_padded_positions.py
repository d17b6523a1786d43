"""Positions that do not count from 0 (PaliGemma's), in every layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote import LLM
from tests import pictured
from tests.models.families.test_images_col import TOLERANCE, ForRetrieval
from tests.pictured import noise

if TYPE_CHECKING:
    from pathlib import Path

INPUTS: list[Any] = [noise(90, 130), "a much longer query " * 4, noise(300, 60), "revenue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.colpali(tmp_path_factory.mktemp("col") / "colpali")


@pytest.mark.parametrize("packing", [True, False])
def test_positions_of_colpali_begin_at_1(folder: Path, packing: bool) -> None:
    reference = ForRetrieval("ColPali", folder)
    with LLM(str(folder), packing=packing) as llm:
        backbone: Any = llm._service.engine._model.layout.backbone  # type: ignore[attr-defined]
        seen: list[np.ndarray] = []

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["position_ids"].numpy())

        with backbone.vision.reader.register_forward_pre_hook(note, with_kwargs=True):
            outputs = llm.encode(INPUTS, pooling_task="token_embed", use_tqdm=False)
    assert seen
    assert {int(positions[:, 0].min()) for positions in seen} == {1}
    assert max(int(positions.max()) for positions in seen) == max(len(output.prompt_token_ids) for output in outputs)
    for output, content in zip(outputs, INPUTS, strict=True):
        assert np.abs(output.outputs.data.numpy() - reference(content)).max() < TOLERANCE
