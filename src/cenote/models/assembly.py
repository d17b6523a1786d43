"""From a checkpoint to a model that runs: read, load, probe, and put together what its files and the user say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cenote.errors import CenoteError, CheckpointError, ConfigError
from cenote.models import checkpoint as checkpoints
from cenote.models import classifiers, retrieval
from cenote.models.convert import MODE_OF_TYPE, architecture_pooling
from cenote.models.families import rewards
from cenote.models.layouts import Packed
from cenote.models.model import PoolingModel
from cenote.models.outputs import (
    Calibration,
    Classify,
    Embed,
    Pooler,
    TokenClassify,
    TokenEmbed,
    activation_of,
)
from cenote.models.passes import narrow
from cenote.models.passes.adapters import find as find_adapters
from cenote.models.passes.subject import Settings, Subject
from cenote.models.passes.table import prepare
from cenote.models.probe import Draw, HeadProbe, choose, fault_of, stable
from cenote.models.traits import vocabulary
from cenote.tensors import linear, native, process
from cenote.types import UNLIMITED, ModelInfo, Sequence, Similarity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.config import Isa, ModelConfig
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.layouts import Layout
    from cenote.models.outputs import TaskOutput
    from cenote.models.probe import Proved

LAUNCH_SECONDS = 2e-5
"""That the host takes for a module without parts: Python around one kernel or two."""
GPU_FLOPS = 4e14
"""Rate of half-precision matrix products that a current GPU reaches in a model."""
MOST_GRAPH_TOKENS = 16384
LARGE_BATCH = 1024
"""Tokens of a batch whose activations stay in the process on a CPU, if no sequence is longer. Ours are smaller."""


def load(options: ModelConfig) -> tuple[PoolingModel, Checkpoint]:
    """Read, load, probe and assemble the checkpoint that `options` name.

    Raises:
        CheckpointError: it cannot be honoured, or its values are not finite.
    """
    checkpoint = checkpoints.read(options)
    device = checkpoints.resolve_device(options.device)
    if options.quantization == "int8" and device.type != "cpu":
        raise ConfigError(
            f"quantization int8 is for CPUs, and the device is {device}; leave it out or set device to cpu"
        )
    isa = _isa(options, device)
    stored = getattr(checkpoint.config, "dtype", None)
    dtype, dtype_note = checkpoints.resolve_dtype(options.dtype, stored, device)
    full = checkpoints.load(checkpoint, options, device, dtype)
    model: PreTrainedModel = full.base_model  # type: ignore[assignment]
    length, length_note = checkpoints.resolve_length(checkpoint, model, options.max_model_len)
    widest = max((x.out_features for x in model.modules() if type(x) is nn.Linear), default=0)
    process.keep_freed_memory(4 * widest * max(length, LARGE_BATCH))
    settings = _settings(checkpoint, model, options, length, isa)
    probe = None if full is model else HeadProbe(full, max_length=length)
    proved = _proved(checkpoint, model, options, settings)
    pooler, dimension = _pooler(checkpoint, model, options)
    for step in pooler.steps:
        if isinstance(step, nn.Module):
            step.to(device)
    outputs = _outputs(checkpoint, options, full, probe, pooler)
    if isinstance(outputs["embed"], retrieval.DenseLexical) and probe is not None:
        dimension = probe.width  # its vector is one weight per vocabulary entry
    subject = Subject(full, proved.layout, proved.reasons, proved.probe, settings)
    prepare(subject, left_out(options))
    layout = subject.layout
    outcomes = subject.outcomes.values()
    notes = [dtype_note, length_note, _layout_note(subject, options), *(n for own in outcomes for n in own.notes)]
    info = _info(checkpoint, model, options, layout, pooler, outputs, dimension, length, [n for n in notes if n])
    linears = [own.text for own in outcomes if own.text]
    info = replace(info, adapters=subject.adapters, linears=linears[-1] if linears else "")
    narrowing = settings.narrowing
    if narrowing is not None and narrowing.dtype is not None:
        info = replace(info, dtype=str(narrowing.dtype).removeprefix("torch."))
    pooling_model = PoolingModel(info, layout, outputs)
    _check_first_forward(pooling_model, pooler)
    if device.type == "cpu":
        _let_run_beside(pooling_model, full)
    process.leave_unused_memory()
    return pooling_model, checkpoint


def _proved(checkpoint: Checkpoint, model: PreTrainedModel, options: ModelConfig, settings: Settings) -> Proved:
    """The layout in which the backbone runs."""
    try:
        return choose(
            model,
            max_length=settings.max_length,
            packed=options.packing,
            kernels=settings.kernels,
            filled_to=_filled_to(checkpoint),
        )
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model raises over plain token ids means that it cannot be fed so
        raise CheckpointError(
            f"{checkpoint.name}: {type(model).__name__} cannot be run over token ids alone, which all tasks build on: "
            f"{type(error).__name__}: {checkpoints.first_line(error)}"
        ) from error


def _settings(checkpoint: Checkpoint, model: PreTrainedModel, options: ModelConfig, length: int, isa: Isa) -> Settings:
    """What the passes may use, and what is asked of them."""
    on_cpu = model.device.type == "cpu"
    kernels = native.load(isa)
    dtype = checkpoints.DTYPES.get(options.dtype, torch.float32)
    narrowing = None
    if on_cpu:
        narrowing = narrow.choose(
            int8=options.quantization == "int8",
            dtype=None if dtype is torch.float32 else dtype,
            isa=isa,
        )
    folders = [checkpoint.path, checkpoint.st.backbone] if checkpoint.st else [checkpoint.path]
    return Settings(
        max_length=length,
        kernels=kernels,
        products=narrow.products(kernels, narrowing),
        graph_tokens=graph_tokens(model, options, model.device),
        adapters=find_adapters(folders),
        narrowing=narrowing,
    )


def _isa(options: ModelConfig, device: torch.device) -> Isa:
    """Instructions that the CPU kernels may use.

    Raises:
        ConfigError: kernels with the instructions named cannot be had.
    """
    if device.type != "cpu" or not options.native_kernels:
        return "none"
    linear.require(options.isa)
    return options.isa


def left_out(options: ModelConfig) -> frozenset[str]:
    """Names of the passes that the options leave out."""
    return frozenset() if options.prefix_sharing else frozenset({"prefixes"})


def _layout_note(subject: Subject, options: ModelConfig) -> str:
    """What a user may want to know of the layout, or an empty string."""
    layout = subject.layout
    if not isinstance(layout, Packed):
        why = f", because packing failed: {subject.reasons[0]}" if subject.reasons else ", as asked"
        return f"runs {layout.name}{why}"
    if layout.backbone.device.type == "cuda" and not layout.is_fused:
        return "attention runs length by length, because no fused kernel does this model's"
    return ""


def _outputs(
    checkpoint: Checkpoint,
    options: ModelConfig,
    full: PreTrainedModel,
    probe: HeadProbe | None,
    pooler: Pooler,
) -> dict[str, TaskOutput]:
    """The outputs of all tasks that the checkpoint is for; the one that it is made for comes first."""
    outputs: dict[str, TaskOutput] = {"embed": Embed(pooler)}
    # Token rows pass the same head as pooled rows, so a head over concatenated modes fits no token.
    if len(pooler.modes) == 1 or not pooler.steps:
        outputs["token_embed"] = TokenEmbed(pooler)
    special = retrieval.outputs(checkpoint, options, full, probe, pooler)
    outputs = {**special, **{task: own for task, own in outputs.items() if task not in special}}
    classifier = _classifier(checkpoint, options, full, probe)
    if classifier is not None:
        outputs = {**_class_outputs(checkpoint, options, classifier), **outputs}
    else:
        _refuse_calibration(checkpoint, options)
        if options.pooler_config.token_pooling != "STEP":
            _refuse_step_options(checkpoint, options)
    if options.pooler_config.token_pooling == "STEP" and "token_classify" not in outputs:
        raise CheckpointError(f"pooling type STEP rates steps, but {checkpoint.name} has no head to rate them")
    return outputs


def graph_tokens(model: nn.Module, options: ModelConfig, device: torch.device) -> int:
    """Tokens up to which forwards are replayed on a GPU: by default those that take longer to launch than to run."""
    if device.type != "cuda" or options.enforce_eager:
        return 0
    if options.max_cudagraph_capture_size is not None:
        return options.max_cudagraph_capture_size
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    multiplied = sum(p.numel() for m in leaves if not isinstance(m, nn.Embedding) for p in m.parameters())
    return min(int(len(leaves) * LAUNCH_SECONDS * GPU_FLOPS / (2 * multiplied)), MOST_GRAPH_TOKENS)


def _filled_to(checkpoint: Checkpoint) -> int:
    """Length to which queries are filled up with hidden tokens; 0 = they are not."""
    fill = checkpoint.multi_vector.expansion if checkpoint.multi_vector else None
    return fill.length if fill and not fill.attend else 0


def _classifier(
    checkpoint: Checkpoint, options: ModelConfig, full: PreTrainedModel, probe: HeadProbe | None
) -> classifiers.Classifier | None:
    """The classification head that was chosen for `checkpoint`, proved where Transformers has a class for it."""
    head = checkpoint.head
    if head.kind in ("none", "lexical"):
        return None
    if head.kind == "reward":
        folder = checkpoint.st.backbone if checkpoint.st else checkpoint.path
        names = list(checkpoints.tensor_files(folder, allow_pickle=options.allow_pickle))
        found = rewards.find(names)
        assert found is not None
        row, places = found
        weights = checkpoints.tensors(folder, places.values(), allow_pickle=options.allow_pickle)
        module = row.build({key: weights[name] for key, name in places.items()}).to(full.device)
        width = int(checkpoint.config.get_text_config().hidden_size)
        with torch.inference_mode():
            num_labels = module(torch.zeros(1, width, device=full.device)).shape[-1]
        return classifiers.of_modules(module, num_labels)
    assert probe is not None
    if head.kind == "vocabulary":
        columns = head.columns or None
        return classifiers.of_vocabulary(full, probe, columns, difference=head.difference)
    return (classifiers.of_tokens if head.kind == "token" else classifiers.of_sequences)(full, probe)


def _class_outputs(
    checkpoint: Checkpoint, options: ModelConfig, classifier: classifiers.Classifier
) -> dict[str, TaskOutput]:
    """`classify` and `token_classify`, as far as the head can do them; the one that it is made for comes first."""
    head, asked = checkpoint.head, options.pooler_config
    tag, step = _step(checkpoint, options)
    returned = asked.returned_token_ids
    num_labels = len(returned) if step and returned else classifier.num_labels
    activate = asked.use_activation
    if activate is None:  # a reward is a number, not a probability; a step is rated by the softmax over its classes
        activate = head.kind != "reward" or step
    calibration = Calibration(
        activation_of(checkpoint, num_labels),
        activate,
        asked.logit_mean or 0.0,
        head.sigma if asked.logit_sigma is None else asked.logit_sigma,
    )
    modes = (MODE_OF_TYPE[asked.sequence_pooling],) if asked.sequence_pooling and classifier.per_token else ()
    columns = head.columns or range(classifier.num_labels)
    if unknown := [i for i in returned or () if i not in columns]:
        raise CheckpointError(
            f"pooler_config.returned_token_ids: {unknown[0]} is no column of {checkpoint.name}'s head"
        )
    outputs: dict[str, TaskOutput] = {}
    if classifier.whole is not None and not (step and head.kind == "vocabulary"):
        outputs["classify"] = Classify(classifier, calibration, modes)
    if classifier.per_token and (head.kind != "vocabulary" or step):
        outputs["token_classify"] = TokenClassify(classifier, calibration, columns, step, tag, returned)
    is_for_tokens = step or (head.kind == "reward" and checkpoint.architecture not in rewards.OF_LAST_TOKEN)
    return dict(reversed(outputs.items())) if is_for_tokens else outputs


def _step(checkpoint: Checkpoint, options: ModelConfig) -> tuple[int | None, bool]:
    """The step tag and whether `token_classify` gives one row per step."""
    asked = options.pooler_config
    own_tag = rewards.STEP_TAGS.get(checkpoint.architecture)
    step = asked.token_pooling == "STEP" or (own_tag is not None and asked.token_pooling is None)
    if not step:
        _refuse_step_options(checkpoint, options)
        return None, False
    tag = asked.step_tag_id
    if tag is None and own_tag is not None:
        tag = checkpoint.tokenizer.get_vocab().get(own_tag)
    if tag is None and own_tag is not None:
        raise CheckpointError(f"{checkpoint.name}: the vocabulary has no {own_tag!r}; set pooler_config.step_tag_id")
    return tag, True


def _refuse_calibration(checkpoint: Checkpoint, options: ModelConfig) -> None:
    for name in ("logit_mean", "logit_sigma"):
        if getattr(options.pooler_config, name) is not None:
            raise CheckpointError(
                f"pooler_config.{name} calibrates the logits of a classification head, which {checkpoint.name} has not"
                "; leave it out, or see convert: classify"
            )


def _refuse_step_options(checkpoint: Checkpoint, options: ModelConfig) -> None:
    for name in ("step_tag_id", "returned_token_ids"):
        if getattr(options.pooler_config, name) is not None:
            raise CheckpointError(
                f"pooler_config.{name} is for pooling type STEP, which {checkpoint.name} does not use"
            )


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
    outputs: Mapping[str, TaskOutput],
    dimension: int,
    length: int,
    notes: list[str],
) -> ModelInfo:
    tasks = tuple(outputs)
    default = options.pooler_config.task or tasks[0]
    classes = _class_info(checkpoint, outputs, options.pooler_config.use_activation)
    if options.task == "reward":
        default = str(classes.get("reward") or "reward")
    if default not in tasks:
        raise CheckpointError(f"the task asked for is {default!r}, but {checkpoint.name} offers {', '.join(tasks)}")
    matryoshka = _matryoshka(checkpoint)
    if pooler.dimensions is not None and (matryoshka is None or pooler.dimensions > dimension):
        raise CheckpointError(
            f"pooler_config.dimensions is {pooler.dimensions}, but {checkpoint.name} does not declare Matryoshka "
            f"embeddings of that size (its vectors have {dimension}); see hf_overrides is_matryoshka"
        )
    info = ModelInfo(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        tasks=tasks,
        default_task=default,
        dimension=dimension,
        max_model_len=length,
        max_embed_len=_embed_length(checkpoint, options, length),
        vocab_size=vocabulary(model),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        layout=layout.name,
        shares_prefixes=layout.shares_prefixes,
        pooling="+".join(pooler.modes),
        use_activation=pooler.use_activation,
        revision=checkpoint.revision,
        matryoshka=matryoshka,
        similarity=checkpoint.st.similarity if checkpoint.st else Similarity(),
        warnings=tuple(notes),
    )
    if isinstance(dense := outputs["embed"], retrieval.DenseLexical):
        info = replace(info, pooling=dense.splade.strategy, use_activation=dense.use_activation)
    return replace(info, **classes)


def _embed_length(checkpoint: Checkpoint, options: ModelConfig, length: int) -> int:
    """Most tokens of an input of `embed`; 0 = `length`, which the model reads at once."""
    most = options.pooler_config.max_embed_len
    if options.pooler_config.enable_chunked_processing:
        return most or UNLIMITED
    if most is not None and most > length:
        raise CheckpointError(
            f"pooler_config.max_embed_len is {most}, but {checkpoint.name} reads at most {length} tokens at once; "
            "set enable_chunked_processing to run longer inputs in blocks"
        )
    return most or 0


def _class_info(checkpoint: Checkpoint, outputs: Mapping[str, TaskOutput], activates: bool | None) -> dict[str, Any]:
    """What `ModelInfo` says of the classification head and of scoring; `activates` is the user's wish."""
    vectors = _score_types(checkpoint, outputs)
    found = outputs.get("classify") or outputs.get("token_classify")
    if not isinstance(found, (Classify, TokenClassify)):
        return {"score_types": vectors, "head": checkpoint.head.name}
    num_labels, head = found.classifier.num_labels, checkpoint.head
    rates = "classify" in outputs and num_labels == 1
    of_tokens = outputs.get("token_classify")
    columns = of_tokens.columns if isinstance(of_tokens, TokenClassify) and of_tokens.step else ()
    step = len(columns) > 0
    named = getattr(checkpoint.config, "id2label", None) or {}
    is_named = head.kind in ("sequence", "token") and len(named) == num_labels
    return {
        "num_labels": num_labels,
        "labels": tuple(str(named[i]) for i in range(num_labels)) if is_named else (),
        "activation": found.calibration.activation,
        "classifies": found.calibration.use_activation,
        "score_types": ("cross-encoder", *vectors) if rates else (),
        "reward": next(iter(outputs)) if head.kind == "reward" or step else "classify" if rates else "",
        "activates_reward": step if activates is None else activates,
        "step": step,
        "columns": columns,
        "head": head.name,
    }


