"""What search models answer besides one dense vector: token vectors of their own kind, sparse weights, or all three."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from cenote.errors import CheckpointError
from cenote.models import checkpoint as checkpoints
from cenote.models import classifiers
from cenote.models.families import bge_m3
from cenote.models.lexical import Splade, TokenWeights
from cenote.models.poolers import Embed, Pooler, Rows, TaskOutput, TokenEmbed
from cenote.tensors.heads import normalize

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.config import ModelConfig
    from cenote.core import PoolingParams
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.probe import HeadProbe
    from cenote.tensors.heads import Step
    from cenote.tensors.packing import Batch


@dataclass(frozen=True)
class DenseLexical:
    """`embed` of a SPLADE model: its sparse embedding with all of its zeros.

    Attributes:
        use_activation: whether vectors are normalised unless a request says otherwise.
    """

    splade: Splade
    use_activation: bool = False

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[B, V]`."""
        rows_BV = torch.stack(list(self.splade.dense(x_TD, batch, members)))
        if self.splade.top_k is not None:
            largest = rows_BV.topk(min(self.splade.top_k, rows_BV.shape[1]))
            rows_BV = torch.zeros_like(rows_BV).scatter(1, largest.indices, largest.values)
        activate = self.use_activation if params.use_activation is None else params.use_activation
        return Rows(normalize(rows_BV) if activate else rows_BV)


@dataclass(frozen=True)
class TokenWeightRows:
    """`token_classify` of bge-m3: the weight of every token but the first and the last, as vLLM gives it."""

    linear: nn.Module

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int], params: PoolingParams) -> Rows:
        """`[sum of T - 2]`."""
        parts = [x_TD[batch.starts[i] + 1 : batch.starts[i + 1] - 1] for i in members]
        return Rows(self.linear(torch.cat(parts).float()).relu().squeeze(-1), [len(part) for part in parts])


def outputs(
    checkpoint: Checkpoint,
    options: ModelConfig,
    full: PreTrainedModel,
    probe: HeadProbe | None,
    pooler: Pooler,
) -> dict[str, TaskOutput]:
    """The outputs that only search models have, or have differently; the one that a model is made for comes first."""
    folder = checkpoint.folder
    if checkpoint.head.kind == "lexical":
        assert probe is not None
        splade = _splade(checkpoint, full, probe)
        return {"sparse": splade, "embed": DenseLexical(splade, bool(options.pooler_config.use_activation))}
    if checkpoint.multi_vector is not None:
        steps = _projection(checkpoint, folder, options, full.device)
        own = options.pooler_config
        normalizes = checkpoint.multi_vector.normalizes if own.use_activation is None else own.use_activation
        late = Pooler(pooler.modes, steps, normalizes, own.dimensions)
        return {"token_embed": TokenEmbed(late, clustering=checkpoint.st.clustering if checkpoint.st else None)}
    if bge_m3.is_one(checkpoint.architecture, folder):
        width = int(checkpoint.config.get_text_config().hidden_size)
        weight, vector = (layer.to(full.device) for layer in bge_m3.heads(folder, width))
        late = Pooler(pooler.modes, (vector,), True, None)
        return {
            "embed": Embed(pooler),
            "sparse": TokenWeights(weight, bge_m3.special_ids(checkpoint.tokenizer)),
            "token_embed": TokenEmbed(late, without_first=True),
            "token_classify": TokenWeightRows(weight),
        }
    return {}


def _splade(checkpoint: Checkpoint, full: PreTrainedModel, probe: HeadProbe) -> Splade:
    """The masked-language-model head, proved against the whole model's logits."""
    settings = (checkpoint.st.splade if checkpoint.st else None) or {}
    strategy, activation = settings.get("pooling_strategy", "max"), settings.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
        raise CheckpointError(f"SpladePooling of {checkpoint.name} is not understood: {settings}")
    head = classifiers.of_tokens(full, probe)
    table = _query_table(checkpoint, probe.width)
    top_k = checkpoint.st.max_active if checkpoint.st else None
    return Splade(
        head.rows, strategy, activation == "log1p_relu", None if table is None else table.to(full.device), top_k
    )


def _query_table(checkpoint: Checkpoint, width: int) -> Tensor | None:
    """Weights of all `width` vocabulary entries by which queries are encoded, if the checkpoint has any."""
    table = checkpoint.st.query_weights if checkpoint.st else None
    if table is None:
        return None
    if table.dim() != 1 or not len(checkpoint.tokenizer.get_vocab()) <= len(table) <= width:
        raise CheckpointError(
            f"the table for queries of {checkpoint.name} has the shape {tuple(table.shape)}, which does not fit a "
            f"vocabulary of {width}"
        )
    return torch.nn.functional.pad(table, (0, width - len(table)))


def _projection(checkpoint: Checkpoint, folder: Path, options: ModelConfig, device: torch.device) -> tuple[Step, ...]:
    """The modules over token vectors, from their folders or from tensors beside the backbone."""
    late, st = checkpoint.multi_vector, checkpoint.st
    assert late is not None
    if late.projection is None:
        steps = st.token_steps if st else ()
        for step in steps:
            if isinstance(step, nn.Module):
                step.to(device)
        return steps
    bias_name = late.projection.removesuffix("weight") + "bias"
    known = checkpoints.tensor_files(folder, allow_pickle=options.allow_pickle)
    names = [late.projection, *([bias_name] if bias_name in known else [])]
    found = checkpoints.tensors(folder, names, allow_pickle=options.allow_pickle)
    weight = found[late.projection].float()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias_name in found)
    layer.load_state_dict({name.rpartition(".")[2]: tensor.float() for name, tensor in found.items()})
    return (layer.to(device).eval().requires_grad_(False),)
