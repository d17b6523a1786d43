"""Paths that a checkpoint names may not lead out of its folder; the hub's links within its cache may."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenote.config import ModelConfig
from cenote.errors import CheckpointError
from cenote.models import hub, inside, load
from tests import checkpoints
from tests.checkpoints import pooling, write_modules


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Sentence-Transformers, beside which a folder lies that is none of its business."""
    place = tmp_path_factory.mktemp("saved")
    folder = checkpoints.bert(place / "model")
    write_modules(folder, pooling("mean"))
    shutil.copytree(folder / "1_Pooling", place / "outside")
    shutil.copy(folder / "model.safetensors", place / "outside")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved.parent, tmp_path / "copy")
    return tmp_path / "copy" / "model"


def read(folder: Path) -> Any:
    return load.load(ModelConfig(model=str(folder)))


def names_module(path: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        entries = json.loads((folder / "modules.json").read_text())
        entries[1]["path"] = path.format(parent=folder.parent)
        (folder / "modules.json").write_text(json.dumps(entries))

    return spoil


def names_shard(path: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            shard = path.format(parent=folder.parent)
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), shard)}
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def routes_outside(folder: Path) -> None:
    router = {
        "types": {"../../outside": "sentence_transformers.models.Pooling"},
        "structure": {"query": ["../../outside"], "document": ["../../outside"]},
        "parameters": {"default_route": "document"},
    }
    entries = json.loads((folder / "modules.json").read_text())
    entries[0] |= {"type": "sentence_transformers.models.Router", "path": "router"}
    (folder / "modules.json").write_text(json.dumps(entries[:1]))
    (folder / "router").mkdir()
    (folder / "router" / "router_config.json").write_text(json.dumps(router))


NAMED = "names '.*outside.*', which lies outside of the checkpoint's folder, and only files inside are read"
LINK = "is a link that leads out of the checkpoint's folder, and only files inside are read"


def linked(target: str, name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        if (folder / name).is_file():
            (folder / name).rename(folder.parent / "outside" / name)
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).symlink_to(target.format(parent=folder.parent))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (names_module("../outside"), f"^modules.json of model {NAMED}"),
        (names_module("{parent}/outside"), f"^modules.json of model {NAMED}"),
        (names_module("1_Pooling/../../outside"), f"^modules.json of model {NAMED}"),
        (names_shard("../outside/model.safetensors"), f"^model.safetensors.index.json of model {NAMED}"),
        (names_shard("{parent}/outside/model.safetensors"), f"^model.safetensors.index.json of model {NAMED}"),
        (routes_outside, f"^router_config.json of router {NAMED}"),
        (linked("../outside", "1_Pooling"), f"^1_Pooling of model {LINK}"),
        (linked("../outside/vocab.txt", "vocab.txt"), f"^vocab.txt of model {LINK}"),
        (linked("{parent}/outside/model.safetensors", "model.safetensors"), f"^model.safetensors of model {LINK}"),
    ],
)
def test_what_lies_outside_is_not_read(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    (folder / "1_Pooling").rename(folder / "elsewhere")
    (folder / "1_Pooling").symlink_to("elsewhere")
    assert read(folder)


def in_the_cache(folder: Path, root: Path, refs: str = "0a1b2c") -> Path:
    """Lay `folder` out as the hub's cache does: links into the blobs of its entry."""
    entry = root / "models--tiny--bert"
    (entry / "blobs").mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(refs)
    snapshot = entry / "snapshots" / "0a1b2c"
    for file in filter(Path.is_file, folder.rglob("*")):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = entry / "blobs" / str(len(os.listdir(entry / "blobs")))
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_the_cache_of_the_hub_is_links(folder: Path, tmp_path: Path) -> None:
    assert read(in_the_cache(folder, tmp_path / "hub"))


def test_links_out_of_the_entry_of_the_cache_are_refused(folder: Path, tmp_path: Path) -> None:
    snapshot = in_the_cache(folder, tmp_path / "hub")
    (snapshot / "vocab.txt").unlink(missing_ok=True)
    (snapshot / "vocab.txt").symlink_to(folder.parent / "outside" / "config.json")
    with pytest.raises(CheckpointError, match=f"^vocab.txt of 0a1b2c {LINK}"):
        read(snapshot)


def test_a_reference_that_leads_out_of_the_cache_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_cache(folder, tmp_path / "hub", refs="../../../copy/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="leads to a folder outside of it; delete the entry"):
        hub.locate("tiny/bert", ModelConfig())


def test_a_link_in_a_circle_leads_nowhere(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    with pytest.raises(CheckpointError, match=LINK):
        inside.check_links(folder)
