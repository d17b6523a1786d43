"""jina-reranker-m0: pairs of texts and pictures, rated by two layers over the last token of Qwen2-VL.

Prompt, closing token and bias are those of the code that the checkpoint brings (`modeling.py`, `JinaVLForRanking`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from cenote.conventions import PairTemplate
from cenote.models import classifiers
from cenote.models.classifiers import linear
from cenote.models.convert import Head
from cenote.models.families.family import Family

if TYPE_CHECKING:
    from cenote.config import ModelConfig
    from cenote.models.classifiers import Classifier
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded

ARCHITECTURES = ("JinaVLForRanking", "JinaVLForSequenceClassification")
LAYERS = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")
SCORE_TOKEN = 100
"""Id of the token behind every prompt, whose state is rated."""
BIAS = 2.65
"""Taken off each logit."""

PROMPT = PairTemplate(
    "{%- set query = (messages | selectattr('role', 'eq', 'query') | first).content -%}"
    "{%- set document = (messages | selectattr('role', 'eq', 'document') | first).content -%}"
    "**Document**:\n{{ document }}\n**Query**:\n{{ query }}",
    closing=(SCORE_TOKEN,),
)


@dataclass(frozen=True)
class JinaVL(Family):
    """Such a checkpoint."""

    title: ClassVar[str] = "reranker of texts and pictures (jina-reranker-m0)"

    head: Head
    tensors: tuple[str, ...] = LAYERS
    model_class: str = "Qwen2VLModel"

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> JinaVL | None:
        """Recognise the name of the architecture, and its layers."""
        is_one = files.architecture in ARCHITECTURES and set(LAYERS) <= set(files.tensors)
        if not is_one or options.convert == "embed":
            return None
        return cls(Head("sequence", prompt=PROMPT if options.reranker_prompts else None, name=files.architecture))

    def classifier(self, loaded: Loaded) -> Classifier:
        """Return the layers."""
        weight, bias, last_weight, last_bias = map(loaded.tensors(self.tensors).__getitem__, LAYERS)
        layers = nn.Sequential(linear(weight, bias), nn.ReLU(), linear(last_weight, last_bias - BIAS))
        return classifiers.of_modules(loaded.placed(layers), last_weight.shape[0])
