"""The nouns of a checkpoint's files: where they are, and their content but for weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

    from cenote.models.adapted import Base
    from cenote.models.audit import Audit
    from cenote.models.sentence_transformers import SentenceTransformer
    from cenote.models.weights import Stored


WIDTHS = {"embedding_gemma2_text": "embedding_dim", "opt": "word_embed_proj_dim"}
"""Entry of a text model's config that is the size of its states, where it is not `hidden_size`, by `model_type`."""


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is.

    Attributes:
        name: as the user gave it.
        path: folder on disk.
        revision: commit on the hub, if it came from there.
        tokenizer: folder of the tokenizer, if the user named one; `None` = the checkpoint's.
        listed: paths of its files; of a repository also of those that were not downloaded.
    """

    name: str
    path: Path
    revision: str | None
    tokenizer: Path | None
    listed: tuple[str, ...]

    @property
    def title(self) -> str:
        """The last part of the name; in the hub's cache, the repository besides."""
        real = self.path.resolve()
        parts = [Path(self.name).name, real.name]
        if real.parent.name == "snapshots":
            parts.append(real.parent.parent.name)
        return " ".join(parts)


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint, read but for weights and tokenizer.

    Attributes:
        location: where they are.
        st: the Sentence-Transformers part; without modules, if the checkpoint has none.
        architecture: first entry of the config's `architectures`.
        stored: all weights as their headers describe them, by name.
        audit: the entries of the files that were honoured, and those that were left.
        notes: for the report at start.
        base: the model that it runs, and the adapters that are part of it.
    """

    location: Location
    st: SentenceTransformer
    config: PretrainedConfig
    architecture: str
    stored: Mapping[str, Stored]
    audit: Audit
    notes: tuple[str, ...]
    base: Base

    @property
    def name(self) -> str:
        """The checkpoint, as the user named it."""
        return self.location.name

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all weights."""
        return tuple(self.stored)

    @property
    def path(self) -> Path:
        """Folder on disk."""
        return self.location.path

    @property
    def folder(self) -> Path:
        """Folder of the backbone's weights; of a checkpoint that is an adapter, its base's."""
        return self.base.folder

    @property
    def revision(self) -> str | None:
        """Commit on the hub, if the files came from there."""
        return self.location.revision

    @property
    def width(self) -> int:
        """Size of a token's state, behind the modules over all of them."""
        text = self.config.get_text_config()
        return self.st.token_width or int(getattr(text, WIDTHS.get(text.model_type, "hidden_size")))
