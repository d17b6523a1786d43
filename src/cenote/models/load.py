"""From options to a model that runs, in seven steps.

1. *Find* the files, in a folder or on the hub.
2. *Read* them, but for weights and tokenizer.
3. *Choose* tokenizer, head and family.
4. *Build* Transformers' model with its weights.
5. *Prove* which layout is exact, and that heads can be run over its rows.
6. *Prepare* it: the passes, each of which is proved in that layout. They come last, because they change the model by
   which the layout and the heads were proved, and because most of them change how that layout runs.
7. *Report* its properties and the way it runs, and try it out: its first forward, and several at a time.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

from cenote.core import Report, Sequence
from cenote.errors import CenoteError, CheckpointError, ConfigError, first_line
from cenote.functions import coalesce
from cenote.models import building, hub, offers, resolve, stacked_lora, weights
from cenote.models import checkpoint as checkpoints
from cenote.models.convert import with_defaults
from cenote.models.families.sights import refused
from cenote.models.information import describe
from cenote.models.layouts import Packed
from cenote.models.model import PoolingModel
from cenote.models.model_outputs import prove_pooler, read_layer, take_through
from cenote.models.passes import adapters, narrow, table
from cenote.models.passes.graphs import worthwhile_tokens
from cenote.models.passes.subject import Narrowing, Outcome, Settings, Subject
from cenote.models.probe import Draw, HeadProbe, choose, fault_of, line_of, pictured, stable
from cenote.models.reading import about
from cenote.models.traits import of_kind, token_types, tokens_beyond, vocabulary
from cenote.tensors import linear, native, process

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.config import Isa, ModelConfig
    from cenote.core import ModelInfo
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.lora import Adapter
    from cenote.models.offers import Offer
    from cenote.models.probe import Probe
    from cenote.models.vision import Vision

log = logging.getLogger(__name__)

LARGE_MODEL = 16 << 20
"""Bytes of weights of which loading leaves behind so much memory that it is worth giving back."""
LARGE_BATCH = 1024
"""Tokens of a batch whose activations stay in the process on a CPU, if no sequence is longer. Ours are smaller."""


def load(options: ModelConfig) -> tuple[PoolingModel, Checkpoint]:
    """Load the checkpoint that `options` name.

    Raises:
        CheckpointError: it cannot be honoured, or its values are not finite.
        ConfigError: options contradict each other.
    """
    with about(options.model or hub.EMBEDDED_NAME):
        location = hub.find(options)
        files = checkpoints.read(location, options)
        options = with_defaults(options, files.config)
        checkpoint = checkpoints.choose(files, options)
        built = build(checkpoint, options)
    with ExitStack() as stack:
        with about(checkpoint.name):
            unstacked = stack.enter_context(stacked_lora.unstacked(checkpoint, pickles=options.reads_pickles))
            subject, offer = prove(checkpoint, built, options, unstacked)
        prepare(subject, options)
    return report(checkpoint, built, subject, offer, options)


@dataclass(frozen=True)
class Built:
    """Transformers' model of a checkpoint.

    Attributes:
        full: the model with its head, if Transformers has one for it; else the backbone.
        length: maximum tokens of an input.
        isa: instructions that CPU kernels may use for it.
        notes: warnings.
    """

    full: PreTrainedModel
    length: int
    isa: Isa
    notes: tuple[str, ...]


def build(checkpoint: Checkpoint, options: ModelConfig) -> Built:
    """Build Transformers' model, with its weights, on its device."""
    device = resolve.device(options.device)
    if options.quantization != "none" and device.type != "cpu":
        raise ConfigError(
            f"quantization {options.quantization} is for CPUs, and the device is {device}; leave it out or set device "
            "to cpu"
        )
    isa = _isa(options, device)
    stored = coalesce(getattr(checkpoint.config, "dtype", None), weights.dtype_of(checkpoint.stored))
    dtype, dtype_note = resolve.dtype(options.dtype, stored, device)
    full = building.build(checkpoint, options, device, dtype)
    checkpoint.family.prepare(full)
    model = checkpoint.family.backbone(full)
    _choose_output(checkpoint, model)
    length, length_note = resolve.max_length(checkpoint, model, options.max_model_len)
    widest = max((linear.out_features for linear in of_kind(model, nn.Linear)), default=0)
    process.keep_freed_memory(4 * widest * max(length, LARGE_BATCH))
    return Built(full, length, isa, (*checkpoint.notes, dtype_note, length_note))


