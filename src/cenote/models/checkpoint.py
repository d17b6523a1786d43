"""From the files of a checkpoint to its config, its tokenizer, its head and its family."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    lora,
    overrides,
    sentence_transformers,
    sizes,
    weights,
)
from cenote.models.audit import Audit
from cenote.models.convert import Facts, check_convert, choose_head, register_installed, unnamed
from cenote.models.facts import Files
from cenote.models.families import table
from cenote.models.families.sights import needs_pillow
from cenote.models.reading import REMEDY, about
from cenote.models.sentence_transformers import SentenceTransformer, pooling_modes
from cenote.models.transformer_module import FEATURES, OF_TOWER, TransformerModule
from cenote.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.core import Similarity
    from cenote.models.adapted import Base
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
    config = _changed(config, st, base, options)
    st = _with_instructions(st, config, audit)
    _check_padding(location.name, config)
    architecture = config.architectures[0] if config.architectures else unnamed(config, stored)
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


def _changed(config: PretrainedConfig, st: SentenceTransformer, base: Base, options: ModelConfig) -> PretrainedConfig:
    """Return the config with the changes of Sentence-Transformers files, the user's function and adapters, in turn.

    What the user sets by a mapping is in `config`, and stays.
    """
    changes = overrides.mapping(options)
    config = _change(config, _known(config, st, changes))
    if st.transformer.task == "sequence-classification":
        _make_classifier(config, st, changes)
    config = overrides.by_function(config, options)
    adapted.keep_code(config, base)
    if options.convert != "embed":
        adapted.adapt_config(config, base.adapters)
    return config


def _known(config: PretrainedConfig, st: SentenceTransformer, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes of a config that Sentence-Transformers files ask for; Transformers ignores unknown names.

    Args:
        config: to be changed.
        st: the files.
        changes: those of the user, which win.
    """
    entries = {name: value for name, value in st.transformer.config_kwargs.items() if hasattr(config, name)}
    entries["dtype"] = coalesce(st.transformer.dtype, config.dtype)
    winning = overrides.merged(entries, changes)
    return {name: winning[name] for name in entries if name in winning}


def _make_classifier(config: PretrainedConfig, st: SentenceTransformer, changes: dict[str, Any]) -> None:
    """Give a config whose architecture is no classifier of sequences the one of its kind.

    As in sentence-transformers, it has one label then, unless the files or the user's `changes` say otherwise.
    """
    suffix = "ForSequenceClassification"
    if config.architectures and config.architectures[0].endswith(suffix):
        return
    if changes.keys().isdisjoint({"num_labels", "id2label"}):
        config.num_labels = st.transformer.config_kwargs.get("num_labels", 1)
    config.architectures = [type(config).__name__.removesuffix("Config") + suffix]


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
    check_convert(files.architecture, options.convert, pools=st.pools)
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
        token_id=lambda token: tokenizer.get_vocab().get(token),
        pools=bool(files.st.modes),
        overrides=tuple(overrides.mapping(options)),
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
    special = set(tokenizer.all_special_tokens)
    if len(tokenizer) <= len(special) and special.issuperset(tokenizer.get_vocab()):  # Transformers made it up
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


def _change(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """Set entries of a built config, as Transformers does with keywords: configs in it are changed likewise."""
    for key, value in changes.items():
        setattr(config, key, _value(key, getattr(config, key, None), value))
    return config


def _value(key: str, current: Any, value: Any) -> Any:
    """Return the new value of `key`, which was `current`; the numbers of labels, in JSON texts, are numbers."""
    from transformers import PretrainedConfig

    if not isinstance(value, dict):
        return value
    if isinstance(current, PretrainedConfig):
        return _change(current, value)
    if key == "id2label":
        return {int(number): name for number, name in value.items()}
    return value
