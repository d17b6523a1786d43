"""A loaded checkpoint, able to turn sequences into outputs: forward, pool, head, host.

`PoolingModel.launch` starts a batch; `Pending.finish` waits for it. Between the two, on a GPU, the next batch can
be packed and launched. All tasks of a model share one forward.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cenote.errors import CenoteError, CheckpointError, EngineFailed
from cenote.models import checkpoint as checkpoints
from cenote.models.convert import MODE_OF_TYPE, architecture_pooling
from cenote.models.layout import choose, forward, vocabulary
from cenote.tasks import TASKS
from cenote.tensors import heads, native
from cenote.tensors.packing import pack
from cenote.tensors.pooling import pool
from cenote.types import ModelInfo, Output, Sequence

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.config import ModelConfig
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.layout import Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pooler:
    """How this model's hidden states become vectors.

    Attributes:
        modes: keys of `cenote.tensors.pooling.MODES`.
        steps: the checkpoint's modules after pooling.
        use_activation: whether vectors are normalised unless a request says otherwise.
        dimensions: length to which vectors are cut unless a request says otherwise.
    """

    modes: tuple[str, ...]
    steps: tuple[heads.Step, ...]
    use_activation: bool
    dimensions: int | None


class PoolingModel:
    """Backbone, layout and pooler of one checkpoint. One forward at a time: the device thread's."""

    def __init__(self, info: ModelInfo, layout: Layout, pooler: Pooler) -> None:
        self.info = info
        self.layout = layout
        self.pooler = pooler

    def launch(self, sequences: Seq[Sequence]) -> Pending:
        """Start the forward of `sequences`, which may mix tasks and parameters."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        batch = pack([sequences[i] for i in order], self.layout.backbone.device)
        with torch.inference_mode():
            hidden_TD = forward(self.layout, batch)
            groups: dict[tuple[str, bool, int | None], list[int]] = defaultdict(list)
            for row, i in enumerate(order):
                s = sequences[i]
                activate = self.pooler.use_activation if s.params.use_activation is None else s.params.use_activation
                groups[s.task, activate, s.params.dimensions or self.pooler.dimensions].append(row)
            parts: list[tuple[list[int], list[Tensor]]] = []
            pooled_BD = None
            for (task, activate, dimensions), rows in groups.items():
                if TASKS[task].granularity == "sequence":
                    pooled_BD = pool(hidden_TD, batch, self.pooler.modes) if pooled_BD is None else pooled_BD
                    x_RD, lengths = pooled_BD[rows], [1] * len(rows)
                else:
                    x_RD = torch.cat([hidden_TD[batch.starts[r] : batch.starts[r + 1]] for r in rows])
                    lengths = [batch.lengths[r] for r in rows]
                y_RD = heads.apply(self.pooler.steps, x_RD, dimensions=dimensions, activate=activate)
                values = y_RD.to("cpu", non_blocking=True)
                split = [v[0] if TASKS[task].granularity == "sequence" else v for v in torch.split(values, lengths)]
                parts.append(([order[r] for r in rows], split))
        return Pending(len(sequences), parts, self.layout.backbone.device)


class Pending:
    """A launched batch."""

    def __init__(self, size: int, parts: list[tuple[list[int], list[Tensor]]], device: torch.device) -> None:
        self._size = size
        self._parts = parts
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def ready(self) -> bool:
        """Whether `finish` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def finish(self) -> list[Output | CenoteError]:
        """Wait, and return one output per sequence; a sequence whose values are not finite gets an error instead."""
        if self._event is not None:
            self._event.synchronize()
        outputs: list[Output | CenoteError] = [EngineFailed("no output was computed")] * self._size
        for places, values in self._parts:
            for place, value in zip(places, values, strict=True):
                if bool(torch.isfinite(value).all()):
                    outputs[place] = Output(value.numpy())
                else:
                    outputs[place] = EngineFailed(
                        "the model gave values that are not finite (NaN or infinity) for this input; "
                        "a dtype with more range (bfloat16, float32) may help"
                    )
        return outputs