def _score_types(checkpoint: Checkpoint, outputs: Mapping[str, TaskOutput]) -> tuple[str, ...]:
    """Ways to compare a query with a document by what each gives alone, the one that the model is made for first."""
    if checkpoint.head.kind == "lexical":
        return ("sparse", "late-interaction")
    if checkpoint.multi_vector is not None:
        return ("late-interaction", "bi-encoder")
    if "sparse" in outputs:
        return ("bi-encoder", "hybrid", "late-interaction", "sparse")
    return ("bi-encoder", "late-interaction") if "token_embed" in outputs else ("bi-encoder",)


def _matryoshka(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    listed = getattr(checkpoint.config, "matryoshka_dimensions", None)
    if listed:
        return tuple(int(d) for d in listed)
    declared = getattr(checkpoint.config, "is_matryoshka", None)
    if declared is None:  # Sentence-Transformers tags the card of a model with the losses that it was trained with
        declared = any("matryoshka" in tag.lower() for tag in checkpoints.card_tags(checkpoint.path))
    return () if declared else None


def _let_run_beside(model: PoolingModel, full: PreTrainedModel) -> None:
    """Let several threads launch `model` at a time, or say why they cannot."""
    why_not = _fault_beside(model, full)
    model.is_reentrant = not why_not
    if why_not:
        note = f"runs one batch at a time, because {why_not}"
        model.info = replace(model.info, warnings=(*model.info.warnings, note))


def _fault_beside(model: PoolingModel, full: PreTrainedModel) -> str:
    """Why several threads cannot launch `model` at a time, or an empty string."""
    if model.layout.backbone.rope_class is not None:
        return "its rotary frequencies are those of the longest sequence"
    draw = Draw(full)
    texts = [draw.text(min(n, model.info.max_model_len)) for n in (9, 4)]

    def run(ids: Seq[int]) -> list[Tensor]:
        sequences = [Sequence(ids, task=task) for task in model.outputs]
        return [part.values for part in model.launch(sequences).parts]

    return fault_of(lambda: stable(full, [partial(run, ids) for ids in texts]))


def _check_first_forward(model: PoolingModel, pooler: Pooler) -> None:
    """One vector through pooling and head, so that damaged head weights are refused at load and not at midnight."""
    ids = Draw(model.layout.backbone.model).text(min(4, model.info.max_model_len))
    output, *adapted = model.launch([Sequence(ids, adapter=name) for name in (None, *model.info.adapters)]).finish()
    if isinstance(output, CenoteError):
        raise CheckpointError(f"{model.info.name}: {output.message}")
    for name, own in zip(model.info.adapters, adapted, strict=True):
        if isinstance(own, CenoteError):
            raise CheckpointError(f"{model.info.name} with the adapter {name}: {own.message}")
    if output.data.shape != (model.info.dimension,) and pooler.dimensions is None:
        raise CheckpointError(
            f"{model.info.name} gives vectors of {output.data.shape[0]}, but its files say {model.info.dimension}"
        )
