"""`config.json` and `tokenizer_config.json`, in Transformers' words, and every key that matters accounted for."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.errors import CheckpointError, first_line
from cenote.models import remote_code
from cenote.models.audit import Keys
from cenote.models.sentence_transformers import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PretrainedConfig

    from cenote.config import ModelConfig
    from cenote.models.audit import Audit

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"

ATTENTION = frozenset(f"{lead}attn_implementation{end}" for lead in ("", "_") for end in ("", "_internal", "_autoset"))
"""Keys that choose a kernel for attention, which here is the layout's."""

# fmt: off
PICKING = frozenset({
    "pool", "pooler", "pooling", "head", "heads", "label", "labels", "classifier", "classification", "score", "scores",
    "reward", "regression", "proj", "projection", "projector", "prompt", "prompts", "instruction", "instructions",
    "template", "tokenizer", "tokenization", "normalize", "normalization", "matryoshka", "causal", "bidirectional",
    "lora", "adapter", "adapters", "adaptations", "similarity",
})
"""Words of keys that pick heads, pooling, labels, tokenisation or code."""

READ = frozenset({
    "is_causal", "matryoshka_dimensions", "is_matryoshka", "task_instructions", "classifier_from_token",
    "is_original_qwen3_reranker", "sbert_ce_default_activation_function", "sentence_transformers", "emb_pooler",
    "lora_adaptations", "lora_rank", "lora_alpha",
})
"""Keys that Cenote reads, whether the config's class has them or not."""
# fmt: on

OF_TRAINING = "for training alone"
OLD_HEADS = "of heads that Transformers no longer has"

KEYS = Keys(
    honoured=READ,
    idle={
        "num_*heads": "a width of other models",
        "n_head*": "a width of other models",
        "head_dim": "a width of other models",
        "pooler_*": "of TensorFlow's first pooler, which no class of Transformers has",
        "use_pooler": "the pooler is not run",
        "add_pooling_layer": "the pooler is not run",
        "classifier_*dropout*": OF_TRAINING,
        "*dropout*": OF_TRAINING,
        "classifier_bias": "the tensors say it",
        "summary_*": OLD_HEADS,
        "head_type": OLD_HEADS,
        "task_specific_params": "for generating text",
        "tokenizer_class": "tokenizer_config.json says it",
        "lora_main_params_trainable": OF_TRAINING,
        "label_smoothing*": OF_TRAINING,
        "*_loss*": OF_TRAINING,
        "label_names": OF_TRAINING,
        "score_func*": "a width of other models",
        "reward_token_id": "the template says it",
    },
)


class Read(NamedTuple):
    """A config, and notes for the report at start."""

    config: PretrainedConfig
    notes: tuple[str, ...]


def read(folder: Path, checkpoint: str, options: ModelConfig, audit: Audit) -> Read:
    """Read `config.json` of the backbone in `folder`.

    Args:
        folder: of the backbone.
        checkpoint: its name, for messages.
        options: the user's.
        audit: receives its keys.

    Raises:
        CheckpointError: it is damaged, names code that may not run, or has a key that cannot be honoured.
    """
    content = read_json(folder / CONFIG)
    if not isinstance(content, dict):
        raise CheckpointError(f"{CONFIG} of {checkpoint} is not a JSON object, but {type(content).__name__}")
    auto_map, notes = content.get("auto_map") or {}, []
    rewritten = remote_code.native(content)
    runs_code = options.trust_remote_code and rewritten is None and bool(auto_map)
    if rewritten is not None:
        audit.use(CONFIG, *(key for key in content if key not in rewritten))
        content = rewritten
        code = ", ".join(sorted(set(remote_code.references(auto_map).values())))
        notes.append(f"Transformers' own class for {content.get('model_type')!r} runs in the place of {code}")
        audit.leave(CONFIG, ["auto_map"], "Transformers has the model that its code is of")
    elif remote_code.references(auto_map) and not runs_code:
        refuse_code(audit, CONFIG, auto_map)
    try:
        config = _of_code(folder) if runs_code else _of_transformers(folder, _plain(content, audit))
    except Exception as error:  # whatever a config's class raises is about its content
        raise CheckpointError(f"cannot read the config of {checkpoint}: {_reason(error)}") from error
    if not runs_code:
        _check_keys(content, config, audit)
    return Read(config, tuple(notes))


def refuse_code(audit: Audit, file: str, auto_map: dict[str, Any]) -> None:
    """Refuse an `auto_map`, naming its code and the flag that runs it.

    Raises:
        CheckpointError: the user has not allowed that it goes unread.
    """
    code = ", ".join(f"{reference} as its {auto_class}" for auto_class, reference in auto_map.items())
    audit.refuse(
        file,
        ["auto_map"],
        f"it names code that the checkpoint brings, {code}, in whose place Transformers' own class would run; start "
        "with --trust-remote-code to run that code",
    )


