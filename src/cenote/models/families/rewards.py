"""Reward models: heads that Transformers has no class for, recognised by the tensors that a checkpoint carries.

Sources: `Qwen2ForRewardModel` and `Qwen2ForProcessRewardModel` (Qwen2.5-Math-RM-72B, Qwen2.5-Math-PRM-7B),
`InternLM2ForRewardModel` (internlm2-1_8b-reward), `Ernie4_5_VLMoeForProcessRewardModel` (FastDeploy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

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


def find(names: list[str]) -> tuple[RewardHead, dict[str, str]] | None:
    """The head whose tensors are among `names`, and the name of each of them by ending; `None` if there is none."""
    for head in HEADS:
        found = {
            key: name
            for key in (*head.keys, *head.optional)
            for name in names
            if name == key or name.endswith(f".{key}")
        }
        if all(key in found for key in head.keys):
            return head, found
    return None


def unknown_head(names: tuple[str, ...]) -> list[str]:
    """Of `names`, the tensors of a reward head that is none of `HEADS`."""
    return [
        name for name in names if {"score", "rm_head", "v_head", "reward_head", "value_head"} & set(name.split("."))
    ]


STEP_TAGS = {"Qwen2ForProcessRewardModel": "<extra_0>"}
"""Process reward models whose training fixes the token that closes a step."""

OF_LAST_TOKEN = frozenset({"Ernie4_5_VLMoeForProcessRewardModel"})
"""Reward models that rate the whole input by its last token unless told otherwise; the others rate every token."""
