"""Late-interaction folders of PyLate, against PyLate itself, which needs an environment of its own: `make test-pylate`.

Every key that `pylate.models.ColBERT` looks up has rows that set it. One process in that environment writes the vectors
of all folders; a row that is honoured moves them, and Cenote's are the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cenote import LLM
from cenote.errors import CheckpointError
from tests import checkpoints
from tests.checkpoints import HIDDEN, Module, dense

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Rows = dict[str, np.ndarray]

PYLATE = Path(os.environ.get("PYLATE_ENVIRONMENT", ".pylate")).absolute()
"""Folder of PyLate and its pins."""

pytestmark = [
    pytest.mark.pylate,
    pytest.mark.skipif(not (PYLATE / "pylate").is_dir(), reason="PyLate is not there: make test-pylate installs it"),
]

IDENTITY, TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"
SETTINGS, DENSE, METADATA = "config_sentence_transformers.json", "1_Dense/config.json", "artifact.metadata"
MARKERS = ("[Q] ", "[D] ", "[A] ")
WIDTH, POSITIONS = 16, 256
TEXTS = {
    "query": ["quick fox", "The, lazy. dog!", "", "one two three four five six seven eight nine ten water stone fox"],
    "document": [
        "The quick brown fox jumps over the lazy dog.",
        "a, b. c! (hello) - water; zzz stone?",
        "one two three four five six seven eight nine ten water stone, one two three four five six, seven. eight!",
        "one two three four five " * 45,
        "...",
    ],
}
"""Shorter and longer than every length here; the fourth document also than PyLate's own 180 tokens."""

WRITTEN = {
    "__version__": {"sentence_transformers": "5.3.0", "transformers": "5.3.0", "pytorch": "2.9.0"},
    "model_type": "ColBERT",
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "MaxSim",
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": 12,
    "document_length": 20,
    "attend_to_expansion_tokens": False,
    "skiplist_words": [",", "."],
    "do_query_expansion": True,
}
"""Settings as PyLate writes them."""


# Folders, by kind


def _marked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens(list(MARKERS))
    return tokenizer


