"""`config.json` and `tokenizer_config.json`, in Transformers' words, and every key that matters accounted for."""

from __future__ import annotations

import json
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote import tokenizer
from cenote.errors import CheckpointError, ConfigError
from cenote.functions import coalesce
from cenote.models import overrides, remote_code, sizes, value_types
from cenote.models.audit import Audit, Keys
from cenote.models.reading import REMEDY, about, as_object, load, read_json
from cenote.models.transformer_module import without

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from transformers import PretrainedConfig

    from cenote.config import ModelConfig
    from cenote.models.weights import Stored

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"

ATTENTION = frozenset(f"{lead}attn_implementation{end}" for lead in ("", "_") for end in ("", "_internal", "_autoset"))
"""Keys that choose a kernel for attention, which here is the layout's."""

LEFT_OUT = ATTENTION | {"auto_map"}
DTYPES = frozenset({"dtype", "torch_dtype"})

# fmt: off
PICKING = frozenset({
    "pool", "pooled", "pooler", "pooling", "head", "heads", "label", "labels", "classifier", "classification", "score",
    "scores",
    "reward", "regression", "proj", "projection", "projector", "prompt", "prompts", "instruction", "instructions",
    "template", "tokenizer", "tokenization", "normalize", "normalized", "normalization", "matryoshka", "causal",
    "bidirectional", "unidirectional", "lora", "adapter", "adapters", "adaptations", "similarity", "prefix", "prefixes",
    "suffix", "instruct", "maxlen", "punctuation", "skiplist", "colbert", "rerank", "reranker", "crf",
})
"""Words of keys that pick heads, pooling, labels, tokenisation or code."""

READ = frozenset({
    "is_causal", "matryoshka_dimensions", "is_matryoshka", "task_instructions", "classifier_from_token",
    "is_original_qwen3_reranker", "sbert_ce_default_activation_function", "sentence_transformers", "emb_pooler",
    "lora_adaptations", "lora_rank", "lora_alpha", "do_normalize", "score_type", "mean", "var", "gating_temperature",
})
"""Keys that Cenote reads, whether the config's class has them or not."""
# fmt: on

LATE = frozenset({"architectures", overrides.ROPE})
"""Keys in Transformers' words, whose overrides count behind the recognition of published code by the file's own."""

OF_TRAINING = "for training alone"
GENERATING = "for generating text"
OF_TOKENIZER = "tokenizer_config.json says it"
OLD_HEADS = "of heads that Transformers no longer has"

KEYS = Keys(
    honoured=READ,
    idle={
        "num_*heads": "a width of other models",
        "n_head*": "a width of other models",
        "*head_dim": "a width, of other models or which the config's class takes",
        "pooler_*": "of TensorFlow's first pooler, which no class of Transformers has",
        "use_pooler": "the pooler is not run",
        "add_pooling_layer": "the pooler is not run",
        "classifier_*dropout*": OF_TRAINING,
        "*dropout*": OF_TRAINING,
        "classifier_bias": "the tensors say it",
        "summary_*": OLD_HEADS,
        "head_type": OLD_HEADS,
        "task_specific_params": GENERATING,
        "output_scores": GENERATING,
        "prefix": GENERATING,
        "tokenizer_class": OF_TOKENIZER,
        "add_prefix_space": OF_TOKENIZER,
        "lora_main_params_trainable": OF_TRAINING,
        "label_smoothing*": OF_TRAINING,
        "*_loss*": OF_TRAINING,
        "label_names": OF_TRAINING,
        "_num_labels": "the names of the labels say it",
        "normalize_before": "where norms stand is the class's",
        "normalize_embedding": "where norms stand is the class's",
        "score_func*": "a width of other models",
        "score_dim": "the tensors say it",
        "score_bias": "the tensors say it",
        "normalizer_type": OF_TRAINING,
        "reward_token_id": "the template says it",
    },
)


class Read(NamedTuple):
    """A config, and notes for the report at start."""

    config: PretrainedConfig
    notes: tuple[str, ...]


