"""ArmoRM: rewards by many objectives, weighed by a gate over the prompt (arXiv:2406.12845).

The last token's state gives a reward for each objective, which a matrix corrects. The state where the prompt ends, at
the header of the assistant's last turn, gives the weight of each. Facts of `LlamaForRewardModelWithGating`, the code
that ArmoRM-Llama3-8B brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn

from cenote.errors import CheckpointError
from cenote.models.classifiers import Classifier, at_none, linear
from cenote.models.convert import Head
from cenote.models.families.family import Family

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from cenote.config import ModelConfig
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.tensors.packing import Batch

    Array = np.ndarray[Any, Any]

REGRESSION, TRANSFORM, SCALE = "regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"
LAYERS = "gating.layers."
END_OF_PROMPT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
TEMPERATURE = 10.0
"""Divisor of the gate's logits, where the config names none."""


@dataclass(frozen=True)
class Gating(Family):
    """A checkpoint with such heads.

    Attributes:
        tensors: names of their tensors.
    """

    title: ClassVar[str] = "gated reward model (ArmoRM)"

    head: Head
    tensors: tuple[str, ...] = ()

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Gating | None:
        """Recognise the heads by the names of their tensors."""
        if not {REGRESSION, TRANSFORM, SCALE} <= set(files.tensors):
            return None
        layers = [name for name in files.tensors if name.startswith(LAYERS)]
        return cls(
            Head("reward", name=f"{files.architecture}, gated objectives (ArmoRM)"),
            (REGRESSION, TRANSFORM, SCALE, *layers),
        )

    def classifier(self, loaded: Loaded) -> Classifier:
        """Return the heads, made of their tensors.

        Raises:
            CheckpointError: they do not fit each other, or the vocabulary lacks the end of a prompt.
        """
        tensors = loaded.tensors(self.tensors)
        objectives = tensors[REGRESSION].shape[0]
        if tensors[TRANSFORM].shape != (objectives, objectives):
            raise CheckpointError(
                f"{loaded.files.name}: {TRANSFORM} is {tuple(tensors[TRANSFORM].shape)}, expected "
                f"{(objectives, objectives)} by {REGRESSION}; quantiles of rewards (QRM) are not served"
            )
        end = loaded.tokenizer(END_OF_PROMPT, add_special_tokens=False)["input_ids"]
        temperature = float(getattr(loaded.files.config, "gating_temperature", TEMPERATURE))
        score = _Score(loaded.placed(_Objectives(tensors)), loaded.placed(_Gate(tensors, temperature)), tuple(end))
        return Classifier(score.objectives, score, False, 1, at_none)


class _Objectives(nn.Module):
    """Corrected rewards by all objectives."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layer = linear(tensors[REGRESSION])
        self.transform = nn.Parameter(tensors[TRANSFORM].float(), requires_grad=False)

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, D] -> [R, O]`."""
        rewards_RO: Tensor = self.layer(x_RD.float()) @ self.transform
        return rewards_RO


class _Gate(nn.Module):
    """Weights of the objectives: linear layers with ReLU between them, then a softmax."""

    def __init__(self, tensors: Mapping[str, Tensor], temperature: float) -> None:
        super().__init__()
        numbers = sorted({int(name.removeprefix(LAYERS).partition(".")[0]) for name in tensors if LAYERS in name})
        self.layers = nn.ModuleList(
            linear(tensors[f"{LAYERS}{i}.weight"], tensors.get(f"{LAYERS}{i}.bias")) for i in numbers
        )
        self.scale = nn.Parameter(tensors[SCALE].float(), requires_grad=False)
        self.temperature = temperature

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, D] -> [R, O]`."""
        x_RD = x_RD.float()
        for i, layer in enumerate(self.layers):
            x_RD = layer(x_RD.relu() if i else x_RD)
        return (x_RD / self.temperature).softmax(-1) * self.scale[0]


@dataclass(frozen=True)
class _Score:
    """The reward of a conversation.

    Attributes:
        end: ids by which a prompt ends.
    """

    objectives: nn.Module
    gate: nn.Module
    end: tuple[int, ...]

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        """`[B, 1]`; NaN, which is refused, for an input without an end of a prompt."""
        last_BD = x_TD[batch.index([batch.starts[i + 1] - 1 for i in members])]
        ends = [self._end(batch.host_ids_T[batch.starts[i] : batch.starts[i + 1]]) for i in members]
        rows = [batch.starts[i] + max(end, 0) for i, end in zip(members, ends, strict=True)]
        scores_B = (self.gate(x_TD[batch.index(rows)]) * self.objectives(last_BD)).sum(-1)
        has_end_B = torch.tensor([end >= 0 for end in ends], device=scores_B.device)
        return torch.where(has_end_B, scores_B, torch.nan)[:, None]

    def _end(self, ids_T: Array) -> int:
        """Return where the last end of a prompt begins; -1 if there is none."""
        size = len(self.end)
        if len(ids_T) < size:
            return -1
        matches = (np.lib.stride_tricks.sliding_window_view(ids_T, size) == np.array(self.end)).all(-1)
        return int(np.flatnonzero(matches).max(initial=-1))
