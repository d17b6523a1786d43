"""The ranges of int8 and uint8 embeddings: read from a file, or taken from the embeddings of a file of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cenote.core import PoolingParams
from cenote.engine.waiting import UnderWay
from cenote.errors import BadRequest, ConfigError
from cenote.pipeline.options import TextOptions
from cenote.tensors.quantize import Ranges

if TYPE_CHECKING:
    from cenote.core import Engine
    from cenote.pipeline.rendering import Renderer

OF_TEXTS = (".txt", ".jsonl")
"""Suffixes of files of texts; other files are read by `Ranges.load`."""

AT_ONCE = 256
"""Texts that are rendered and run at a time."""


def check_file(path: str) -> None:
    """Refuse a file that cannot be read: cheap, while `load` needs the model.

    Raises:
        ConfigError: it has another form, or too few texts.
    """
    if Path(path).suffix in OF_TEXTS:
        _texts_to_calibrate(path)
    else:
        Ranges.load(path)


def load(path: str, dimension: int, renderer: Renderer, engine: Engine) -> Ranges:
    """Return the ranges in a file of ranges, or those of the embeddings of a file of texts.

    Texts are embedded with the default parameters, and cut where they are too long.

    Args:
        path: `.json` or `.npy` of ranges; `.txt` with a text in each line; `.jsonl` with a JSON string in each line, or
            an object with one under `text`. Blank lines are skipped.
        dimension: length of the model's embeddings.
        renderer: of the model.
        engine: runs the texts.

    Raises:
        ConfigError: the model does not embed, or the file cannot be read, has another form, too few texts, or ranges
            for another dimension.
    """
    if "embed" not in renderer.info.tasks:
        raise ConfigError(f"calibration is for int8 and uint8 embeddings, and {renderer.info.name} gives none")
    if Path(path).suffix not in OF_TEXTS:
        return Ranges.load(path, dimension)
    texts = _texts_to_calibrate(path)
    rows: list[np.ndarray] = []
    for start in range(0, len(texts), AT_ONCE):
        rows += _embeddings(texts[start : start + AT_ONCE], path, renderer, engine)
    return Ranges.calibrated(np.stack(rows))


def _texts_to_calibrate(path: str) -> list[str]:
    """Return the texts of a file, at least two."""
    texts = read_texts(Path(path))
    if len(texts) < 2:
        raise ConfigError(f"{path} must have at least 2 texts to calibrate by, better 1,000; got {len(texts)}")
    return texts


def _embeddings(texts: list[str], path: str, renderer: Renderer, engine: Engine) -> list[np.ndarray]:
    """Return the embeddings, `[D]` each, of texts of the file `path`."""
    try:
        sequences = renderer.render(texts, "embed", PoolingParams(), TextOptions(-1))
    except BadRequest as error:
        raise ConfigError(f"a text of {path} cannot be embedded: {error}") from None
    with UnderWay() as under_way:
        under_way.submit(engine, sequences)
        (outputs,) = under_way.results()
    return [output.data for output in outputs]


def read_texts(path: Path) -> list[str]:
    """Return the texts of a `.txt` or `.jsonl` file.

    Raises:
        ConfigError: the file cannot be read, or a line has no text.
    """
    try:
        lines = list(filter(str.strip, path.read_text(encoding="utf-8").split("\n")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the texts of {path}: {error}") from None
    return lines if path.suffix == ".txt" else [_text(line, path) for line in lines]


def _text(line: str, path: Path) -> str:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"a line of {path} is not valid JSON: {error}") from None
    text = content.get("text") if isinstance(content, dict) else content
    if not isinstance(text, str):
        raise ConfigError(f"a line of {path} must be a JSON string or have one under 'text', got {line[:80]}")
    return text
