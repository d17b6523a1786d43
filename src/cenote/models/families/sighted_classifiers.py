"""Classifiers over vision-language models, `Qwen2_5_VLForSequenceClassification` and the like, as vLLM has them.

Transformers has no such class: a checkpoint is the vision-language model, and a layer `score` over its last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cenote.models import classifiers
from cenote.models.classifiers import linear
from cenote.models.convert import Head
from cenote.models.families.family import Family
from cenote.models.families.sights import SIGHTS

if TYPE_CHECKING:
    from cenote.config import ModelConfig
    from cenote.models.classifiers import Classifier
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded

WEIGHT, BIAS = "score.weight", "score.bias"


@dataclass(frozen=True)
class SightedClassifier(Family):
    """A vision-language model with such a layer.

    Attributes:
        tensors: names of the tensors of the layer.
    """

    title: ClassVar[str] = "classifier of texts and pictures"

    head: Head
    tensors: tuple[str, ...]
    model_class: str

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> SightedClassifier | None:
        """Recognise the end of the architecture's name, and the layer."""
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        kind, architecture = files.config.model_type, files.architecture
        is_one = architecture.endswith("ForSequenceClassification") and kind in SIGHTS and WEIGHT in files.tensors
        if not is_one or options.convert == "embed":
            return None
        tensors = tuple(name for name in (WEIGHT, BIAS) if name in files.tensors)
        return cls(Head("sequence", name=architecture), tensors, str(MODEL_MAPPING_NAMES[kind]))

    def classifier(self, loaded: Loaded) -> Classifier:
        """Return the layer."""
        tensors = loaded.tensors(self.tensors)
        layer = loaded.placed(linear(tensors[WEIGHT], tensors.get(BIAS)))
        return classifiers.of_modules(layer, tensors[WEIGHT].shape[0])
