"""CLAP: a tower for texts and one for sound, of which the one for texts is served (arXiv:2211.06687).

A text is pooled at its first token by the tower's own pooler, projected and normalised, as by
`ClapModel.get_text_features`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch.nn.functional import normalize

from cenote.models.families.family import Family
from cenote.models.families.sights import Sight, refused
from cenote.models.poolers import Embed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.config import ModelConfig
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.models.poolers import TaskOutput


@dataclass(frozen=True)
class Clap(Family):
    """A checkpoint with two towers."""

    title: ClassVar[str] = "two towers (CLAP)"
    embeds_tokens: ClassVar[bool] = False

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Clap | None:
        """Recognise the `model_type`."""
        return cls() if files.config.model_type == "clap" else None

    def backbone(self, full: PreTrainedModel) -> PreTrainedModel:
        """Return the tower for texts."""
        return full.text_model  # type: ignore[return-value]

    def prepare(self, full: PreTrainedModel) -> None:
        """Say of each attention that it is not causal, which this tower leaves out."""
        tower: Any = full.text_model
        for layer in tower.encoder.layer:
            layer.attention.self.is_causal = False

    def finish(self, full: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """Return the pooler's layer and the projection of texts."""
        model: Any = full

        def projected(x_TD: Tensor) -> Tensor:
            pooler = model.text_model.pooler
            return normalize(model.text_projection(pooler.activation(pooler.dense(x_TD))), dim=-1)

        return projected

    def width(self, files: Files) -> int:
        """Return the length of a projected row."""
        return int(files.config.text_config.projection_dim)

    def sight(self, files: Files) -> Sight:
        """Return that its other tower is not run."""
        return refused(f"pictures and sound for {files.architecture} are not served yet, only texts")

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return vectors, of first tokens."""
        return {"embed": Embed(replace(loaded.pooler, modes=("cls",)))}
