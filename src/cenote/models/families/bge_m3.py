"""bge-m3: one backbone, three outputs. Besides the dense vector, a weight and a vector for each token.

Recognised by its files `sparse_linear.pt` and `colbert_linear.pt`, which are read without running pickled code
(arXiv:2402.03216; FlagEmbedding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from cenote.errors import CheckpointError
from cenote.models import weights
from cenote.models.families.family import Family
from cenote.models.lexical import pruned
from cenote.models.modules import fitted
from cenote.models.poolers import Embed, Pooler, Rows, TokenEmbed

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.core import PoolingParams
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.models.poolers import TaskOutput
    from cenote.tensors.packing import Batch

FILES = ("sparse_linear.pt", "colbert_linear.pt")
ARCHITECTURE = "BgeM3EmbeddingModel"


class BgeM3(Family):
    """A checkpoint with both layers beside its backbone."""

    title: ClassVar[str] = "bge-m3"
    hub_files = FILES

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> BgeM3 | None:
        """Recognise the architecture's name, or the files of both layers."""
        has_layers = all((files.folder / name).is_file() for name in FILES)
        return cls() if has_layers or files.architecture == ARCHITECTURE else None

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return all three embeddings, and the weights of tokens.

        Raises:
            CheckpointError: a file is missing, damaged, or has other tensors.
        """
        pooler = loaded.pooler
        weight, vector = (loaded.placed(_linear(loaded.files.folder / name, loaded.files.width)) for name in FILES)
        if weight.out_features != 1:
            raise CheckpointError(f"{FILES[0]} must give one weight per token, not {weight.out_features}")
        return {
            "embed": Embed(pooler),
            "sparse": TokenWeights(weight, _special_ids(loaded.tokenizer)),
            "token_embed": TokenVectors(Pooler(pooler.modes, (vector,), True, None)),
            "token_classify": TokenWeightRows(weight),
        }

    def score_types(self, tasks: Collection[str]) -> tuple[str, ...]:
        """Return a comparison by each embedding, and by all three."""
        return ("bi-encoder", "hybrid", "late-interaction", "sparse")


@dataclass(frozen=True)
class TokenWeights:
    """`sparse` by a weight for each token of the input; of repeated tokens the largest counts.

    Attributes:
        linear: `[R, D] -> [R, 1]`.
        special: ids that have no weight.
    """

    linear: nn.Module
    special: tuple[int, ...]

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """The ids of a sequence with a weight above 0, by rising id."""
        special = batch.index(self.special)
        weights: list[tuple[Tensor, Tensor | None]] = []
        for i in members:
            rows = slice(batch.starts[i], batch.starts[i + 1])
            ids_N, places_T = torch.unique(batch.ids_T[rows], return_inverse=True)
            weights_T = self.linear(x_TD[rows].float()).relu().squeeze(-1)
            largest_N = weights_T.new_zeros(len(ids_N)).scatter_reduce(0, places_T, weights_T, "amax")
            weights.append((largest_N.masked_fill(torch.isin(ids_N, special), 0.0), ids_N))
        return pruned(weights, params.top_k)


class TokenVectors(TokenEmbed):
    """`token_embed`: one vector per token but the first. Chunks count the first nevertheless."""

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[sum of T - 1, D]`, or one row per chunk."""
        if params.late_chunking_params is not None:
            return super().__call__(x_TD, batch, members, params)
        parts = [x_TD[batch.starts[i] + 1 : batch.starts[i + 1]] for i in members]
        return Rows(self.pooler.finish(torch.cat(parts), params), list(map(len, parts)))


@dataclass(frozen=True)
class TokenWeightRows:
    """`token_classify`: the weight of every token but the first and the last, as vLLM gives it."""

    linear: nn.Module

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[sum of T - 2]`."""
        parts = [x_TD[batch.starts[i] + 1 : batch.starts[i + 1] - 1] for i in members]
        return Rows(self.linear(torch.cat(parts).float()).relu().squeeze(-1), list(map(len, parts)))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return ids of the tokens that carry no weight."""
    ids = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    return tuple(sorted(ids - {None}))


def _linear(file: Path, width: int) -> nn.Module:
    """Return the layer over hidden states of size `width` that `file` holds, float32.

    Raises:
        CheckpointError: it is damaged, or has other tensors.
    """
    tensors = weights.floats(file.name, weights.read(file))
    if set(tensors) != {"weight", "bias"}:
        raise CheckpointError(f"{file.name} has the tensors {sorted(tensors)}, expected weight and bias")
    layer = nn.Linear(width, tensors["bias"].numel(), dtype=torch.float32, device="meta")
    return fitted(layer, tensors, f"{file.name}, for hidden states of {width}")
