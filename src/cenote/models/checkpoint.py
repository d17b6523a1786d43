"""From the files of a checkpoint to a loaded backbone, its tokenizer, its head and its family.

A tensor that is missing or left over inside the backbone is an error.
"""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cenote import tokenizer as tokenizers
from cenote.conventions import MessageTemplate, PairTemplate, Sides, template_text
from cenote.errors import CheckpointError
from cenote.functions import coalesce, optional
from cenote.models import (
    adapted,
    card,
    configs,
    contents,
    hub,
    leftovers,
    lora,
    remote_code,
    renamed,
    sentence_transformers,
    sizes,
    stacked_lora,
    weights,
)
from cenote.models.audit import Audit
from cenote.models.convert import Facts, choose_head, conversion, register_installed, unnamed
from cenote.models.facts import Files
from cenote.models.families import table
from cenote.models.families.sights import needs_pillow
from cenote.models.reading import REMEDY, about, load
from cenote.models.sentence_transformers import SentenceTransformer, pooling_modes
from cenote.models.transformer_module import FEATURES, OF_TOWER, TransformerModule
from cenote.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.core import Similarity
    from cenote.models.convert import Head
    from cenote.models.facts import Location
    from cenote.models.families.family import Family
    from cenote.models.families.sights import Sight


@dataclass(frozen=True)
class Checkpoint(Files):
    """A checkpoint on disk, without weights, and the kind of model that it becomes.

    Attributes:
        tokenizer_source: how `tokenizer` is made once more.
        family: its kind.
        head: the classification head it gets.
        pair_template: how a pair is rendered; `None` = the tokenizer joins the two texts.
        messages: how a text is rendered; `None` = it is not.
        similarity: how its embeddings are compared.
        sight: how it takes pictures; `None` = it has no part for them.
    """

    tokenizer: PreTrainedTokenizerBase
    tokenizer_source: TokenizerSource
    family: Family
    head: Head
    pair_template: PairTemplate | None
    messages: MessageTemplate | None
    similarity: Similarity
    sight: Sight | None = None

    @cached_property
    def sides(self) -> Sides | None:
        """How queries and documents are encoded, if the model does so differently."""
        sides = self.family.sides(self.tokenizer)
        module = self.st.transformer
        named = module.lengths if self.family.keeps_lengths else {}
        if sides is None and not named:
            return None
        sides = coalesce(sides, Sides())
        lengths = {**named, **sides.lengths}
        limit = coalesce(module.max_length, self.tokenizer.model_max_length)
        if self.st.model_type and max(lengths.values(), default=0) > limit:
            lengths[""] = limit  # a side may be longer than other inputs
        return replace(sides, lengths=lengths)


def read(location: Location, options: ModelConfig) -> Files:
    """Read all files but weights and tokenizer.

    Raises:
        CheckpointError: one of them is damaged, or has a setting that cannot be honoured.
    """
    register_installed()
    audit = Audit(options.allow_unread)
    contents.check(location.path, location.listed, location.name)
    st = sentence_transformers.read(location.path, audit, allow_pickle=options.reads_pickles)
    backbone = location.path if st is None else st.backbone
    base = adapted.resolve(location.path, backbone, audit, partial(_locate_base, options))
    if st is None and base.path != location.path:
        st = sentence_transformers.read(base.path, audit, allow_pickle=options.reads_pickles)
    contents.check_config(base.config, location.name)
    contents.check_weights(base.folder, location.name, pickles=options.reads_pickles)
    stored = weights.stored(base.folder, pickles=options.reads_pickles)
    config, notes = configs.read(base.config, location.name, options, audit, stored)
    if st is None:
        st = _bare(base.folder, config)
    sizes.check_counts("sentence_bert_config.json", {"config_kwargs": st.transformer.config_kwargs}, stored)
    config = _override(config, _known(config, st))
    architecture = _architecture(config, st)
    config = _override(config, options.hf_overrides)
    if config.architectures:
        architecture = config.architectures[0]
    adapted.keep_code(config, base)
    if options.convert != "embed":
        architecture = adapted.adapt_config(config, architecture, base.adapters)
    st = _with_instructions(st, config, audit)
    _check_padding(location.name, config)
    if not config.architectures:
        architecture = unnamed(config, stored)
    notes += contents.pickled_note(base.folder, pickles=options.reads_pickles)
    return Files(location, st, config, architecture, stored, audit, notes, base)