def read(folder: Path, checkpoint: str, options: ModelConfig, audit: Audit, stored: Mapping[str, Stored]) -> Read:
    """Read `config.json` of the backbone in `folder`.

    Args:
        folder: of the backbone.
        checkpoint: its name, for messages.
        options: the user's.
        audit: receives its keys.
        stored: the weights, whose sizes bound its counts.

    Raises:
        CheckpointError: it is damaged, names code that may not run, or has a key that cannot be honoured.
        ConfigError: it is so with the user's changes alone.
    """
    content = decoded(as_object(folder / CONFIG, read_json(folder / CONFIG)))
    changes = overrides.mapping(options)
    if not changes:
        return _read(folder, checkpoint, content, options, audit, stored)
    try:
        return _read(folder, checkpoint, content, options, audit, stored, changes)
    except CheckpointError as error:
        _read(folder, checkpoint, content, options, Audit(options.allow_unread), stored)  # is the file itself at fault?
        message = error.message.removesuffix(f"; {REMEDY}")
        raise ConfigError(f"hf_overrides: with {', '.join(changes)}: {message}") from error


def decoded(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a config with the numbers that are not finite, which Transformers writes as objects."""
    from transformers import PretrainedConfig

    numbers: dict[str, Any] = PretrainedConfig._decode_special_floats(content)
    return numbers


def _read(
    folder: Path,
    checkpoint: str,
    content: dict[str, Any],
    options: ModelConfig,
    audit: Audit,
    stored: Mapping[str, Stored],
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Read:
    """Return the config of a `config.json` with `content`, changed by `changes`; see `read`."""
    late = {key: value for key, value in changes.items() if key in LATE}
    with about(f"{CONFIG} of {checkpoint}", content=lambda: content):
        content = overrides.merged(content, without(changes, LATE))
        value_types.check(CONFIG, content, value_types.CONFIG)
        sizes.check_counts(CONFIG, content, stored)
        code, native = remote_code.references(content), remote_code.native(content)
        settled = overrides.merged(coalesce(native, content), late)
        if native is not None:
            notes = _note(content, native, audit)
            return Read(_of_transformers(folder, settled, audit, changes), notes)
        if code and options.trust_remote_code:
            audit.use(CONFIG, "auto_map")
            return Read(_of_code(folder, settled, changes), ())
        if code:
            _refuse_code(audit, CONFIG, code)
        return Read(_of_transformers(folder, settled, audit, changes), ())


def _note(content: dict[str, Any], native: dict[str, Any], audit: Audit) -> tuple[str, ...]:
    """Enter the keys of `content` that made the config `native` into the audit, and return a note about it."""
    audit.use(CONFIG, *without(content, native))
    audit.leave(CONFIG, ["auto_map"], "Transformers has the model that its code is of")
    names = remote_code.references(content).values() or [content["model_type"]]
    code = ", ".join(sorted(set(names)))
    return (f"Transformers' own class for {native['model_type']!r} runs in the place of {code}",)


def _refuse_code(audit: Audit, file: str, code: Mapping[str, str]) -> None:
    """Refuse an `auto_map`, naming its code by the auto class, and the flag that runs it.

    Raises:
        CheckpointError: the user has not allowed that it goes unread.
    """
    named = ", ".join(f"{reference} as its {auto_class}" for auto_class, reference in code.items())
    audit.refuse(
        file,
        ["auto_map"],
        f"it names code that the checkpoint brings, {named}, in whose place Transformers' own class would run; start "
        "with --trust-remote-code to run that code",
    )


def check_tokenizer(folder: Path, options: ModelConfig, audit: Audit) -> None:
    """Refuse a `tokenizer_config.json` that asks for another tokenizer than the one that Transformers makes of it.

    Raises:
        CheckpointError: it names code that may not run, or a class that Transformers does not have.
    """
    content = load(folder / TOKENIZER_CONFIG)
    value_types.check(TOKENIZER_CONFIG, content, value_types.TOKENIZER)
    code = tokenizer.references(content)
    runs = options.trust_remote_code or code & tokenizer.NATIVE
    if code and not runs:
        _refuse_code(audit, TOKENIZER_CONFIG, {"AutoTokenizer": " or ".join(sorted(code))})
    audit.use(TOKENIZER_CONFIG, *sorted({"auto_map", "tokenizer_class"} & content.keys()))
    kind = str(content.get("tokenizer_class") or "PreTrainedTokenizer")
    if not code and not _has_tokenizer(kind):
        audit.refuse(
            TOKENIZER_CONFIG,
            ["tokenizer_class"],
            f"{kind} is not a class of the installed Transformers, which would read tokenizer.json as it is",
        )


def _has_tokenizer(kind: str) -> bool:
    """Return whether Transformers has the tokenizer class `kind`; it has dropped the suffix of the fast ones."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    plain = kind.removesuffix("Fast")
    kinds = {"PreTrainedTokenizer", "TokenizersBackend", *TOKENIZER_MAPPING_NAMES.values()}
    return not kinds.isdisjoint((kind, plain)) or any(map(partial(hasattr, transformers), (kind, plain)))


def _of_code(folder: Path, content: dict[str, Any], changes: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config of a checkpoint with code of its own, whose `content` has the user's `changes`."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if not changes:
        return config
    changed: PretrainedConfig = type(config).from_dict(content)
    changed._name_or_path = str(folder)
    return changed


def _of_transformers(
    folder: Path, content: dict[str, Any], audit: Audit, changes: Collection[str] = ()
) -> PretrainedConfig:
    """Return the config of Transformers' class, all of whose keys but the user's `changes` are accounted for.

    Raises:
        ValueError: Transformers has none of this type, whose name is in the message.
    """
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "model_type" not in content:
        unknown: PretrainedConfig = AutoConfig.from_pretrained(folder)  # its error says so
        return unknown
    kind = str(content["model_type"])
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"Transformers {__version__} has no model type '{kind}', and the checkpoint names no code of its own, as "
            "auto_map, that could be run with --trust-remote-code"
        )
    audit.leave(CONFIG, sorted(ATTENTION & content.keys()), "attention is the layout's")
    plain = json.loads(json.dumps(content), object_hook=_plain)
    config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(plain)
    config._name_or_path = str(folder)
    _check_keys(content, config, audit, changes)
    return config


def _plain(entries: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a config without code and kernels for attention, and with plain names of dtypes."""
    for key in DTYPES & entries.keys():
        if isinstance(entries[key], str):
            entries[key] = entries[key].removeprefix("torch.")
    return without(entries, LEFT_OUT)


def _check_keys(content: dict[str, Any], config: PretrainedConfig, audit: Audit, changes: Collection[str] = ()) -> None:
    """Enter the keys that pick something into the audit, but for those that the config's class or the user has.

    Raises:
        CheckpointError: nothing reads one of them.
    """
    unknown = without(content, _keys(config))
    if unknown.get("position_embedding_type", "absolute") != "absolute":
        audit.refuse(
            CONFIG,
            ["position_embedding_type"],
            f"it is {content['position_embedding_type']!r}, and {type(config).__name__} knows absolute positions only",
        )
    picking = {key: value for key, value in without(unknown, changes).items() if _picks(key, value)}
    audit.read(CONFIG, without(picking, _computed(content, config, picking)), KEYS)


def _computed(content: dict[str, Any], config: PretrainedConfig, keys: Collection[str]) -> set[str]:
    """Return those of `keys` that the config's class computes from the others: it has their values without them."""
    unread = [key for key in keys if key not in KEYS.honoured and not KEYS.reason(key)]
    if not unread:
        return set()
    values = json.loads(type(config).from_dict(without(content, unread)).to_json_string(use_diff=False))
    return {key for key in unread if key in values and values[key] == content[key]}


def _picks(key: str, value: Any) -> bool:
    """Return whether an entry picks heads, pooling, labels, tokenisation or code."""
    return _says_something(value) and not PICKING.isdisjoint(key.strip("_").split("_"))


def _says_something(value: Any) -> bool:
    """Return whether a value is not null, empty, or an object all of whose values are."""
    if isinstance(value, dict):
        return any(map(_says_something, value.values()))
    return value not in (None, "", [])


def _keys(config: PretrainedConfig) -> set[str]:
    """Return the keys that the config's class has."""
    kind = type(config)
    return {*dir(kind), *signature(kind).parameters, *config.attribute_map}
