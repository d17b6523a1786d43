"""Reward models: heads that Transformers has no class for, recognised by the tensors that a checkpoint carries.

Sources: `Qwen2ForRewardModel` and `Qwen2ForProcessRewardModel` (Qwen2.5-Math-RM-72B, Qwen2.5-Math-PRM-7B),
`InternLM2ForRewardModel` (internlm2-1_8b-reward), `Ernie4_5_VLMoeForProcessRewardModel` (FastDeploy),
`Qwen2ForPrmModel` (Skywork-o1-Open-PRM) and TRL's value heads, `LlamaRewardModel` (UltraRM, Eurus-RM),
`LlamaModelForScore` (safe-rlhf: beaver-7b), `INFORMForSequenceClassification` (INF-ORM-Llama3.1-70B) and
`LlamaForRewardModelWithGating` (ArmoRM-Llama3-8B).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from cenote.errors import CheckpointError
from cenote.models import classifiers
from cenote.models.classifiers import linear
from cenote.models.convert import Head, is_in_layer, is_reward
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
        build: the module over rows, `[R, D] -> [R, C]`, from those tensors by ending and the config.
        optional: endings of tensors that may be missing.
        rates_tokens: it is made for every token rather than for the last one of an input.
        is_common: other models have tensors of these names; it is recognised with the architecture's name alone.
    """

    name: str
    keys: tuple[str, ...]
    build: Callable[[Tensors, Any], nn.Module]
    optional: tuple[str, ...] = ()
    rates_tokens: bool = True
    is_common: bool = False

    def places(self, names: Seq[str]) -> dict[str, str]:
        """Return by ending those of `names` that are tensors of this head; numbered layers have none of it."""
        endings = [*self.keys, *self.optional]
        return {key: name for key in endings for name in names if _is_beside(name, key)}


def _is_beside(name: str, ending: str) -> bool:
    """Return whether a tensor called `name` has that ending, and is in no numbered layer."""
    if not name.endswith(ending):
        return False
    before = name.removesuffix(ending)
    is_whole = before == "" or before.endswith(".")
    return is_whole and not is_in_layer(before)


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