def _locate_base(options: ModelConfig, name: str, revision: str | None) -> Path:
    """Return the folder of the model that an adapter names, at the revision that the adapter names."""
    folder, _, _ = hub.locate(name, options.model_copy(update={"revision": revision}))
    return folder


def _bare(folder: Path, config: PretrainedConfig) -> SentenceTransformer:
    """Return the description of a folder without modules, with the pooling of its `config.json`."""
    module = TransformerModule(folder)
    pooler = getattr(config, "emb_pooler", None)
    if pooler is None:
        return SentenceTransformer(module)
    return SentenceTransformer(module, modes=pooling_modes({"pooling_mode": pooler}), normalizes=True)


def _known(config: PretrainedConfig, st: SentenceTransformer) -> dict[str, Any]:
    """Return the changes of a config that Sentence-Transformers files ask for; Transformers ignores unknown names."""
    changes = {name: value for name, value in st.transformer.config_kwargs.items() if hasattr(config, name)}
    return {**changes, "dtype": coalesce(st.transformer.dtype, config.dtype)}


def _architecture(config: PretrainedConfig, st: SentenceTransformer) -> str:
    """Return the architecture of a config, which gets the one that the Transformer's task asks for.

    As in sentence-transformers, a classifier of a config that names none has one label, unless its files say otherwise.
    """
    name = type(config).__name__.removesuffix("Config")
    architecture = (config.architectures or [f"{name}Model"])[0]
    if st.transformer.task == "sequence-classification" and not architecture.endswith("ForSequenceClassification"):
        config.num_labels = st.transformer.config_kwargs.get("num_labels", 1)
        architecture = f"{name}ForSequenceClassification"
        config.architectures = [architecture]
    return architecture


def _with_instructions(st: SentenceTransformer, config: PretrainedConfig, audit: Audit) -> SentenceTransformer:
    """Return `st` with the config's `task_instructions` as prompts, if it has none itself."""
    instructions = getattr(config, "task_instructions", None)
    if any(st.prompts.values()) or not instructions:
        return st
    audit.use("config.json", "task_instructions")
    return replace(st, prompts=st.prompts | {str(task): str(text) for task, text in instructions.items()})


def choose(files: Files, options: ModelConfig) -> Checkpoint:
    """Choose tokenizer, head and family.

    Raises:
        CheckpointError: there is no tokenizer, or the checkpoint cannot become the model that the options ask for.
    """
    st = files.st
    tokenizer, source = _tokenizer(files, options)
    conversion(files.architecture, options.convert, pools=st.pools)
    family = table.recognise(files, options)
    if st.transformer.output == FEATURES and family.embeds_tokens:
        raise CheckpointError(
            f"modality_config names the method {OF_TOWER}, which is not honoured for {files.architecture}; expected "
            "forward"
        )
    contents.audit(files, files.location.listed, family.hub_files, pickles=options.reads_pickles)
    tokenizers.keep_whole(tokenizer, family.markers)
    head = family.head or choose_head(_facts(files, tokenizer, options))
    messages = _message_template(st, files.config, tokenizer) or family.messages(files, tokenizer)
    return Checkpoint(
        **vars(files),
        tokenizer=tokenizer,
        tokenizer_source=replace(source, whole=family.markers),
        family=family,
        head=head,
        pair_template=_pair_template(options, st, head, messages),
        messages=messages,
        similarity=st.similarity(family.compares),
        sight=_sight(files, family, messages),
    )


def _sight(files: Files, family: Family, messages: MessageTemplate | None) -> Sight | None:
    """Return how a checkpoint takes pictures; where a template renders its texts, it renders pictures, too."""
    sight = family.sight(files)
    if sight is None or messages is None:
        return sight and needs_pillow(sight)
    pictures = replace(sight.pictures, template=replace(messages, structured=True))
    return needs_pillow(sight._replace(pictures=pictures))