def _encoder(path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    marked = _marked(tokenizer or checkpoints.wordpiece(lowercase=True))
    return checkpoints.bert(path, tokenizer=marked, max_position_embeddings=POSITIONS)


def _layer(inputs: int = HIDDEN, outputs: int = WIDTH, **options: Any) -> Module:
    return dense(inputs, outputs, **{"activation": IDENTITY, "bias": False, **options})


def _modules(folder: Path, *layers: Module, **settings: Any) -> Path:
    """A folder of a Transformer and PyLate's Dense layers."""
    transformer = {"max_seq_length": 63, "do_lower_case": False}
    checkpoints.write_modules(folder, *layers, new=False, transformer=transformer, settings={**WRITTEN, **settings})
    listed = checkpoints.read_json(folder / "modules.json")
    for entry in listed[1:]:
        entry["type"] = "pylate.models.Dense.Dense"
    checkpoints.write_json(folder / "modules.json", listed)
    return folder


def _folder(path: Path) -> Path:
    return _modules(_encoder(path), _layer())


def _old(path: Path) -> Path:
    """Before Sentence-Transformers 5: the settings do not say what type of model it is."""
    folder = _folder(path)
    checkpoints.edit_json(folder / SETTINGS, model_type=None)
    return folder


def _deep(path: Path) -> Path:
    """Three layers, two of which are added to what they are of."""
    first = _layer(HIDDEN, 48, residual=True)
    second = _layer(48, 48, activation=TANH, bias=True, residual=True, seed=1)
    return _modules(_encoder(path), first, second, _layer(48))


def _decoder(path: Path) -> Path:
    """No special token begins its texts."""
    folder = checkpoints.decoder(path, "Qwen3Model", tokenizer=_marked(checkpoints.byte_level()))
    return _modules(folder, _layer())


def _byte_level(path: Path) -> Path:
    return _modules(_encoder(path, checkpoints.sentinels()), _layer())


def _stanford(path: Path) -> Path:
    """ColBERT's own layout, which PyLate reads too."""
    folder = checkpoints.bert(
        path,
        tokenizer=checkpoints.wordpiece(lowercase=True, more=("[unused0]", "[unused1]", "[unused2]")),
        max_position_embeddings=POSITIONS,
    )
    file = folder / "model.safetensors"
    linear = torch.randn(WIDTH, HIDDEN, generator=torch.Generator().manual_seed(7)) / HIDDEN**0.5
    backbone = {f"bert.{name}": tensor for name, tensor in load_file(file).items()}
    save_file({**backbone, "linear.weight": linear}, file, metadata={"format": "pt"})
    checkpoints.edit_json(folder / "config.json", architectures=["HF_ColBERT"])
    written = {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_maxlen": 12, "doc_maxlen": 20}
    checkpoints.write_json(folder / METADATA, {**written, "attend_to_mask_tokens": False})
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "folder": _folder,
    "old": _old,
    "deep": _deep,
    "decoder": _decoder,
    "byte level": _byte_level,
    "stanford": _stanford,
}


# The rows


@dataclass(frozen=True)
class Row:
    """A change of a folder.

    Attributes:
        kind: of the folder.
        file: whose keys change.
        changes: keys to values; "absent" leaves one out.
        moves: whether PyLate's vectors are others than without it.
    """

    kind: str
    file: str = SETTINGS
    changes: dict[str, Any] = field(default_factory=dict)
    moves: bool = True

    def __str__(self) -> str:
        return f"{self.kind} {self.file} {json.dumps(self.changes)[:60]}"


def honoured(kind: str, key: str, *values: Any, file: str = SETTINGS) -> list[Row]:
    return [Row(kind, file, {key: value}) for value in values]


def idle(kind: str, key: str, *values: Any, file: str = SETTINGS) -> list[Row]:
    return [Row(kind, file, {key: value}, moves=False) for value in values]


PREFIXES = ("query_prefix", "document_prefix")
LENGTHS = ("query_length", "document_length")
ROWS = [
    *[Row(kind, moves=False) for kind in FOLDERS],
    *[row for kind in ("folder", "decoder") for key in PREFIXES for row in honoured(kind, key, "", "[A] ")],
    *[row for key in LENGTHS for row in honoured("folder", key, 7, None, "absent")],
    *honoured("folder", "attend_to_expansion_tokens", True),
    *honoured("decoder", "attend_to_expansion_tokens", True),
    *idle("folder", "attend_to_expansion_tokens", None, "absent"),
    *honoured("folder", "skiplist_words", [], ["fox", "!"], None, "absent"),
    *honoured("folder", "do_query_expansion", False),
    *idle("folder", "do_query_expansion", None, "absent"),
    *honoured("decoder", "do_query_expansion", False),
    *idle("folder", "query_prefix", None, "absent"),
    *idle("folder", "document_prefix", None, "absent"),
    *honoured("folder", "prompts", {"query": "hello ", "document": "represent "}, {"query": "hello "}),
    *honoured("old", "query_length", 20),
    *honoured("old", "do_query_expansion", False),
    *honoured("byte level", "do_lower_case", True, file="sentence_bert_config.json"),
    *idle("folder", "max_seq_length", 7, file="sentence_bert_config.json"),
    *honoured("folder", "activation_function", TANH, file=DENSE),
    *honoured("deep", "activation_function", IDENTITY, file="2_Dense/config.json"),
    *honoured("deep", "use_residual", False, file="2_Dense/config.json"),
    *honoured("stanford", "query_token_id", "[unused2]", file=METADATA),
    *idle("stanford", "query_token_id", "absent", file=METADATA),
    *honoured("stanford", "doc_token_id", "[unused2]", file=METADATA),
    *idle("stanford", "doc_token_id", "absent", file=METADATA),
    *honoured("stanford", "query_maxlen", 9, "absent", file=METADATA),
    *honoured("stanford", "doc_maxlen", 9, file=METADATA),
    *honoured("stanford", "attend_to_mask_tokens", True, file=METADATA),
]

SAVED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "other settings": {"query_length": 9, "document_length": 30, "skiplist_words": ["a"], "query_prefix": "[A] "},
    "without": {"query_prefix": "", "document_prefix": "", "do_query_expansion": False, "bias": True},
    "seen expansion": {"attend_to_expansion_tokens": True, "prompts": {"query": "hello ", "document": "the "}},
}
"""Arguments of `ColBERT` over a plain encoder, which PyLate then saves itself."""


