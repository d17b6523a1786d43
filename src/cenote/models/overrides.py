"""`hf_overrides`: the user's changes of a config, as if `config.json` said so, or by a function of the config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cenote.errors import CheckpointError, ConfigError, first_line
from cenote.models import value_types

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

    from cenote.config import ModelConfig

WHOLE = frozenset({"id2label", "label2id"})
"""Keys of mappings that are one value: one with other entries names other classes."""

TYPES = value_types.CONFIG | {"id2label": dict[int, Any], "label2id": dict[str, Any], "num_labels": value_types.Natural}
"""Types of overrides: those of `config.json`, where labels may be null."""

OUTDATED = {
    "id2label": ("num_labels", "_num_labels"),
    "torch_dtype": ("dtype",),
    "use_sliding_window": ("layer_types",),
    "max_window_layers": ("layer_types",),
    "sliding_window_pattern": ("layer_types",),
    "_sliding_window_pattern": ("layer_types",),
    "global_attn_every_n_layers": ("layer_types",),
}
"""Keys to those that Transformers writes as their result, and that would win over them."""

ROPE = "rope_parameters"
"""Key of the settings of rotary positions, which Transformers writes since its version 5."""

SCALING = "rope_scaling"

OLDER = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
"""Older keys of a config to those in `rope_parameters`, which win over them."""

ROPE_KEYS = frozenset({ROPE, SCALING, *OLDER})


def mapping(options: ModelConfig) -> dict[str, Any]:
    """Return the entries of the config that the user sets; those that a function sets are not known.

    Raises:
        ConfigError: one is of another type than its key has.
    """
    if callable(options.hf_overrides):
        return {}
    entries = dict(options.hf_overrides or {})
    try:
        value_types.check("hf_overrides", entries, TYPES)
    except CheckpointError as error:
        raise ConfigError(error.message.removesuffix(", or download it again")) from None
    return entries


def merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config with changes; mappings in it are merged likewise, but for labels.

    Raises:
        ConfigError: the content has rotary positions by types of layers, and a change does not say for which.
    """
    content, changes = _rotary(content, changes)
    outdated = {name for key in changes for name in OUTDATED.get(key, ())} - changes.keys()
    result = {key: value for key, value in content.items() if key not in outdated}
    for key, value in changes.items():
        result[key] = value if key in WHOLE else _value(result.get(key), value)
    return result


def _value(current: Any, value: Any) -> Any:
    """Return the new value of a key: of two mappings, both merged."""
    if isinstance(current, dict) and isinstance(value, dict):
        return merged(current, value)
    return value


def _rotary(content: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return content and changes that name rotary positions alike, where one of both has `rope_parameters`.

    Raises:
        ConfigError: the content has them by types of layers, and a change does not say for which.
    """
    names = sorted(ROPE_KEYS & changes.keys())
    parts = [part[ROPE] for part in (content, changes) if part.get(ROPE)]
    if not names or not parts:
        return content, changes
    if not any(isinstance(value, dict) for part in parts for value in part.values()):
        values = {key: value for key, value in content.items() if key not in ROPE_KEYS or value is not None}
        return _renamed(values), _renamed(changes)
    if content.get(ROPE) and names != [ROPE]:
        raise ConfigError(
            f"hf_overrides: {', '.join(names)} would have no effect, for config.json has {ROPE} by types of layers, "
            f"{', '.join(content[ROPE])}; write {ROPE} with these"
        )
    return content, changes


def _renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config with those of rotary positions in `rope_parameters`."""
    rope = dict(entries.get(ROPE) or {})
    if SCALING in entries:
        scaling = dict(entries[SCALING] or {"rope_type": "default"})
        rope |= {"rope_type": scaling.pop("type", "default"), **scaling}
    for key in OLDER.keys() & entries.keys():
        rope.setdefault(OLDER[key], entries[key])
    return {**{key: value for key, value in entries.items() if key not in ROPE_KEYS}, ROPE: rope}


def by_function(config: PretrainedConfig, options: ModelConfig) -> PretrainedConfig:
    """Return the config that the user's function makes of `config`, if there is one.

    Raises:
        ConfigError: it fails, or returns something else.
    """
    from transformers import PretrainedConfig

    function = options.hf_overrides
    if not callable(function):
        return config
    try:
        changed = function(config)
    except Exception as error:
        raise ConfigError(
            f"hf_overrides: the function raised {type(error).__name__}: {first_line(error)}; correct it"
        ) from error
    if not isinstance(changed, PretrainedConfig):
        raise ConfigError(
            f"hf_overrides: the function returned {type(changed).__name__}, expected the config; end it with a return"
        )
    return changed
