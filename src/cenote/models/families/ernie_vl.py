"""Ernie-4.5-VL-MoE: a tower like Qwen-VL's, and experts of their own for the tokens of pictures.

The id of a token says which experts it goes to: those of vision for a picture's tokens and the two that frame it
(`Ernie4_5_VLMoeProcessor.create_moe_mm_token_type_ids`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cenote.conventions import MessageTemplate, Pictures
from cenote.models.families.qwen_vl import QwenVL

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cenote.models.facts import Files

MARKUP = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
SPELLED = "<|image@placeholder|>"
"""The placeholder in the published chat template, which the model's own processor replaces."""


class ErnieVL(QwenVL):
    """The pictures of an Ernie-4.5-VL-MoE model."""

    @classmethod
    def describe(cls, files: Files) -> Pictures:
        """Return how its inputs hold pictures."""
        return Pictures(
            folder=str(files.folder.absolute()),
            layout="grid",
            placeholder=int(files.config.image_token_id),
            markup=MARKUP,
            spelled=SPELLED,
            merge=int(files.config.vision_config.spatial_merge_size),
            positions="mrope",
            template=MessageTemplate(None, {"add_generation_prompt": True}, structured=True),
        )

    @property
    def tower(self) -> nn.Module:
        """The part of the model that reads patches, but for the small one that merges them."""
        return self.base.vision_tower  # type: ignore[no-any-return]

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids before and behind the tokens of a picture in a prompt."""
        return [self.base.config.image_start_token_id], [self.base.config.image_end_token_id]

    @property
    def patch_width(self) -> int:
        """Numbers of a patch."""
        config = self.base.config.vision_config
        return int(config.in_channels * config.patch_size**2)

    def by_ids(self, ids: Tensor) -> dict[str, Any]:
        """Return which tokens go to the experts of vision."""
        before, behind = self.frame
        of_vision = torch.tensor([self.pictures.placeholder, *before, *behind], device=ids.device)
        return {"moe_mm_token_type_ids": torch.isin(ids, of_vision).int()}