def _changed(path: Path, row: Row) -> Path:
    """The folder of a row."""
    folder = FOLDERS[row.kind](path)
    content = {**checkpoints.read_json(folder / row.file), **row.changes} if row.changes else {}
    if content:
        checkpoints.write_json(folder / row.file, {key: value for key, value in content.items() if value != "absent"})
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Rows]]:
    """The folder of a row or of `SAVED`, and PyLate's vectors; all are written at once, for PyLate loads slowly."""
    root = tmp_path_factory.mktemp("pylate")
    folders = {str(row): _changed(root / str(number), row) for number, row in enumerate(ROWS)}
    jobs: list[dict[str, Any]] = [{"folder": str(folder), "texts": TEXTS} for folder in folders.values()]
    source = checkpoints.bert(root / "source", max_position_embeddings=POSITIONS)
    for name, settings in SAVED.items():
        folders[name] = root / f"saved {name}"
        made = {"source": str(source), "settings": {"embedding_size": WIDTH, **settings}}
        jobs.append({"folder": str(folders[name]), "texts": TEXTS, **made})
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("pylate_reference.py")
    environment = {**os.environ, "PYTHONPATH": str(PYLATE), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(root / "jobs.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    def of(name: str) -> tuple[Path, Rows]:
        with np.load(f"{folders[name]}.npz") as arrays:
            return folders[name], dict(arrays)

    return of


def ours(folder: Path, texts: dict[str, list[str]] = TEXTS) -> Rows:
    """Cenote's vectors, by PyLate's names of them."""
    rows = {}
    with LLM(model=str(folder), auto_truncate=True) as llm:
        for side, listed in texts.items():
            outputs = llm.encode(listed, pooling_task="token_embed", input_type=side, use_tqdm=False)
            rows |= {f"{side}_{number}": output.outputs.data.numpy() for number, output in enumerate(outputs)}
    return rows


def moved(first: Rows, second: Rows) -> float:
    """The largest difference; infinity where shapes differ."""
    assert first.keys() == second.keys()
    if any(first[name].shape != second[name].shape for name in first):
        return float("inf")
    return max(float(np.abs(first[name] - second[name]).max(initial=0)) for name in first)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_key(row: Row, reference: Callable[[str], tuple[Path, Rows]]) -> None:
    folder, expected = reference(str(row))
    assert moved(ours(folder), expected) <= 2e-5
    _, plain = reference(str(Row(row.kind, moves=False)))
    assert (moved(expected, plain) > 1e-3) == row.moves


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_that_pylate_writes(name: str, reference: Callable[[str], tuple[Path, Rows]]) -> None:
    folder, expected = reference(name)
    assert moved(ours(folder), expected) <= 2e-5


def test_outer_space_is_part_of_a_text(reference: Callable[[str], tuple[Path, Rows]]) -> None:
    """As in sentence-transformers 6: PyLate, over an older release, strips texts."""
    folder, expected = reference(str(Row("byte level", moves=False)))
    text = TEXTS["query"][0]
    rows, stripped = ours(folder, {"query": [f"  {text} "]}), ours(folder, {"query": [text]})
    np.testing.assert_allclose(stripped["query_0"], expected["query_0"], rtol=0, atol=2e-5)
    assert moved(rows, stripped) > 1e-2


def test_a_marker_that_is_not_named_and_not_there(tmp_path: Path) -> None:
    """PyLate would add it, with random weights."""
    folder = _modules(checkpoints.bert(tmp_path / "model"), _layer())
    checkpoints.edit_json(folder / SETTINGS, query_prefix=None)
    with pytest.raises(CheckpointError, match="has no query_prefix or document_prefix, for which PyLate takes"):
        LLM(model=str(folder))


def test_every_key_has_a_row() -> None:
    """By PyLate's source: those that it looks up in files, and the arguments of its layer."""
    source = (PYLATE / "pylate/models/colbert.py").read_text()
    looked_up = set(re.findall(r"""["'](\w+)["'] in self\._model_config""", source))
    looked_up |= set(re.findall(r"""metadata\.get\(\s*["'](\w+)["']""", source))
    assert len(looked_up) == 12
    assert looked_up <= {key for row in ROWS for key in row.changes}
    (arguments,) = re.findall(r"def __init__\((.*?)\) ->", (PYLATE / "pylate/models/Dense.py").read_text(), re.S)
    layer = set(re.findall(r"(\w+)[:=]", arguments)) - {"init_weight", "init_bias"}
    assert layer == {"in_features", "out_features", "bias", "activation_function", "use_residual"}