def check_tokenizer(folder: Path, options: ModelConfig, audit: Audit) -> None:
    """Refuse a `tokenizer_config.json` that asks for another tokenizer than the one that Transformers makes of it.

    Raises:
        CheckpointError: it names code that may not run, or a class that Transformers does not have.
    """
    from cenote.tokenizer import NATIVE

    file = folder / TOKENIZER_CONFIG
    content = read_json(file) if file.is_file() else {}
    auto_map = content.get("auto_map") or {}
    names = _flat(auto_map.values() if isinstance(auto_map, dict) else [auto_map])
    if options.trust_remote_code and names and not NATIVE & names:
        audit.use(TOKENIZER_CONFIG, "auto_map")
        return
    if names and not NATIVE & names:
        refuse_code(audit, TOKENIZER_CONFIG, {"AutoTokenizer": " or ".join(sorted(names))})
    kind = content.get("tokenizer_class")
    if names or kind is None or _has_tokenizer(str(kind)):
        return
    audit.refuse(
        TOKENIZER_CONFIG,
        ["tokenizer_class"],
        f"{kind} is not a class of the installed Transformers, which would read tokenizer.json as it is",
    )


def _flat(references: Iterable[Any]) -> set[str]:
    """Return the code that an `auto_map` names, without repositories; an entry is one class or several."""
    names: set[str] = set()
    for entry in references:
        parts = [entry] if isinstance(entry, str) else [part for part in entry if part]
        names |= {part.rpartition("--")[2] for part in parts}
    return names


def _has_tokenizer(kind: str) -> bool:
    """Return whether Transformers has the tokenizer class `kind`; it has dropped the suffix of the fast ones."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    plain = kind.removesuffix("Fast")
    if plain in ("PreTrainedTokenizer", "TokenizersBackend") or plain in TOKENIZER_MAPPING_NAMES.values():
        return True
    return hasattr(transformers, kind) or hasattr(transformers, plain) or tokenizer_class_from_name(kind) is not None


def _of_code(folder: Path) -> PretrainedConfig:
    """Return the config of a checkpoint with code of its own."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return config


def _of_transformers(folder: Path, content: dict[str, Any]) -> PretrainedConfig:
    """Return the config of Transformers' class."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(content.get("model_type"))
    if kind not in CONFIG_MAPPING:
        found: PretrainedConfig = AutoConfig.from_pretrained(folder)
        return found
    config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict({k: v for k, v in content.items() if k != "auto_map"})
    config._name_or_path = str(folder)
    return config


def _plain(content: dict[str, Any], audit: Audit) -> dict[str, Any]:
    """Return a config, or a part of one, without kernels for attention and with plain names of dtypes."""
    plain: dict[str, Any] = {}
    for key, value in content.items():
        if key in ATTENTION:
            audit.leave(CONFIG, [key], "attention is the layout's")
        elif key in ("dtype", "torch_dtype") and isinstance(value, str):
            plain[key] = value.removeprefix("torch.")
        else:
            plain[key] = _plain(value, audit) if isinstance(value, dict) else value
    return plain


def _check_keys(content: dict[str, Any], config: PretrainedConfig, audit: Audit) -> None:
    """Enter the keys that pick something into the audit, but for those that the config's class has.

    Raises:
        CheckpointError: nothing reads one of them.
    """
    known = _known(config)
    positions = content.get("position_embedding_type", "absolute")
    if positions != "absolute" and "position_embedding_type" not in known:
        audit.refuse(
            CONFIG,
            ["position_embedding_type"],
            f"it is {positions!r}, and {type(config).__name__} knows absolute positions only",
        )
    picking = {key: value for key, value in content.items() if PICKING.intersection(key.strip("_").split("_"))}
    audit.read(CONFIG, {k: v for k, v in picking.items() if v is not None and k not in known}, KEYS)


def _known(config: PretrainedConfig) -> set[str]:
    """Return the keys that the config's class has."""
    kind = type(config)
    parameters = {*signature(kind.__init__).parameters, *signature(kind).parameters}
    return {*dir(kind), *parameters, *config.attribute_map, *(field.name for field in fields(config))}


def _reason(error: Exception) -> str:
    """Return the lines of an error of validation as one, of any other the first."""
    text = " ".join(str(error).split())
    return text[:300] if "\n" in str(error) else f"{first_line(error)}"
