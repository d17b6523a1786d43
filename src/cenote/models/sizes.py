"""Sizes that a config names, against those of the stored tensors, before a model takes memory or time for them.

`config.json` is a few bytes, and each number in it may stand for terabytes. Headers of weights bound the needs of
a model: counts are compared before the config's class makes lists of them, and tensors while the model is built on the
meta device, where they take no memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

from cenote.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from cenote.models.weights import Stored

SIZES = frozenset(
    {
        "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "head_dim", "hidden_size",
        "d_model", "n_embd", "embedding_size", "intermediate_size", "vocab_size",
    }
)  # fmt: skip
"""Keys of sizes, of which there is at least one."""

COUNTS = SIZES | {
    "num_hidden_layers", "n_layer", "n_layers", "num_hidden_groups", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "inner_group_num", "num_labels", "_num_labels", "num_experts", "num_local_experts",
    "n_routed_experts", "num_nextn_predict_layers",
    "type_vocab_size", "max_position_embeddings",
}  # fmt: skip
"""Keys of counts, of which there may be none."""

SWITCHES = {"num_experts": "is_moe"}
"""Keys of counts to those that may say that the model has none of it."""

POSITIONS = "max_position_embeddings"
"""Key of a count that tensors need not have: positions may be computed."""

LEAST = 4096
"""A count up to which nothing is asked: layers may share their weights, and tables may be computed."""

FACTOR = 4
"""Times the values that are stored which a model may have: matrices are fused, tied or padded differently."""

MORE_VALUES = 1 << 26
"""Values that a model may have besides: heads that it lacks, masks and tables that it computes."""

MORE_STEPS = 200_000
STEPS_PER_TENSOR = 1000
"""Calls of torch that building and loading a model takes at most; a layer of Transformers takes about a hundred."""


def check_counts(file: str, content: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Refuse a config with counts that are far beyond all sizes of the weights.

    Args:
        file: its name, for the message.
        content: of `config.json`; parts of models are looked into.
        tensors: all weights.

    Raises:
        CheckpointError: there is one.
    """
    largest = max(map(_largest, tensors.values()), default=0)
    limit = max(LEAST, len(tensors), FACTOR * largest)
    limits = {POSITIONS: math.inf}
    for name, value in _counts(content):
        key = name.rpartition(".")[2]
        least = int(key in SIZES)
        if value < least:
            raise CheckpointError(f"{file}: {name} is {value}, expected at least {least}; correct it")
        if value > limits.get(key, limit):
            raise CheckpointError(
                f"{file}: {name} is {value}, and the largest size in the weights is {largest}; correct it, or take "
                "the weights that belong to it"
            )


def keys_of(content: Mapping[str, Any], shape: Iterable[int]) -> str:
    """Return the keys of a config that have a size of a shape as their value or number of entries, for a message."""
    sizes = set(shape)
    keys = [key for key, value in content.items() if _size(value) in sizes]
    return f" ({', '.join(keys) or 'by no key alone'})"


def _size(value: Any) -> int | None:
    """Return the size that a value may be: itself, or the number of its entries."""
    if isinstance(value, dict | list):
        return len(value)
    return value if type(value) is int else None


def _largest(tensor: Stored) -> int:
    """Return the largest dimension of a tensor."""
    return max(tensor.shape, default=0)


def _counts(content: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the counts in a config and in the configs in it, with their dotted names."""
    for key, value in content.items():
        if isinstance(value, dict):
            for name, count in _counts(value):
                yield f"{key}.{name}", count
        elif key in COUNTS and isinstance(value, int | float) and content.get(SWITCHES.get(key, "")) is not False:
            yield key, value


INITIALISERS = frozenset(
    {
        init.normal_, init.uniform_, init.kaiming_uniform_, init.trunc_normal_, init.constant_, init.ones_, init.zeros_,
        torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_,
    }
)  # fmt: skip
"""Functions that give a tensor its first values, and return it."""


class Bounded(TorchFunctionMode):
    """Refuse to build a model that is far larger than its weights.

    Args:
        file: the config that names the sizes, for the message.
        content: of the config.
        tensors: the weights.
    """

    def __init__(self, file: str, content: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
        super().__init__()
        self._file = file
        self._content = content
        self._stored = sum(math.prod(tensor.shape) for tensor in tensors.values())
        self._values = FACTOR * self._stored + MORE_VALUES
        self._steps = STEPS_PER_TENSOR * len(tensors) + MORE_STEPS

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, and count it."""
        named = kwargs or {}
        bare = _bare(func, args, named)
        result = func(*args, **named) if bare is None else bare
        self._steps -= 1
        if bare is None and isinstance(result, torch.Tensor) and not any(map(torch.is_tensor, args)):
            self._values -= result.numel()
        if self._values < 0 or self._steps < 0:
            raise CheckpointError(self._message(tuple(getattr(result, "shape", ()))))
        return result

    def _message(self, shape: tuple[int, ...]) -> str:
        """Return the refusal at a tensor of `shape`."""
        keys = keys_of(self._content, shape)
        return (
            f"{self._file} describes a model of another size than the weights: they have {self._stored} values, and it "
            f"asks for over {FACTOR} times as many, the last in a tensor of the shape {shape}{keys}; correct it, or "
            "take the weights that belong to it"
        )


def _bare(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the tensor on the meta device that `func` initialises, which takes time for nothing; else `None`."""
    if func not in INITIALISERS:
        return None
    tensor: torch.Tensor = args[0] if args else kwargs["tensor"]
    return tensor if tensor.is_meta else None