def load(options: ModelConfig) -> tuple[PoolingModel, Checkpoint]:
    """Read, load, probe and assemble the checkpoint that `options` name.

    Raises:
        CheckpointError: it cannot be honoured, or its values are not finite.
    """
    checkpoint = checkpoints.read(options)
    if checkpoint.conversion == "classify" and options.convert == "classify":
        raise CheckpointError("convert 'classify' is not offered yet; 'embed' serves the hidden states")
    device = checkpoints.resolve_device(options.device)
    stored = getattr(checkpoint.config, "dtype", None)
    dtype, dtype_note = checkpoints.resolve_dtype(options.dtype, stored, device)
    model = checkpoints.load(checkpoint, options, device, dtype)
    length, length_note = checkpoints.resolve_length(checkpoint, model, options.max_model_len)
    kernels = native.load() if options.native_kernels and device.type == "cpu" else None
    native.keep_freed_memory()
    layout, reasons = choose(model, max_length=length, packed=options.packing, kernels=kernels)
    notes = [note for note in (dtype_note, length_note) if note]
    if checkpoint.conversion == "classify":
        notes.append(f"the head of {checkpoint.architecture} is not served yet; embed gives its hidden states, pooled")
    if layout.name != "packed":
        notes.append(f"runs {layout.name}" + (f", because packing failed: {reasons[0]}" if reasons else ", as asked"))
    pooler, dimension = _pooler(checkpoint, model, options)
    for step in pooler.steps:
        if isinstance(step, torch.nn.Module):
            step.to(device)
    info = _info(checkpoint, model, options, layout, pooler, dimension, length, notes)
    pooling_model = PoolingModel(info, layout, pooler)
    _check_first_forward(pooling_model)
    return pooling_model, checkpoint


def _pooler(checkpoint: Checkpoint, model: PreTrainedModel, options: ModelConfig) -> tuple[Pooler, int]:
    """Per field: the user's pooler config, then Sentence-Transformers, then the architecture."""
    asked, st = options.pooler_config, checkpoint.st
    if asked.sequence_pooling:
        modes: tuple[str, ...] = (MODE_OF_TYPE[asked.sequence_pooling],)
    else:
        modes = st.modes if st and st.modes else (architecture_pooling(model),)
    activation = asked.use_activation
    if activation is None:
        activation = st.normalizes if st and st.modes else True
    steps = st.steps if st else ()
    width = int(checkpoint.config.get_text_config().hidden_size) * len(modes)
    if st and st.modes and len(st.modes) != len(modes) and steps:
        raise CheckpointError(
            f"the checkpoint's modules expect its own pooling, {'+'.join(st.modes)}; "
            f"{asked.sequence_pooling} gives vectors of another size"
        )
    dimension = st.dimension if st and st.dimension and steps else width
    return Pooler(modes, steps, activation, asked.dimensions), dimension


def _info(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    options: ModelConfig,
    layout: Layout,
    pooler: Pooler,
    dimension: int,
    length: int,
    notes: list[str],
) -> ModelInfo:
    # Token rows pass the same head as pooled rows, so a head over concatenated modes fits no token.
    tasks = ("embed", "token_embed") if len(pooler.modes) == 1 or not pooler.steps else ("embed",)
    default = options.pooler_config.task or "embed"
    if default not in tasks:
        raise CheckpointError(f"pooler_config.task is {default!r}, but {checkpoint.name} offers {', '.join(tasks)}")
    matryoshka = _matryoshka(checkpoint)
    if pooler.dimensions is not None and (matryoshka is None or pooler.dimensions > dimension):
        raise CheckpointError(
            f"pooler_config.dimensions is {pooler.dimensions}, but {checkpoint.name} does not declare Matryoshka "
            f"embeddings of that size (its vectors have {dimension}); see hf_overrides is_matryoshka"
        )
    return ModelInfo(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        tasks=tasks,
        default_task=default,
        dimension=dimension,
        max_model_len=length,
        vocab_size=vocabulary(model),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        layout=layout.name,
        pooling="+".join(pooler.modes),
        use_activation=pooler.use_activation,
        revision=checkpoint.revision,
        matryoshka=matryoshka,
        warnings=tuple(notes),
    )


def _matryoshka(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    listed = getattr(checkpoint.config, "matryoshka_dimensions", None)
    if listed:
        return tuple(int(d) for d in listed)
    return () if getattr(checkpoint.config, "is_matryoshka", False) else None


def _check_first_forward(model: PoolingModel) -> None:
    """One vector through pooling and head, so that damaged head weights are refused at load and not at midnight."""
    (output,) = model.launch(
        [Sequence([min(1, model.info.vocab_size - 1)] * min(4, model.info.max_model_len))]
    ).finish()
    if isinstance(output, CenoteError):
        raise CheckpointError(f"{model.info.name}: {output.message}")
    if output.data.shape != (model.info.dimension,) and model.pooler.dimensions is None:
        raise CheckpointError(
            f"{model.info.name} gives vectors of {output.data.shape[0]}, but its files say {model.info.dimension}"
        )
