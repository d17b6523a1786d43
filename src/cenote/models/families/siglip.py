"""SigLIP and SigLIP 2: a tower for texts and one for pictures (arXiv:2303.15343, arXiv:2502.14786).

Texts are filled up to the length of their training, and all tokens attend to the ones added: the state of the last,
usually one of these, is the vector (`SiglipTextModel`). SigLIP 2 with any resolution ("naflex") reads a picture as
patches in its own proportions; the others resize all to a square, and their checkpoints are those of SigLIP.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, cycle
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from cenote.conventions import Pictures, Sides
from cenote.core import Media
from cenote.errors import CheckpointError
from cenote.models.families.clip import ClipVision, let_stand_end_to_end
from cenote.models.families.family import Family
from cenote.models.families.sights import Sight
from cenote.tensors.packing import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as Seq

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.models.facts import Files


@dataclass(frozen=True)
class Siglip(Family):
    """A checkpoint with two towers.

    Attributes:
        length: tokens of every text.
    """

    title: ClassVar[str] = "two towers (SigLIP)"
    embeds_tokens: ClassVar[bool] = False

    length: int = 64

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Siglip | None:
        """Recognise the `model_type`."""
        if files.config.model_type not in VISIONS:
            return None
        return cls(length=int(files.config.text_config.max_position_embeddings))

    def backbone(self, full: PreTrainedModel) -> PreTrainedModel:
        """Return the tower for texts."""
        return full.text_model  # type: ignore[return-value]

    def prepare(self, full: PreTrainedModel) -> None:
        """Let rows of several texts stand end to end."""
        tower: Any = full.text_model
        let_stand_end_to_end(tower.embeddings)

    def finish(self, full: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """Return the projection of texts."""
        return full.text_model.head  # type: ignore[return-value, union-attr]

    def width(self, files: Files) -> int:
        """Return the length of a projected row."""
        return int(files.config.text_config.projection_size)

    def sides(self, tokenizer: PreTrainedTokenizerBase) -> Sides:
        """Return how texts are filled up.

        Raises:
            CheckpointError: its tokenizer fills them up at the front, or has no token for it.
        """
        pad = tokenizer.pad_token_id
        if tokenizer.padding_side != "right" or not isinstance(pad, int):
            raise CheckpointError(
                f"its tokenizer has padding_side {tokenizer.padding_side!r} and the pad token {tokenizer.pad_token!r}; "
                "SigLIP's texts are filled up at the right; set both in tokenizer_config.json"
            )
        return Sides(fill_to=self.length, fill_id=pad, fixed=False, attend=True, fills_all=True)

    def sight(self, files: Files) -> Sight:
        """Return how the tower for pictures is run."""
        config, kind = files.config.vision_config, files.config.model_type
        patches = PATCHES[kind](config)
        return Sight(VISIONS[kind], Pictures(str(files.folder.absolute()), "fixed", tokens=patches, patches=patches))


class SiglipVision(ClipVision):
    """The tower for pictures, whose vector stands at every token of a picture."""

    @property
    def projection(self) -> nn.Module:
        """The step from hidden states of a text to its vector."""
        return self._full.text_model.head  # type: ignore[no-any-return]


class NaflexVision(SiglipVision):
    """The tower for pictures in their own proportions, as patches that are filled up to the same number."""

    def features(self, media: Seq[Media]) -> Features:
        """Return the vector of each picture, at each of its tokens."""
        arrays = {name: self.stacked(media, name) for name in ARRAYS}
        vectors_ID = self._full.get_image_features(**arrays).pooler_output
        return Features(vectors_ID.repeat_interleave(self.pictures.tokens, 0))

    def draw(self, generator: torch.Generator) -> Iterator[Media]:
        """Yield pictures of random content, of a few proportions in turn, without end."""
        config, tokens = self._full.config.vision_config, self.pictures.tokens
        width = config.num_channels * config.patch_size**2
        for number, (rows, columns) in zip(count(), cycle(((1, 2), (2, 1), (2, 2)))):
            seen = torch.arange(tokens) < rows * columns
            patches = torch.randn(tokens, width, generator=generator) * seen[:, None]
            values = (patches, seen.int(), torch.tensor((rows, columns)))
            arrays = {name: value.numpy() for name, value in zip(ARRAYS, values, strict=True)}
            yield Media(number.to_bytes(8), tokens, tokens, (rows, columns), arrays)


ARRAYS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
VISIONS = {"siglip": SiglipVision, "siglip2": NaflexVision}
"""By the `model_type` of a config."""
PATCHES: dict[str, Callable[[Any], int]] = {
    "siglip": lambda config: int(config.image_size // config.patch_size) ** 2,
    "siglip2": lambda config: int(config.num_patches),
}
"""Patches of a picture, by the config of its tower."""
