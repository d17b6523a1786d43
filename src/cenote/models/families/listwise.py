"""jina-reranker-v3: one prompt holds the query and many documents, and a projector reads it at marked tokens.

Scores are cosines of projected states (arXiv:2509.25085; `JinaForRanking`, the code that the checkpoint brings). The
prompts are made in `cenote.pipeline.listwise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from cenote.conventions import LISTWISE_MARKERS
from cenote.errors import CheckpointError
from cenote.models.classifiers import linear
from cenote.models.convert import Head
from cenote.models.families.family import Family
from cenote.models.poolers import Pooler, TokenEmbed

if TYPE_CHECKING:
    from collections.abc import Collection

    from cenote.config import ModelConfig
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.models.poolers import TaskOutput

ARCHITECTURE = "JinaForRanking"
WEIGHTS = ("projector.0.weight", "projector.2.weight")


@dataclass(frozen=True)
class Listwise(Family):
    """A checkpoint with such a projector.

    Attributes:
        tensors: names of the projector's weights.
    """

    title: ClassVar[str] = "listwise reranker (jina-reranker-v3)"
    head = Head()

    tensors: tuple[str, ...] = WEIGHTS

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Listwise | None:
        """Recognise the architecture's name.

        Raises:
            CheckpointError: the checkpoint lacks the projector.
        """
        if files.architecture != ARCHITECTURE or options.convert == "embed":
            return None
        missing = sorted(set(WEIGHTS).difference(files.tensors))
        if missing:
            raise CheckpointError(f"{files.name}: {ARCHITECTURE} needs the tensors {', '.join(missing)}")
        return cls()

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return projected states.

        Raises:
            CheckpointError: the vocabulary lacks a marker.
        """
        missing = sorted(set(LISTWISE_MARKERS).difference(loaded.tokenizer.get_vocab()))
        if missing:
            raise CheckpointError(
                f"{loaded.files.name}: the vocabulary has no {', '.join(missing)}, whose states "
                f"{ARCHITECTURE} projects; --convert embed serves them without its projector"
            )
        tensors = loaded.tensors(WEIGHTS)
        first, second = (linear(tensors[name]) for name in WEIGHTS)
        projector = loaded.placed(nn.Sequential(first, nn.ReLU(), second))
        return {"token_embed": TokenEmbed(Pooler(loaded.pooler.modes, (projector,), False, None))}

    def score_types(self, tasks: Collection[str]) -> tuple[str, ...]:
        """Return the only comparison that the model is made for."""
        return ("listwise",)
