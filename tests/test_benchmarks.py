"""The GPU benchmark runs, checks and saves; its dry run on a CPU measures nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    given = ["--device", "cpu", "--tiny", "--results", str(folder), *arguments]
    monkeypatch.setattr("sys.argv", ["gpu", *given])
    return gpu.main()


@pytest.mark.full
def test_measures_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = measured(tmp_path, monkeypatch)
    assert saved["MiniLM"]["cosine_to_float32"]["between_texts"] < 0.5


@pytest.mark.full
def test_measures_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with a tiny model in the place of MiniLM."""
    folder = gpu.large(tmp_path, gpu.TINY, torch.device("cpu"))
    monkeypatch.setattr(gpu, "embedded", lambda: folder)
    measured(tmp_path, monkeypatch)


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures of a dry run, once they are what they should be of any model."""
    assert run(folder, monkeypatch, "--save", "dry") == 0
    saved: dict[str, Any] = json.loads((folder / "dry.json").read_text())
    assert saved["gpu"] == "none"
    for model in ("bge-m3 shape", "MiniLM"):
        found = saved[model]
        assert (found["dtype"], found["layout"]) == ("float32", "packed")
        cosines = found["cosine_to_float32"]
        assert all(cosines[name]["least"] > 0.99999 for name in ("default", "graphs", "all graphs"))
        assert cosines["between_texts"] < 1
        assert found["query_ms"].keys() >= {"default", "graphs", "sentence-transformers float32"}
        for kind in gpu.TINY.lengths:
            assert found[kind]["share_of_gemm"].keys() == {"default", "graphs", "all graphs"}
            assert found[kind]["ratio"].keys() == {f"sentence-transformers {name}" for name in ("float32", "bfloat16")}
        assert (found["32"]["texts"], found["32"]["tokens"]) == (2, 64)
    return saved


def test_nothing_is_begun_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "embedded", lambda: pytest.fail("loaded MiniLM for nothing"))
    monkeypatch.setattr(gpu, "large", lambda *_: pytest.fail("made a model for nothing"))
    assert run(tmp_path, monkeypatch, "--save", "dry", "--minutes", "0") == 0
    assert run(tmp_path, monkeypatch, "--save", "dry", "--minutes", "0", "--check") == 0
    assert json.loads((tmp_path / "dry.json").read_text())["checked"] == []


@pytest.mark.full
def test_the_check_tells_right_from_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, "--check", "--save", "right") == 0
    right = json.loads((tmp_path / "right.json").read_text())["checked"]
    assert [own["verdict"] for own in right] == ["ok"] * 4
    assert {own["dtype"] for own in right} == {"float32", "bfloat16"}
    original = gpu.forward
    monkeypatch.setattr(gpu, "forward", lambda *given: torch.roll(original(*given), 1, 0))
    assert run(tmp_path, monkeypatch, "--check", "--save", "wrong") == 1
    wrong = json.loads((tmp_path / "wrong.json").read_text())["checked"]
    assert [own["verdict"] for own in wrong] == ["WRONG"] * 4


def test_without_a_gpu_it_says_what_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch sees no GPU; --device cpu --tiny is a dry run" in capsys.readouterr().err
