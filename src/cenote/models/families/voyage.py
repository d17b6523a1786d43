"""voyage-4-nano: Qwen3 without a causal mask, and a linear layer over the states of all tokens.

The layer comes before pooling (`VoyageQwen3BidirectionalEmbedModel` of the checkpoint and of vLLM). It has no bias, so
the pooled row may take it as well: pooling by one token or by a mean is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cenote.models import weights
from cenote.models.classifiers import linear
from cenote.models.convert import Head
from cenote.models.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from cenote.config import ModelConfig
    from cenote.models.facts import Files

ARCHITECTURE = "VoyageQwen3BidirectionalEmbedModel"
WEIGHT = "linear.weight"


@dataclass(frozen=True)
class Voyage(Family):
    """A checkpoint with such a layer.

    Attributes:
        tensors: name of the layer's weight.
    """

    title: ClassVar[str] = "bidirectional embedder (voyage-4-nano)"
    head = Head()

    tensors: tuple[str, ...] = (WEIGHT,)

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Voyage | None:
        """Recognise the architecture's name, or the layer beside a Qwen3 that is published with another."""
        is_bare = files.architecture.startswith("Qwen3") and files.config.model_type == "qwen3"
        if WEIGHT not in files.tensors or not (is_bare or files.architecture == ARCHITECTURE):
            return None
        files.config.is_causal = False
        return cls()

    def projector(self, files: Files, options: ModelConfig) -> nn.Linear:
        """Return the layer."""
        return linear(weights.tensors(files.folder, [WEIGHT], pickles=options.reads_pickles)[WEIGHT])
