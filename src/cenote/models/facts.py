"""The nouns of a checkpoint's files: where they are, and their content but for weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from cenote.models.sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Found:
    """Where a checkpoint is.

    Attributes:
        name: as the user gave it.
        path: folder on disk.
        revision: commit on the hub, if it came from there.
        tokenizer: folder of the tokenizer, if the user named one; `None` = the checkpoint's.
    """

    name: str
    path: Path
    revision: str | None
    tokenizer: Path | None


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint, read but for weights and tokenizer.

    Attributes:
        found: where they are.
        folder: of the backbone.
        st: the Sentence-Transformers part, or `None`.
        architecture: first entry of the config's `architectures`.
        tensors: names of all weights.
    """

    found: Found
    folder: Path
    st: SentenceTransformer | None
    config: PretrainedConfig
    architecture: str
    tensors: tuple[str, ...]

    @property
    def name(self) -> str:
        """The checkpoint, as the user named it."""
        return self.found.name

    @property
    def path(self) -> Path:
        """Folder on disk."""
        return self.found.path

    @property
    def revision(self) -> str | None:
        """Commit on the hub, if the files came from there."""
        return self.found.revision

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.config.get_text_config().hidden_size)
