"""OpenAI's vocabulary cl100k_base, read from a file that some package or cache has: from token ids to text."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CACHED = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""Name of the file in a cache of tiktoken."""
CACHE = "TIKTOKEN_CACHE_DIR"
"""Environment variable with the folder of that cache."""
BUNDLED = {
    "litellm": "litellm/litellm_core_utils/tokenizers",
    "llama-index-core": "llama_index/core/_static/tiktoken_cache",
}
"""Packages that bring such a cache, and its folder."""
DIGEST = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
"""SHA-256 of the file."""


def find(path: str | None) -> Path:
    """Return the file of the vocabulary.

    Args:
        path: of the file; `None` = the first of the places that may have it.

    Raises:
        ValueError: there is none, or it is another vocabulary.
    """
    places = [Path(path)] if path else [*_places()]
    file = next(filter(Path.is_file, places), None)
    if file is None:
        raise ValueError(
            f"found no vocabulary cl100k_base in {', '.join(map(str, places)) or 'any installed package'}; give the "
            f"path of cl100k_base.tiktoken, set {CACHE}, or install {' or '.join(BUNDLED)}"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != DIGEST:
        raise ValueError(f"{str(file)!r} is not cl100k_base.tiktoken: its SHA-256 is {digest}, expected {DIGEST}")
    return file


def _places() -> Iterator[Path]:
    """Yield the paths at which the file may lie."""
    folder = os.environ.get(CACHE)
    if folder:
        yield Path(folder, CACHED)
    for package, inside in BUNDLED.items():
        try:
            yield Path(str(distribution(package).locate_file(f"{inside}/{CACHED}")))
        except PackageNotFoundError:
            continue


class Vocabulary:
    """The texts of the ids of a vocabulary.

    Args:
        file: a line for each token, its bytes as base64 and its id.

    Raises:
        ValueError: a line is of another form.
    """

    def __init__(self, file: Path) -> None:
        try:
            pairs = [line.split() for line in file.read_bytes().splitlines()]
            self._bytes = {int(number): base64.b64decode(token) for token, number in pairs}
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{str(file)!r} is not a vocabulary: {error}") from error

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Characters of which a part alone is there become replacement characters.

        Raises:
            KeyError: an id, which it names, is not in the vocabulary.
        """
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")
