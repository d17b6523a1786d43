"""The same inputs for everybody: models as folders, and texts cut so that no engine has to truncate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.peers.table import COLBERT, EMBED, RERANK
from cenote.models.hub import embedded
from material.corpus import docstrings

SHORT_TOKENS, MIXED_TOKENS, LONG_TOKENS = 16, 250, 512
DOCUMENTS = 100
CORPUS = 2500
QUERY = "How do I read a file line by line without loading all of it into memory?"


def models(root: Path) -> dict[str, Path]:
    """Folders of the model of each task, made if they are not there: MiniLM-L6 with all its 512 positions.

    The cross-encoder's head and the ColBERT projection are random: they cost what trained ones cost.
    """
    from benchmarks.rerank import cross_encoder_folder
    from benchmarks.search import colbert

    folders = {task: root / task for task in (EMBED, RERANK, COLBERT)}
    if not folders[EMBED].is_dir():
        shutil.copytree(embedded(), folders[EMBED])
        update(folders[EMBED] / "sentence_bert_config.json", max_seq_length=LONG_TOKENS)
        untruncated(folders[EMBED])
    if not folders[RERANK].is_dir():
        cross_encoder_folder(folders[RERANK])
        untruncated(folders[RERANK])
    if not folders[COLBERT].is_dir():
        colbert(root)
        untruncated(folders[COLBERT])
    return folders


def update(file: Path, **values: Any) -> None:
    """Set `values` in a JSON file; None removes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}, indent=1))


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer without the truncation and padding that its file may hold."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def untruncated(folder: Path) -> None:
    """Take truncation and padding out of the tokenizer's file: some libraries obey it and others do not."""
    tokenizer_of(folder).save(str(folder / "tokenizer.json"))
    update(folder / "tokenizer_config.json", model_max_length=LONG_TOKENS, max_length=None)


def workloads(folder: Path, count: int) -> dict[str, list[str]]:
    """Texts by the name of their workload.

    "short": first lines of docstrings, at most 16 tokens, 2 * `count`. "mixed": `count` docstrings of 17 to 250
    tokens. "long": docstrings one after the other, close to 512 tokens, `count` / 12. Special tokens are counted.
    """
    tokenizer = tokenizer_of(folder)

    def cut(text: str, limit: int) -> str:
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= limit - 2:
            return text
        return text[: offsets[limit - 2][0]].rsplit(maxsplit=1)[0]

    every = docstrings(CORPUS)
    lines = list(dict.fromkeys(cut(text.strip().splitlines()[0], SHORT_TOKENS) for text in every))
    mixed = [cut(text, MIXED_TOKENS) for text in every if cut(text, SHORT_TOKENS) != text]
    longs = max(1, count // 12)
    whole = [" ".join(every[start::longs]) for start in range(longs)]
    return {
        "short": _spread(lines, min(2 * count, len(lines))),
        "mixed": _spread(mixed, min(count, len(mixed))),
        "long": [cut(text, LONG_TOKENS) for text in whole],
    }


def pairs(mixed: list[str]) -> tuple[str, list[str]]:
    """A query and the documents to score with it."""
    return QUERY, _spread(mixed, min(DOCUMENTS, len(mixed)))


def tokens(folder: Path, texts: list[str]) -> list[int]:
    """Tokens of each text, special ones included."""
    return [len(encoding.ids) for encoding in tokenizer_of(folder).encode_batch(texts)]


def _spread(texts: Any, count: int) -> list[str]:
    step = len(texts) / count
    return [texts[int(i * step)] for i in range(count)]
