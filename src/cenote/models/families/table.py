"""The families, and which one a checkpoint is of."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from cenote.errors import CheckpointError
from cenote.models.families.bge_m3 import BgeM3
from cenote.models.families.clap import Clap
from cenote.models.families.clip import Clip
from cenote.models.families.col_vision import ColVision
from cenote.models.families.family import Family
from cenote.models.families.gating import Gating
from cenote.models.families.jina_vl import JinaVL
from cenote.models.families.listwise import Listwise
from cenote.models.families.multi_vector import MultiVector
from cenote.models.families.own import OwnModel
from cenote.models.families.rewards import Rewards
from cenote.models.families.sighted_classifiers import SightedClassifier
from cenote.models.families.siglip import Siglip
from cenote.models.families.splade import Splade
from cenote.models.families.voyage import Voyage
from cenote.models.sentence_transformers import READERS, ROUTES

if TYPE_CHECKING:
    from cenote.config import ModelConfig
    from cenote.models.facts import Files
    from cenote.models.modules import Module
    from cenote.models.sentence_transformers import SentenceTransformer

FAMILIES: list[type[Family]] = [
    OwnModel,
    Splade,
    ColVision,
    MultiVector,
    BgeM3,
    Listwise,
    Gating,
    JinaVL,
    Rewards,
    Voyage,
    Clip,
    Siglip,
    Clap,
    SightedClassifier,
]
"""The first that recognises a checkpoint counts."""


def recognise(files: Files, options: ModelConfig) -> Family:
    """Return the family of a checkpoint.

    Raises:
        CheckpointError: something in its files cannot be honoured.
    """
    _check_modules(files.st)
    for family in FAMILIES:
        recognised = family.recognise(files, options)
        if recognised is not None:
            return recognised
    return Family()


def hub_files() -> list[str]:
    """Return patterns of the files that some family needs."""
    return list(chain.from_iterable(family.hub_files for family in FAMILIES))


def _check_modules(st: SentenceTransformer) -> None:
    """Refuse modules that no family reads."""
    for module in st.special:
        if not any(family.reads(module, st) for family in FAMILIES):
            raise CheckpointError(_refusal(module))


def _refusal(module: Module) -> str:
    """Return a message about a module that no family reads."""
    if module.side:
        return f"modules.json names a Router with {module.type} in its {module.side} route; {ROUTES}"
    special = [family.honours for family in FAMILIES if family.honours]
    steps = [kind for value, kind in READERS if value == "sentence_embedding"]
    return (
        f"modules.json names the module {module.type}, which Cenote does not honour here; honoured are Transformer, "
        f"then {', '.join(special)}, LogitScore, or Pooling and {', '.join(steps)}"
    )
