"""`cenote info`: how a checkpoint is read, as lines and as JSON, without a server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cenote.cli import main
from tests import checkpoints
from tests.checkpoints import NORMALIZE, flagged_pooling

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a language-model head that nothing reads, mean pooling and a prompt."""
    folder = checkpoints.bert(tmp_path_factory.mktemp("info") / "model", masked_lm=True)
    return checkpoints.write_modules(
        folder,
        flagged_pooling("mean_tokens"),
        NORMALIZE,
        new=False,
        transformer={"max_seq_length": 40, "do_lower_case": False},
        settings={"__version__": {"pytorch": "2"}, "prompts": {"query": "query: "}, "default_prompt_name": "query"},
    )


def test_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object: the contract, the report with the entries that were read and left, and the prompts."""
    assert main(["info", str(folder), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["tasks"], described["max_model_len"], described["dimension"]) == (
        ["embed", "token_embed"],
        40,
        checkpoints.HIDDEN,
    )
    assert (described["prompts"]["query"], described["default_prompt"]["text"]) == ("query: ", "query: ")
    report = described["report"]
    assert (report["model_class"], report["layout"], report["pooling"]) == ("BertModel", "packed", "mean")
    used = {(entries["file"], name) for entries in report["used"] for name in entries["names"]}
    assert {("modules.json", "type"), ("sentence_bert_config.json", "max_seq_length")} <= used
    assert ("1_Pooling/config.json", "pooling_mode_mean_tokens") in used
    assert _reason(report["left"], "model.safetensors", "cls") != ""
    assert _reason(report["left"], "config_sentence_transformers.json", "__version__") != ""


def _reason(left: list[dict[str, Any]], file: str, name: str) -> str:
    """Why the entry whose name begins so was left."""
    (reason,) = [
        entries["reason"]
        for entries in left
        if entries["file"] == file and any(entry.startswith(name) for entry in entries["names"])
    ]
    return str(reason)


def test_as_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of a start, then each entry, those that were left with the reason."""
    assert main(["info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"model: {folder} (BertForMaskedLM)")
    assert "prompt before every input: 'query: '" in lines
    assert any(line.startswith("read of the checkpoint: modules.json: ") for line in lines)
    entries = lines[lines.index("entries that are left, and why:") + 1 :]
    assert any(line.startswith("  model.safetensors: cls") and line.endswith(")") for line in entries)


def test_a_checkpoint_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and status 2, as at a start."""
    folder = checkpoints.bert(tmp_path / "model")
    checkpoints.write_modules(folder, flagged_pooling("mean_tokens", surprise=1))
    assert main(["info", str(folder)]) == 2
    assert "1_Pooling/config.json has the key surprise" in capsys.readouterr().err