class _Normalized(nn.Module):
    """A linear layer whose scores are normalised as safe-rlhf's `Normalizer` does."""

    def __init__(self, layer: nn.Linear, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.mean = nn.Buffer(mean)
        self.std = nn.Buffer(std)

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, D] -> [R, C]`."""
        scores_RC: Tensor = (self.layer(x_RD) - self.mean) / (self.std + SAFE_RLHF_EPSILON)
        return scores_RC


SAFE_RLHF_EPSILON = 1e-8


def _two_layers(t: Tensors, config: Any) -> nn.Module:
    first = linear(t["score.0.weight"], t["score.0.bias"])
    return nn.Sequential(first, nn.ReLU(), linear(t["score.2.weight"], t["score.2.bias"]))


def _gated(t: Tensors, config: Any) -> nn.Module:
    return _Gated(linear(t["rm_head.up_gate_proj.weight"]), linear(t["rm_head.down_proj.weight"]))


def _one_layer(name: str) -> Callable[[Tensors, Any], nn.Module]:
    """Return a function that builds the linear layer called `name`."""
    return lambda t, config: linear(t[f"{name}.weight"], t.get(f"{name}.bias"))


def _safe_rlhf(t: Tensors, config: Any) -> nn.Module:
    """Return the head of safe-rlhf: rewards are normalised by mean and deviation, costs by the deviation.

    Raises:
        CheckpointError: scores are to be normalised, and the statistics are missing.
    """
    layer = linear(t["score_head.weight"], t.get("score_head.bias"))
    kind = getattr(config, "score_type", "reward")
    if not getattr(config, "do_normalize", False) or kind == "critic":
        return layer
    if kind not in ("reward", "cost"):
        raise CheckpointError(f"score_type in config.json is {kind!r}, expected reward, cost or critic")
    mean, variance = _statistic(t, config, "mean"), _statistic(t, config, "var")
    return _Normalized(layer, mean if kind == "reward" else torch.zeros_like(mean), variance.sqrt())


def _statistic(t: Tensors, config: Any, name: str) -> Tensor:
    """Return a statistic of rewards, `[C]` float32: that of the config, else the tensor."""
    written, stored = getattr(config, name, None), t.get(f"normalizer.{name}")
    if written is not None:
        return torch.as_tensor(written, dtype=torch.float32)
    if stored is None:
        raise CheckpointError(
            f"do_normalize in config.json is true, but the checkpoint has neither {name!r} there nor the tensor "
            f'normalizer.{name}; hf_overrides {{"do_normalize": false}} serves raw scores'
        )
    return stored.float()


HEADS: tuple[RewardHead, ...] = (
    RewardHead("two layers (Qwen2)", ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"), _two_layers),
    RewardHead("gated (Ernie)", ("rm_head.up_gate_proj.weight", "rm_head.down_proj.weight"), _gated),
    RewardHead("linear (InternLM2)", ("v_head.weight",), _one_layer("v_head"), ("v_head.bias",)),
    RewardHead("value head (TRL)", ("v_head.summary.weight",), _one_layer("v_head.summary"), ("v_head.summary.bias",)),
    RewardHead(
        "regression head (UltraRM)",
        ("regression_head.weight",),
        _one_layer("regression_head"),
        ("regression_head.bias",),
        rates_tokens=False,
    ),
    RewardHead(
        "score head (safe-rlhf)",
        ("score_head.weight",),
        _safe_rlhf,
        ("score_head.bias", "normalizer.mean", "normalizer.var", "normalizer.count"),
        rates_tokens=False,
    ),
    RewardHead("linear", ("score.weight",), _one_layer("score"), ("score.bias",), is_common=True),
)
"""The first whose tensors are all there counts."""


HEAD_NAMES = frozenset({"score", "rm_head", "v_head", "reward_head", "value_head"})
"""Names that modules of reward heads have; a tensor in one of them that no row of `HEADS` takes is not understood."""

STEP_TAGS = {"Qwen2ForProcessRewardModel": "<extra_0>"}
"""Process reward models whose training fixes the token that closes a step."""

OF_INPUTS = ("Ernie4_5_VLMoeForProcessRewardModel", "ForSequenceClassification")
"""Endings of architectures that rate the whole input by its last token unless told otherwise."""


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
    tensors: tuple[str, ...] = ()
    step_tag: str | None = None
    rates_tokens: bool = False

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Rewards | None:
        """Recognise the head by the names of its tensors, and a common name of one by the architecture's."""
        architecture = files.architecture
        is_named = is_reward(architecture)
        for row in HEADS:
            places = row.places(files.tensors)
            if places.keys() >= set(row.keys) and (is_named or not row.is_common):
                return cls(
                    head=Head("reward", name=f"{architecture}, {row.name}"),
                    row=row,
                    places=places,
                    tensors=tuple(places.values()),
                    step_tag=STEP_TAGS.get(architecture),
                    rates_tokens=row.rates_tokens and not architecture.endswith(OF_INPUTS),
                )
        if not is_named or options.convert == "embed":
            return None
        unknown = [name for name in files.tensors if HEAD_NAMES.intersection(name.split("."))]
        if unknown:
            raise CheckpointError(f"{architecture}: its tensors {', '.join(unknown)} are no reward head that is known")
        return cls(head=Head())

    def classifier(self, loaded: Loaded) -> Classifier | None:
        """Return the head, made of its tensors."""
        if self.row is None:
            return None
        tensors = loaded.tensors(self.places.values())
        by_ending = {key: tensors[name] for key, name in self.places.items()}
        module = loaded.placed(self.row.build(by_ending, loaded.files.config))
        with torch.inference_mode():
            row_1D = torch.zeros(1, loaded.files.width, dtype=torch.float32, device=loaded.full.device)
            num_labels = module(row_1D).shape[-1]
        return classifiers.of_modules(module, num_labels)
