"""Features of pictures that are kept across batches: how often the tower runs, what is dropped, and the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import ServerConfig
from cenote.models.vision import KeptFeatures, Vision
from cenote.server.app import build
from cenote.tensors.packing import Features
from tests import pictured
from tests.pictured import noise, url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.full  # another path to figures that `make test` compares
A, B, C = (noise(90, 130, seed) for seed in range(3))
TOLERANCE = 2e-6
"""Largest difference of a vector in another batch."""


class Counted:
    """A model whose vision tower counts the pictures of each of its forwards."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.llm = llm
        self.forwards: list[int] = []
        plain = type(vision_of(llm)).features

        def features(vision: Vision, media: Any) -> Features:
            self.forwards.append(len(media))
            return plain(vision, media)

        monkeypatch.setattr(type(vision_of(llm)), "features", features)

    def embed(self, *prompts: Any) -> np.ndarray:
        return np.array([output.outputs.embedding for output in self.llm.embed([*prompts], use_tqdm=False)])


def vision_of(llm: LLM) -> Vision:
    return llm._service.engine._model.layout.backbone.vision  # type: ignore[attr-defined, no-any-return]


WRITERS: dict[str, Callable[[Path], Path]] = {
    "clip": pictured.clip,
    "qwen3_vl": lambda folder: pictured.qwen_vl(folder, "qwen3_vl"),
}


@pytest.fixture(scope="module", params=["clip", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("kept") / request.param)


@pytest.fixture
def open_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Counted]]:
    opened: list[LLM] = []

    def make(**options: Any) -> Counted:
        opened.append(LLM(str(folder), **options))
        return Counted(opened[-1], monkeypatch)

    yield make
    for llm in opened:
        llm.close()


def test_a_picture_goes_through_the_tower_once(open_counted: Callable[..., Counted]) -> None:
    model = open_counted()
    first = model.embed(A, B)
    assert sum(model.forwards) == 2
    again = model.embed(B, C, A, C, "a text")
    assert sum(model.forwards) == 3
    assert np.abs(again[[2, 0]] - first).max() < TOLERANCE
    assert np.abs(first[0] - first[1]).max() > 1e-3
    model.embed(noise(90, 130, 0))
    assert sum(model.forwards) == 3, "it is known by its content"


def test_requests_with_another_salt_share_no_features(open_counted: Callable[..., Counted]) -> None:
    """Otherwise the time of an answer tells whether somebody else has sent the picture."""
    model = open_counted()
    with TestClient(build([model.llm._service], ServerConfig())) as client:
        for salt, forwards in (("one", 1), ("two", 2), (None, 3), ("one", 3), ("two", 3), (None, 3)):
            content = [{"type": "image_url", "image_url": {"url": url(A)}}]
            body = {"messages": [{"role": "user", "content": content}], "cache_salt": salt}
            assert client.post("/v1/embeddings", json=body).status_code == 200
            assert sum(model.forwards) == forwards, salt


def test_none_is_kept_where_the_option_is_0(open_counted: Callable[..., Counted]) -> None:
    model = open_counted(picture_cache_size=0)
    first, again = model.embed(A, A), model.embed(A)
    assert sum(model.forwards) == 2, "in a batch the same picture is there once, anyway"
    assert np.abs(first - again).max() < TOLERANCE


def test_bits_do_not_depend_on_what_is_kept(open_counted: Callable[..., Counted]) -> None:
    fresh, used = open_counted(batch_invariant=True), open_counted(batch_invariant=True)
    used.embed(B, A)
    assert np.array_equal(used.embed(A, C, B), fresh.embed(A, C, B))
    assert set(used.forwards) == {1}


def rows(value: float, count: int = 4) -> Features:
    """`2 * 4 * 8 * count` bytes."""
    return Features(torch.full((count, 8), float(value)), (torch.full((count, 8), -float(value)),))


def test_the_least_recently_used_are_dropped() -> None:
    kept = KeptFeatures(3 * rows(0).nbytes)
    for number in range(3):
        kept.put(bytes([number]), rows(number))
    assert kept.get(b"\0") is not None
    kept.put(b"\3", rows(3, count=8))
    found = {number: kept.get(bytes([number])) for number in range(4)}
    assert [number for number, features in found.items() if features is not None] == [0, 3]
    assert kept._bytes == 3 * rows(0).nbytes
    kept.put(b"\4", rows(4, count=13))
    assert kept.get(b"\4") is None, "it is larger than all that may be kept"
    assert kept.get(b"\0") is not None


def test_what_is_kept_is_a_copy() -> None:
    """A view would hold the features of its whole batch in memory, and change with them."""
    kept, batch = KeptFeatures(1 << 20), rows(1, count=100)
    part = next(batch.split([4, 96]))
    kept.put(b"a", part)
    kept.put(b"a", part)
    batch.rows_FD.zero_()
    features = kept.get(b"a")
    assert features is not None
    assert torch.equal(features.rows_FD, torch.ones(4, 8))
    assert features.rows_FD.untyped_storage().nbytes() == 4 * 8 * 4
    assert kept._bytes == part.nbytes
    assert torch.equal(Features.joined([part, features]).deep[0], torch.full((8, 8), -1.0))
