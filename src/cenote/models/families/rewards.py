"""Reward models: heads that Transformers has no class for, recognised by the tensors that a checkpoint carries.

Sources: `Qwen2ForRewardModel` and `Qwen2ForProcessRewardModel` (Qwen2.5-Math-RM-72B, Qwen2.5-Math-PRM-7B),
`InternLM2ForRewardModel` (internlm2-1_8b-reward), `Ernie4_5_VLMoeForProcessRewardModel` (FastDeploy).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from cenote.errors import CheckpointError
from cenote.models import classifiers
from cenote.models.convert import Head, is_reward
from cenote.models.families.family import Family

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from cenote.config import ModelConfig
    from cenote.models.classifiers import Classifier
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded

    Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class RewardHead:
    """One row of the table.

    Attributes:
        keys: endings of the names of its tensors; a checkpoint that has them all has this head.
        build: the module over rows, `[R, D] -> [R, C]`, from those tensors by ending.
        optional: endings of tensors that may be missing.
    """

    name: str
    keys: tuple[str, ...]
    build: Callable[[Tensors], nn.Module]
    optional: tuple[str, ...] = ()

    def places(self, names: Seq[str]) -> dict[str, str]:
        """Return by ending those of `names` that are tensors of this head."""
        endings = [*self.keys, *self.optional]
        return {key: name for key in endings for name in names if f".{name}".endswith(f".{key}")}


class _Gated(nn.Module):
    """SiLU-gated projection down to the reward. The first half of `up_gate` is the gate."""

    def __init__(self, up_gate: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up_gate = up_gate
        self.down = down

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, D] -> [R, C]`."""
        gate_RD, up_RD = self.up_gate(x_RD).chunk(2, dim=-1)
        reward_RC: Tensor = self.down(F.silu(gate_RD) * up_RD)
        return reward_RC


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer


def _two_layers(t: Tensors) -> nn.Module:
    first = _linear(t["score.0.weight"], t["score.0.bias"])
    return nn.Sequential(first, nn.ReLU(), _linear(t["score.2.weight"], t["score.2.bias"]))


def _gated(t: Tensors) -> nn.Module:
    return _Gated(_linear(t["rm_head.up_gate_proj.weight"]), _linear(t["rm_head.down_proj.weight"]))


HEADS: tuple[RewardHead, ...] = (
    RewardHead("two layers (Qwen2)", ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"), _two_layers),
    RewardHead("gated (Ernie)", ("rm_head.up_gate_proj.weight", "rm_head.down_proj.weight"), _gated),
    RewardHead("linear (InternLM2)", ("v_head.weight",), lambda t: _linear(t["v_head.weight"])),
    RewardHead("linear", ("score.weight",), lambda t: _linear(t["score.weight"], t.get("score.bias")), ("score.bias",)),
)
"""The first whose tensors are all there counts."""


HEAD_NAMES = frozenset({"score", "rm_head", "v_head", "reward_head", "value_head"})
"""Names that modules of reward heads have; a tensor in one of them that no row of `HEADS` takes is not understood."""

STEP_TAGS = {"Qwen2ForProcessRewardModel": "<extra_0>"}
"""Process reward models whose training fixes the token that closes a step."""

OF_LAST_TOKEN = frozenset({"Ernie4_5_VLMoeForProcessRewardModel"})
"""Reward models that rate the whole input by its last token unless told otherwise; the others rate every token."""


@dataclass(frozen=True)
class Rewards(Family):
    """A reward model.

    Attributes:
        row: its head; `None` = it has none, and is an embedder.
        places: names of the head's tensors, by ending.
    """

    title: ClassVar[str] = "reward model"
    head: Head
    row: RewardHead | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    step_tag: str | None = None
    rates_tokens: bool = False

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Rewards | None:
        """Recognise a reward model by its architecture's name, and its head by the names of its tensors."""
        architecture = files.architecture
        if options.convert == "embed" or not is_reward(architecture):
            return None
        for row in HEADS:
            places = row.places(files.tensors)
            if all(key in places for key in row.keys):
                return cls(
                    head=Head("reward", name=f"{architecture}, {row.name}"),
                    row=row,
                    places=places,
                    step_tag=STEP_TAGS.get(architecture),
                    rates_tokens=architecture not in OF_LAST_TOKEN,
                )
        unknown = [name for name in files.tensors if HEAD_NAMES.intersection(name.split("."))]
        if unknown:
            raise CheckpointError(f"{architecture}: its tensors {', '.join(unknown)} are no reward head that is known")
        return cls(head=Head())

    def classifier(self, loaded: Loaded) -> Classifier | None:
        """Return the head, made of its tensors."""
        if self.row is None:
            return None
        tensors = loaded.tensors(self.places.values())
        module = loaded.placed(self.row.build({key: tensors[name] for key, name in self.places.items()}))
        with torch.inference_mode():
            num_labels = module(torch.zeros(1, loaded.files.width, device=loaded.full.device)).shape[-1]
        return classifiers.of_modules(module, num_labels)