def _facts(files: Files, tokenizer: PreTrainedTokenizerBase, options: ModelConfig) -> Facts:
    """Return the facts by which a head is chosen."""
    return Facts(
        architecture=files.architecture,
        convert=options.convert,
        config=files.config,
        names=(Path(files.name).name, *_folder_names(files.path), *card.title(files.path)),
        tensors=files.tensors,
        logit_score=files.st.logit_score,
        scored_by_modules=files.st.is_scored_by_modules,
        step=options.pooler_config.token_pooling == "STEP",
        step_columns=options.pooler_config.returned_token_ids or (),
        token_id=tokenizer.get_vocab().get,
        pools=bool(files.st.modes),
        overrides=overridden(options),
        prompts=options.reranker_prompts,
    )


def _tokenizer(files: Files, options: ModelConfig) -> tuple[PreTrainedTokenizerBase, TokenizerSource]:
    """Return the tokenizer, and how it is made once more."""
    name, folder = files.location.name, _tokenizer_folder(files, options)
    template = optional(template_text, options.chat_template)
    module = files.st.transformer
    source = TokenizerSource(
        str(folder.absolute()),
        options.trust_remote_code,
        template,
        kwargs=module.tokenizer_kwargs,
        type_ids=module.type_ids,
    )
    configs.check_tokenizer(folder, options, files.audit)
    contents.check_kinds(folder)
    place = f"the tokenizer of {name} ({_files_of(folder)})"
    with about(place, _remedy(folder)):
        tokenizer = tokenizers.load(source)
        tokenizers.try_out(tokenizer)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # Transformers makes one up without files
        raise CheckpointError(f"cannot read {place}: it has no vocabulary; {REMEDY}")
    return tokenizer, source


def _tokenizer_folder(files: Files, options: ModelConfig) -> Path:
    """Return the folder of the tokenizer: the one that the user names, else the checkpoint's files, else its own."""
    locate = partial(_locate_base, options, revision=None)
    return files.location.tokenizer or optional(locate, files.st.transformer.tokenizer) or files.base.tokenizer


def _files_of(folder: Path) -> str:
    """Return the names of the files of a tokenizer."""
    names = {file.name for pattern in adapted.TOKENIZERS for file in folder.glob(pattern)}
    return ", ".join(sorted(names)) or "no files"


def _remedy(folder: Path) -> str:
    """Return the way to go on with a tokenizer that cannot be read."""
    if importlib.util.find_spec("sentencepiece") is None and any(folder.glob("*.model")):
        return "its vocabulary is a sentencepiece model: pip install sentencepiece protobuf"
    return REMEDY


def _message_template(st: SentenceTransformer, config: PretrainedConfig, tokenizer: Any) -> MessageTemplate | None:
    """Return how texts are rendered by the chat template, if the Sentence-Transformers files say that they are.

    Raises:
        CheckpointError: there is no such template.
    """
    messages = st.transformer.messages
    if messages is None:
        return None
    variables = dict(messages.variables)
    source = variables.pop("chat_template", None)  # the name of one of several, or another one
    if source is None and not tokenizer.chat_template:
        raise CheckpointError(
            "modality_config names message, so texts are to be rendered by the tokenizer's chat template, and there is "
            "none; give one with --chat-template, or remove message from modality_config"
        )
    return MessageTemplate(
        source,
        variables,
        structured=messages.is_structured(config.model_type, tokenizer.chat_template),
        takes_task="task" in _variables(tokenizer.chat_template),
        restores=messages.restores,
    )


def _variables(template: Any) -> frozenset[str]:
    """Return the variables of a chat template, or of all of several by name."""
    from transformers.utils.chat_template_utils import _get_template_variables

    templates = template.values() if isinstance(template, dict) else [template]
    return frozenset[str]().union(*map(_get_template_variables, templates))


def _pair_template(
    options: ModelConfig, st: SentenceTransformer, head: Head, messages: MessageTemplate | None
) -> PairTemplate | None:
    """Return how pairs are rendered: by the user's template, the checkpoint's, or the one of its head."""
    if options.chat_template is not None:
        return PairTemplate(template_text(options.chat_template))
    if st.is_cross_encoder and messages is not None:
        return PairTemplate(
            messages.source,
            messages.kwargs,
            structured=messages.structured,
            add_special_tokens=False,
            system=st.default_prompt,
            cuts_whole=True,
            restores=messages.restores,
        )
    return head.prompt