def _choose_output(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Make the model give the output that its Sentence-Transformers files name."""
    layer = checkpoint.st.transformer.layer
    if layer is not None:
        read_layer(model, layer)
    if checkpoint.st.has_own_pooler:
        prove_pooler(model)
    if checkpoint.st.over_tokens:
        take_through(model, checkpoint.st.over_tokens)


def prove(
    checkpoint: Checkpoint, built: Built, options: ModelConfig, unstacked: Path | None = None
) -> tuple[Subject, Offer]:
    """Prove a layout of the backbone, and heads over its rows.

    Args:
        checkpoint: as it was read.
        built: its model.
        options: the user's.
        unstacked: folder of adapters that were taken out of the model's tensors.
    """
    full, family = built.full, checkpoint.family
    model = family.backbone(full)
    settings = settings_of(checkpoint, built, options, unstacked)
    probe = None
    vision, pictures = _pictures(checkpoint, full)
    try:
        if full is not full.base_model and not family.model_class:
            probe = HeadProbe(full, max_length=built.length)
        proved = choose(
            model,
            max_length=built.length,
            packed=options.packing,
            kernels=settings.kernels,
            filled_to=family.filled_to,
            vision=vision,
            pictures=pictures,
            finish=family.finish(full),
        )
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model raises over plain token ids means that it cannot be fed so
        raise CheckpointError(
            f"{checkpoint.name}: {type(model).__name__} cannot be run over token ids alone, which all tasks build on: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    subject = Subject(full, proved.layout, proved.reasons, proved.probe, settings, pictures)
    return subject, offers.offer(checkpoint, options, full, probe)


def _pictures(checkpoint: Checkpoint, full: PreTrainedModel) -> tuple[Vision | None, Probe | None]:
    """Return how a model takes pictures, and the probe with some; neither if it cannot be run with any."""
    sight = checkpoint.sight
    if sight is None or sight.vision is None:
        return None, None
    vision = sight.vision(full, sight.pictures)
    try:
        return vision, pictured(vision, checkpoint.family.backbone(full))
    except Exception as error:  # as a model may raise anything; its texts are served all the same
        log.warning("%s takes no pictures: %s", checkpoint.name, line_of(error))
        return None, None


def settings_of(checkpoint: Checkpoint, built: Built, options: ModelConfig, unstacked: Path | None = None) -> Settings:
    """Return the settings of the passes."""
    kernels, narrowing = native.load(built.isa), _narrowing(built, options)
    return Settings(
        max_length=built.length,
        kernels=None if options.plain else kernels,
        products=narrow.products(kernels, narrowing, steady=options.batch_invariant),
        fused=narrow.NEEDS if options.plain else None,
        graph_tokens=_graph_tokens(built, options),
        adapters=_adapters(checkpoint, options, unstacked),
        reserves_adapters=options.enable_lora,
        audit=checkpoint.audit,
        narrowing=narrowing,
        invariant=options.batch_invariant,
    )


def _adapters(checkpoint: Checkpoint, options: ModelConfig, unstacked: Path | None) -> dict[str, Adapter]:
    """Return the adapters that requests may choose, by name."""
    modules = {module.name: checkpoints.locate_adapter(module.path, options) for module in options.lora_modules}
    folders = [*filter(None, (checkpoint.path, checkpoint.folder, unstacked))]
    return adapters.chosen(folders, modules, checkpoint.audit, checkpoint.base.adapters)


def _narrowing(built: Built, options: ModelConfig) -> Narrowing:
    """Return how weights are narrowed, if they are."""
    if built.full.device.type != "cpu":
        return Narrowing()
    dtype = resolve.DTYPES.get(options.dtype, torch.float32)
    return narrow.choose(
        quantization=options.quantization,
        dtype=None if dtype is torch.float32 else dtype,
        isa=built.isa,
    )


def _graph_tokens(built: Built, options: ModelConfig) -> int:
    """Return the number of tokens up to which forwards are replayed; 0 = none are."""
    if built.full.device.type != "cuda" or not options.cuda_graphs or options.enforce_eager:
        return 0
    return coalesce(options.max_cudagraph_capture_size, worthwhile_tokens(built.full.base_model))


def _isa(options: ModelConfig, device: torch.device) -> Isa:
    """Return the instructions that the CPU kernels may use.

    Raises:
        ConfigError: kernels with the instructions named are not available.
    """
    if device.type != "cpu" or not options.native_kernels:
        return "none"
    linear.require(options.isa)
    return options.isa


def prepare(subject: Subject, options: ModelConfig) -> None:
    """Take the model through the passes, but for those that the options leave out."""
    leave_out = set(table.ONLY_FASTER if options.plain else ())
    if not options.prefix_sharing:
        leave_out.add("prefixes")
    if options.batch_invariant:
        leave_out.update(
            ("last_layer", "graphs")
        )  # the one depends on the other outputs, the other on the batch's size
    if subject.settings.narrowing.kernel is not None:
        leave_out.discard("fuse")  # narrow weights take the places of packed ones
    table.prepare(subject, leave_out)


def report(
    checkpoint: Checkpoint, built: Built, subject: Subject, offer: Offer, options: ModelConfig
) -> tuple[PoolingModel, Checkpoint]:
    """Return the model with the report of how it runs, after a trial, and its checkpoint as it is served.

    Raises:
        CheckpointError: see `_check_first_forward`.
    """
    checkpoint = _seeing(checkpoint, subject)
    info = _described(checkpoint, built, subject, offer, options)
    model = PoolingModel(info, subject.layout, offer.outputs, subject.shelf, invariant=options.batch_invariant)
    _try_out(model, subject, offer)
    _keep_pictures(subject, options)
    if sum(weight.nbytes for weight in subject.full.parameters()) > LARGE_MODEL:
        process.leave_unused_memory()
    return model, checkpoint


def _seeing(checkpoint: Checkpoint, subject: Subject) -> Checkpoint:
    """Return the checkpoint, which refuses pictures if its model could not be run with any."""
    sight = checkpoint.sight
    if sight is None or sight.vision is None or subject.pictures is not None:
        return checkpoint
    reason = f"{type(subject.full).__name__} could not be run with pictures at start, as its log says"
    return replace(checkpoint, sight=refused(reason))


def _described(checkpoint: Checkpoint, built: Built, subject: Subject, offer: Offer, options: ModelConfig) -> ModelInfo:
    """Return the description of the model to serve, with a report of how it runs."""
    backbone, vision = subject.backbone, subject.layout.backbone.vision
    notes = [*built.notes, _layout_note(subject), _tokenizer_note(checkpoint, vocabulary(backbone))]
    if checkpoint.sight is None and options.mm_processor_kwargs:
        notes.append("mm_processor_kwargs have no effect, as the model takes no pictures")
    notes += chain.from_iterable(outcome.notes for outcome in subject.outcomes.values())
    return describe(
        checkpoint,
        offer,
        options,
        built.length,
        _running(subject, offer, notes),
        vocab_size=vocabulary(backbone),
        type_vocab_size=token_types(backbone),
        adapters=subject.shelf.names if subject.shelf else (),
        patch_cost=vision.cost() if vision else 0.0,
    )


def _running(subject: Subject, offer: Offer, notes: Iterable[str]) -> Report:
    """Return how a model runs, with warnings, of which some may be empty."""
    layout, outcomes = subject.layout, subject.outcomes
    linears = [outcomes.get(name, Outcome()).text for name in ("narrow", "fuse")]
    return Report(
        model_class=type(subject.full).__name__,
        dtype=str(_dtype_of(subject)).removeprefix("torch."),
        device=str(layout.backbone.device),
        layout=layout.name,
        linears=next(filter(None, linears), ""),
        shares_prefixes=layout.shares_prefixes,
        company=outcomes.get("company", Outcome()).text,
        token_dimension=offer.token_dimension,
        warnings=tuple(filter(None, notes)),
    )


def _try_out(model: PoolingModel, subject: Subject, offer: Offer) -> None:
    """Run a model once, and on a CPU in several threads, to see whether they may launch it at a time.

    Raises:
        CheckpointError: see `_check_first_forward`.
    """
    _check_first_forward(model, offer)
    if model.layout.backbone.device.type != "cpu":
        return
    why_not = _fault_beside(model, subject)
    model.is_reentrant = not why_not
    if why_not:
        model.warn(f"runs one batch at a time, because {why_not}")


def _keep_pictures(subject: Subject, options: ModelConfig) -> None:
    """Keep the features of pictures, as many as the options say, unless adapters may change the tower."""
    vision = subject.layout.backbone.vision
    if vision is not None and subject.shelf is None:
        vision.kept.capacity = options.picture_cache_size << 20


def _dtype_of(subject: Subject) -> torch.dtype:
    """Return the dtype of the weights, as they are kept."""
    return subject.settings.narrowing.dtype or subject.backbone.dtype


def _tokenizer_note(checkpoint: Checkpoint, rows: int) -> str:
    """Return a warning of tokens without a row in the token embedding, or an empty string."""
    beyond = tokens_beyond(checkpoint.tokenizer, rows)
    if not beyond:
        return ""
    return (
        f"the tokenizer knows {len(beyond)} tokens more than the {rows} rows of the token embedding, the first is "
        f"{beyond[0]!r}; inputs that contain one are refused"
    )


def _layout_note(subject: Subject) -> str:
    """Return a warning of a slow layout, or an empty string."""
    layout = subject.layout
    if not isinstance(layout, Packed):
        why = f", because packing failed: {subject.reasons[0]}" if subject.reasons else ", as asked"
        return f"runs {layout.name}{why}"
    if layout.backbone.device.type == "cuda" and not layout.is_fused:
        return "attention runs length by length, because no fused kernel does this model's"
    return ""


def _check_first_forward(model: PoolingModel, offer: Offer) -> None:
    """Run one vector through pooling and head, so that damaged head weights are refused at load.

    Raises:
        CheckpointError: its values are not finite, or its length is another than the files say.
    """
    info = model.info
    ids = Draw(model.layout.backbone.model).text(min(4, info.max_model_len))
    sequences = [Sequence(ids, adapter=adapter) for adapter in (None, *info.adapters)]
    for sequence, output in zip(sequences, model.launch(sequences).finish(), strict=True):
        name = f"{info.name} with the adapter {sequence.adapter}" if sequence.adapter else info.name
        if isinstance(output, CenoteError):
            raise CheckpointError(f"{name}: {output.message}")
        if output.data.shape != (info.dimension,) and offer.pooler.dimensions is None:
            raise CheckpointError(f"{name} gives vectors of {output.data.shape[0]}, but its files say {info.dimension}")


def _fault_beside(model: PoolingModel, subject: Subject) -> str:
    """Return why several threads cannot launch `model` at a time, or an empty string."""
    if model.layout.backbone.rope_class is not None:
        return "its rotary frequencies are those of the longest sequence"
    draw = Draw(subject.backbone)
    texts = [draw.text(min(n, model.info.max_model_len)) for n in (9, 4)]

    inputs = [Sequence(ids) for ids in texts]
    if subject.pictures is not None:
        inputs += [sequence for sequence in subject.pictures.sequences if sequence.media][:2]

    def run(sequence: Sequence) -> list[Tensor]:
        sequences = [replace(sequence, task=task) for task in model.outputs]
        return [part.values for part in model.launch(sequences).parts]

    return fault_of(lambda: stable(subject.full, [partial(run, sequence) for sequence in inputs]))
