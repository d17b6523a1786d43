"""Weights under the names of a checkpoint's own code, under those of Transformers' class.

A row of `cenote.models.remote_code` names the renaming. Where one matrix makes queries, keys and values, its rows are
in groups, one for each key-value head or one for all: the queries, then the keys, then the values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cenote.models import weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Renaming:
    """The names of one implementation.

    Attributes:
        names: parts of its names, as patterns, to those of Transformers, in this order.
        fused: part of the names of matrices that make queries, keys and values, in Transformers' other words;
            empty = there are none.
        parts: of such a name, for queries, keys and values.
        is_grouped: its rows are in a group for each key-value head, else in one group.
    """

    names: Mapping[str, str]
    fused: str = ""
    parts: tuple[str, ...] = ()
    is_grouped: bool = False

    def split(self, tensor: Tensor, config: Any) -> tuple[Tensor, ...]:
        """Return the rows of queries, keys and values of a matrix or bias `[R, ...]`."""
        groups = config.num_key_value_heads if self.is_grouped else 1
        queries = config.num_attention_heads // groups if self.is_grouped else 1
        grouped = tensor.reshape(groups, queries + 2, -1, *tensor.shape[1:])
        return tuple(part.flatten(0, 2) for part in torch.split(grouped, [queries, 1, 1], dim=1))

    def of(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Return `tensors` under Transformers' names."""
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            for pattern, words in self.names.items():
                name = re.sub(pattern, words, name)
            if not self.fused or self.fused not in name:
                renamed[name] = tensor
                continue
            for part, rows in zip(self.parts, self.split(tensor, config), strict=True):
                renamed[name.replace(self.fused, part)] = rows
        return renamed


RENAMINGS: Mapping[str, Renaming] = {
    "colqwen3": Renaming({r"^vlm\.model\.": "", r"^vlm\.": ""}),
    "xlm-roberta-flash": Renaming(
        {
            r"\bemb_ln\b": "embeddings.LayerNorm",
            r"\bencoder\.layers\b": "encoder.layer",
            r"\bmixer\.out_proj\b": "attention.output.dense",
            r"\bnorm1\b": "attention.output.LayerNorm",
            r"\bmlp\.fc1\b": "intermediate.dense",
            r"\bmlp\.fc2\b": "output.dense",
            r"\bnorm2\b": "output.LayerNorm",
        },
        fused="mixer.Wqkv",
        parts=("attention.self.query", "attention.self.key", "attention.self.value"),
        is_grouped=False,
    ),
    "internlm2": Renaming(
        {
            r"\btok_embeddings\b": "embed_tokens",
            r"\battention\.wo\b": "self_attn.o_proj",
            r"\bfeed_forward\.w1\b": "mlp.gate_proj",
            r"\bfeed_forward\.w3\b": "mlp.up_proj",
            r"\bfeed_forward\.w2\b": "mlp.down_proj",
            r"\battention_norm\b": "input_layernorm",
            r"\bffn_norm\b": "post_attention_layernorm",
        },
        fused="attention.wqkv",
        parts=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        is_grouped=True,
    ),
}
"""Implementations by the name that a config has as `renamed_tensors`."""


def tensors(folder: Path, config: Any, *, pickles: bool) -> dict[str, Tensor] | None:
    """Return the weights in `folder` under the names of Transformers' class; `None` if they are stored so."""
    name = getattr(config, "renamed_tensors", None)
    if name is None:
        return None
    stored: dict[str, Tensor] = {}
    for file in weights.model_files(folder, pickles=pickles):
        stored |= weights.read(folder / file)
    return RENAMINGS[name].of(stored, config)