def _folder_names(path: Path) -> list[str]:
    """Return the names of a folder; in the hub's cache, the repository besides the commit."""
    real = path.resolve()
    if real.parent.name == "snapshots":
        return [real.name, real.parent.parent.name]
    return [real.name]


def locate_adapter(name: str, options: ModelConfig) -> Path:
    """Return the folder of an adapter that the user names, on disk or on the hub.

    Raises:
        CheckpointError: it is not there, or holds no adapter.
    """
    folder = _locate_base(options, name, None)
    if not (folder / lora.CONFIG).is_file():
        raise CheckpointError(f"{name!r} holds no adapter: there is no {lora.CONFIG}")
    return folder


def build(checkpoint: Checkpoint, options: ModelConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the backbone of `checkpoint`, or the model that holds it and its head, in eval mode on `device`.

    Raises:
        CheckpointError: weights are missing, read by nothing, of the wrong shape, or only there as pickles.
    """
    leftovers.check_names(checkpoint.name, checkpoint.tensors)
    model, report = _loaded(checkpoint, options, dtype)
    adapters = checkpoint.base.adapters
    heads = set().union(*map(lora.trained_heads, adapters))
    num_labels = 0 if heads else _labels_of_head(checkpoint, report, options)
    if num_labels:
        checkpoint.config.num_labels = num_labels
        model, report = _loaded(checkpoint, options, dtype)
    kind = checkpoint.head.kind
    if kind == "sequence" and "score.bias" in report["unexpected_keys"]:
        report["unexpected_keys"].remove("score.bias")  # vLLM's conversion writes one; Transformers has none
        bias = weights.tensors(checkpoint.folder, ["score.bias"], pickles=options.reads_pickles)["score.bias"]
        model.score.bias = torch.nn.Parameter(bias.to(model.score.weight.dtype))
    report["unexpected_keys"] = set(report["unexpected_keys"]).difference(stacked_lora.parts(report["unexpected_keys"]))
    _fill_absent(checkpoint, model, report)
    report["missing_keys"] = set(report["missing_keys"]) - heads
    report["mismatched_keys"] = [entry for entry in report["mismatched_keys"] if entry[0] not in heads]
    names = leftovers.Names(model, needs_pooler=kind == "sequence" or checkpoint.st.has_own_pooler)
    leftovers.check_tensors(
        checkpoint, names, report, read=checkpoint.family.tensors, only_embeds=options.convert == "embed"
    )
    leftovers.check_dtypes(checkpoint, names)
    for adapter in adapters:
        lora.merge(model, adapter, checkpoint.audit, spares_head=options.convert == "embed")
    _check_values(checkpoint, model)
    on_device: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return on_device


def _loaded(checkpoint: Checkpoint, options: ModelConfig, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return Transformers' model of `checkpoint`, and its report on tensors that did not fit."""
    import transformers

    place = leftovers.label_of(checkpoint.folder)
    with about(f"{place} of {checkpoint.name} as config.json describes it", content=checkpoint.config.to_dict):
        tensors = renamed.tensors(checkpoint.folder, checkpoint.config, pickles=options.reads_pickles)
        bounded = sizes.Bounded(configs.CONFIG, checkpoint.config.to_dict(), checkpoint.stored)
        with _quiet(), bounded, adapted.without_adapter(checkpoint.folder) as shown:
            kind = _auto_class(checkpoint, transformers)
            if tensors is not None:
                with torch.device("meta"):
                    kind = type(kind.from_config(checkpoint.config))
            model, report = kind.from_pretrained(
                shown if tensors is None else None,
                state_dict=tensors,
                config=checkpoint.config,
                dtype=dtype,
                trust_remote_code=options.trust_remote_code,
                use_safetensors=None if options.reads_pickles else True,
                weights_only=True,
                output_loading_info=True,
                key_mapping=stacked_lora.PLAIN,
                **checkpoint.st.transformer.init_kwargs,
                ignore_mismatched_sizes=True,  # `leftovers` refuses them by name; Transformers' error has no names
            )
    return model, report


def _check_values(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse weights with values that are not finite, but for those that the user lets go unread.

    Raises:
        CheckpointError: there are some.
    """
    label = leftovers.label_of(checkpoint.folder)
    plain = leftovers.Names(model, needs_pooler=True).plain
    files = {plain(name): tensor.file.name for name, tensor in checkpoint.stored.items()}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not checkpoint.audit.allows(label, name):
            weights.check_values(f"{files.get(plain(name), label)} of {checkpoint.name}", {name: weight})


def _fill_absent(checkpoint: Checkpoint, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Set to zero the tensors that the checkpoint's own code does not have, and Transformers' class does."""
    absent = remote_code.absent(checkpoint.config) & set(report["missing_keys"])
    report["missing_keys"] = set(report["missing_keys"]) - absent
    for name in absent:
        torch.nn.init.zeros_(model.get_parameter(name))


def _check_padding(name: str, config: PretrainedConfig) -> None:
    """Refuse a padding token that has no row in the token embedding.

    Raises:
        CheckpointError: `pad_token_id` is not below the size of the vocabulary.
    """
    config = config.get_text_config()
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise CheckpointError(
            f"{name}: pad_token_id in config.json is {pad}, expected an id of the vocabulary, which has "
            f'{size} entries; set it as in hf_overrides {{"pad_token_id": 0}}'
        )


LABEL_KEYS = frozenset({"num_labels", "id2label", "label2id", "_num_labels"})
"""Keys by which a config says how many classes its head has."""


def _labels_of_head(checkpoint: Checkpoint, report: dict[str, Any], options: ModelConfig) -> int:
    """Return the number of classes of the head's tensors, where the config says none and they have another; else 0."""
    if callable(options.hf_overrides) or checkpoint.head.kind not in ("sequence", "token"):
        return 0
    written = {*load(checkpoint.folder / "config.json"), *overridden(options)}
    sizes = {(*stored[:1], *shape[:1]) for _, stored, shape in report["mismatched_keys"]}
    if written & LABEL_KEYS or len(sizes) != 1:
        return 0
    labels, *built = sizes.pop()
    return int(labels) if built == [checkpoint.config.num_labels] else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Run the block without Transformers' progress bars and its report on weights, which is checked here."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


AUTO_CLASSES = {
    "none": "AutoModel",
    "modules": "AutoModel",
    "reward": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "vocabulary": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "tokens": "AutoModelForMaskedLM",
}
"""Kinds of heads to the class that loads a checkpoint with one."""


def _auto_class(checkpoint: Checkpoint, transformers: Any) -> Any:
    """Return the class to load: of encoder-decoder models without a head the encoder alone.

    The config of an encoder that was saved by itself no longer says `is_encoder_decoder`.
    """
    config, kind = checkpoint.config, checkpoint.head.kind
    if checkpoint.family.model_class:
        return getattr(transformers, checkpoint.family.model_class)
    if kind in ("none", "modules"):
        mapping = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        name = mapping.get(config.model_type, "")
        if name.endswith("EncoderModel"):
            return getattr(transformers, name)
    if kind == "vocabulary" and getattr(config, "vision_config", None) is not None:
        return transformers.AutoModelForImageTextToText
    auto_map = getattr(config, "auto_map", None) or {}
    if auto_map and AUTO_CLASSES[kind] not in auto_map:
        raise CheckpointError(
            f"the code of {checkpoint.name} has {', '.join(auto_map)}, and {AUTO_CLASSES[kind]} is needed here; "
            "without --trust-remote-code Transformers' own class is asked for"
        )
    return getattr(transformers, AUTO_CLASSES[kind])


def overridden(options: ModelConfig) -> tuple[str, ...]:
    """Return the keys of the config that the user sets; those that a function sets are not known."""
    return () if callable(options.hf_overrides) else tuple(options.hf_overrides or ())


def _override(config: PretrainedConfig, overrides: Any) -> PretrainedConfig:
    """Apply `hf_overrides`: a function of the config, or a mapping merged into it, nested mappings likewise."""
    if callable(overrides):
        changed: PretrainedConfig = overrides(config)
        return changed
    for key, value in (overrides or {}).items():
        setattr(config, key, _merged(getattr(config, key, None), value))
    return config


def _merged(current: Any, value: Any) -> Any:
    """Return `value`, or if it is a mapping, the mapping or config `current` with its entries."""
    from transformers import PretrainedConfig

    if not isinstance(value, dict):
        return value
    if isinstance(current, PretrainedConfig):
        return _override(current, value)
    return {**current, **value} if isinstance(current, dict) else value
