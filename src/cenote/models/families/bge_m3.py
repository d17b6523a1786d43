"""bge-m3: one backbone, three outputs. Besides the dense vector, a weight and a vector for each token.

Recognised by its files `sparse_linear.pt` and `colbert_linear.pt`, which are read without running pickled code
(arXiv:2402.03216; FlagEmbedding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from cenote.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

FILES = ("sparse_linear.pt", "colbert_linear.pt")
ARCHITECTURE = "BgeM3EmbeddingModel"


def is_one(architecture: str, folder: Path) -> bool:
    """Whether the checkpoint is one of this family."""
    return architecture == ARCHITECTURE or all((folder / name).is_file() for name in FILES)


def heads(folder: Path, width: int) -> tuple[nn.Linear, nn.Linear]:
    """The two layers over hidden states of size `width`, float32: a weight per token, and a vector per token.

    Raises:
        CheckpointError: a file is missing, damaged, or has other tensors.
    """
    weight, vector = (_linear(folder / name, width) for name in FILES)
    if weight.out_features != 1:
        raise CheckpointError(f"{FILES[0]} must give one weight per token, not {weight.out_features}")
    return weight, vector


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that carry no weight."""
    ids = (tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return tuple(sorted({i for i in ids if i is not None}))


def _linear(file: Path, width: int) -> nn.Linear:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise errors of any kind
        raise CheckpointError(f"cannot read {file.name}: {error}") from None
    if not isinstance(weights, dict) or set(weights) != {"weight", "bias"}:
        raise CheckpointError(f"{file.name} must hold the tensors weight and bias")
    try:
        layer = nn.Linear(width, len(weights["bias"]))
        layer.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{file.name} does not fit hidden states of size {width}: {error}") from None
    return layer.float().eval().requires_grad_(False)
