"""How architectures take pictures, whatever kind of checkpoint they are of."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

from cenote.conventions import Pictures
from cenote.functions import optional
from cenote.models.families.ernie_vl import ErnieVL
from cenote.models.families.qwen_vl import Published, QwenVL, published

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from cenote.conventions import MessageTemplate
    from cenote.models.facts import Files
    from cenote.models.vision import Vision


class Sight(NamedTuple):
    """How a checkpoint takes pictures.

    Attributes:
        vision: makes the pictures of its model; `None` = it takes none, for the reason in `pictures`.
        pictures: the part that rendering needs.
    """

    vision: Callable[[PreTrainedModel, Pictures], Vision] | None
    pictures: Pictures


SIGHTS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), QwenVL),
    "ernie4_5_vl_moe": ErnieVL,
}
"""By the `model_type` of a config."""


SIGNS = ("vision_config", "image_config", "vq_config", "image_token_id", "image_token_index")
"""Entries of configs of architectures that take pictures."""


def of_backbone(files: Files) -> Sight | None:
    """Return how a checkpoint takes pictures by its architecture; `None` = it has no part for them."""
    kind = SIGHTS.get(files.config.model_type)
    if kind is not None:
        return Sight(kind, kind.describe(files))
    if not any(getattr(files.config, name, None) is not None for name in SIGNS):
        return None
    return refused(f"pictures for {files.architecture} are not served yet, only texts")


def published_template(files: Files) -> MessageTemplate | None:
    """Return how all inputs of a known vision-language embedder are rendered; `None` = it is not one of these."""
    row = published(files) if SIGHTS.get(files.config.model_type) is QwenVL else None
    return optional(Published.template, row)


def refused(reason: str) -> Sight:
    """Return the sight of a model that takes no pictures for a reason."""
    return Sight(None, Pictures("", "", refusal=reason))


def needs_pillow(sight: Sight) -> Sight:
    """Return `sight`, or the refusal of all pictures where Pillow is not installed."""
    if sight.vision is None or importlib.util.find_spec("PIL") is not None:
        return sight
    return refused("pictures need Pillow, which is not installed; pip install 'cenote[media]'")
