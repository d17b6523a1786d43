"""CLIP: a tower for texts and one for pictures, whose vectors are compared (arXiv:2103.00020).

An input is a text or a picture. A text is pooled at its first end-of-text token and projected; a picture at the tower's
class token, likewise (`CLIPModel.get_text_features`, `get_image_features`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from cenote.conventions import Pictures
from cenote.core import Media
from cenote.models.families.family import Family
from cenote.models.families.sights import Sight
from cenote.models.poolers import Embed, Rows
from cenote.models.vision import Vision
from cenote.tensors.packing import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as Seq

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cenote.config import ModelConfig
    from cenote.core import PoolingParams, Sequence
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.models.poolers import TaskOutput
    from cenote.tensors.packing import Batch, Place

OLD_END = 2
"""`eos_token_id` of old configs, which is wrong: the end of a text is its highest id there."""

NO_TOKEN = -1


@dataclass(frozen=True)
class Clip(Family):
    """A checkpoint with two towers."""

    title: ClassVar[str] = "two towers (CLIP)"
    embeds_tokens: ClassVar[bool] = False

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Clip | None:
        """Recognise the `model_type`."""
        return cls() if files.config.model_type == "clip" else None

    def backbone(self, full: PreTrainedModel) -> PreTrainedModel:
        """Return the tower for texts."""
        return full.text_model  # type: ignore[return-value]

    def prepare(self, full: PreTrainedModel) -> None:
        """Let rows of several texts stand end to end.

        The tower's own pooling looks for the end of one text; it finds none then, and takes the first row.
        """
        tower: Any = full.text_model
        tower.eos_token_id = NO_TOKEN
        let_stand_end_to_end(tower.embeddings)

    def finish(self, full: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """Return the projection of texts."""
        return full.text_projection  # type: ignore[return-value]

    def width(self, files: Files) -> int:
        """Return the length of a projected row."""
        return int(files.config.projection_dim)

    def sight(self, files: Files) -> Sight:
        """Return how the tower for pictures is run."""
        config = files.config.vision_config
        patches = (config.image_size // config.patch_size) ** 2 + 1
        folder = str(files.folder.absolute())
        return Sight(ClipVision, Pictures(folder, "fixed", tokens=patches, patches=patches))

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return vectors."""
        return {"embed": ClipEmbed(loaded.pooler, loaded.files.config.text_config.eos_token_id)}


def let_stand_end_to_end(embeddings: Any) -> None:
    """Let rows of several texts be embedded as one: their number is no position, which Transformers checks it for."""

    def forward(input_ids: Tensor, position_ids: Tensor | None = None, **_: object) -> Tensor:
        if position_ids is None:
            position_ids = embeddings.position_ids[:, : input_ids.shape[-1]]
        return embeddings.token_embedding(input_ids) + embeddings.position_embedding(position_ids)  # type: ignore[no-any-return]

    embeddings.forward = forward


@dataclass(frozen=True)
class ClipEmbed(Embed):
    """`embed`: the row at the end of a text, or any row of a picture, which are all alike.

    Attributes:
        end: id of the end-of-text token.
    """

    end: int

    def place(self, batch: Batch, members: list[int]) -> Place | None:
        """Return "last", unless a text goes on behind its end."""
        lasts = [batch.starts[i + 1] - 1 for i in members]
        return "last" if self._rows(batch, members) == lasts else None

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[B, D]`."""
        rows = batch.index(self._rows(batch, members))
        return Rows(self.pooler.finish(x_TD[rows], params))

    def _rows(self, batch: Batch, members: list[int]) -> list[int]:
        """Return the row of each member that counts."""
        return [self._row(batch, i) for i in members]

    def _row(self, batch: Batch, member: int) -> int:
        rows = batch.rows[member]
        if batch.sequences[member].media:
            return rows.stop - 1
        ids_L = batch.host_ids_T[rows.start : rows.stop]
        ends_L = ids_L if self.end == OLD_END else ids_L == self.end
        return rows.start + int(np.argmax(ends_L))


class ClipVision(Vision):
    """The tower for pictures, whose vector stands at every token of a picture."""

    is_apart = True

    @property
    def tower(self) -> nn.Module:
        """The part of the model that reads patches."""
        return self._full.vision_model  # type: ignore[no-any-return]

    @property
    def reader(self) -> nn.Module:
        """The tower for texts."""
        return self._full.text_model  # type: ignore[no-any-return]

    @property
    def projection(self) -> nn.Module:
        """The step from hidden states of a text to its vector."""
        return self._full.text_projection  # type: ignore[no-any-return]

    @property
    def _full(self) -> Any:
        return self.full

    def attention(self, name: str) -> str:
        """Return `name`: the tower for texts is a model of its own."""
        return name

    def features(self, media: Seq[Media]) -> Features:
        """Return the vector of each picture, at each of its tokens."""
        vectors_ID = self._full.get_image_features(pixel_values=self.stacked(media, "pixel_values")).pooler_output
        return Features(vectors_ID.repeat_interleave(self.pictures.tokens, 0))

    def alone(self, sequence: Sequence) -> Tensor:
        """Return the rows `[L, D]` of one sequence by the model's own forward, as a reference."""
        if sequence.media:
            return self.features(sequence.media).rows_FD
        ids_1L = torch.tensor([list(sequence.ids)], device=self.full.device)
        states_LD = self._full.text_model(input_ids=ids_1L).last_hidden_state[0]
        return self.projection(states_LD)  # type: ignore[no-any-return]

    def draw(self, generator: torch.Generator) -> Iterator[Media]:
        """Yield pictures of random content, without end."""
        side, tokens = self._full.config.vision_config.image_size, self.pictures.tokens
        for number in count():
            arrays = {"pixel_values": torch.randn(3, side, side, generator=generator).numpy()}
            yield Media(number.to_bytes(8), tokens, tokens, arrays=arrays)
