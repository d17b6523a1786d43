"""From keyword arguments, environment variables and YAML files to configs: names of options, resolved or refused."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cenote.config import EngineConfig, ModelConfig, PoolerConfig, ServerConfig
from cenote.errors import ConfigError, unknown_name
from cenote.foreign import FOREIGN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cenote.foreign import Foreign

ENV_PREFIX = "CENOTE_"
C = TypeVar("C", bound=BaseModel)

LAYERS: tuple[type[BaseModel], ...] = (ModelConfig, EngineConfig, ServerConfig)

ALIASES = {
    "override_pooler_config": "pooler_config",
    "hostname": "host",
    "h11_max_incomplete_event_size": "max_header_bytes",
    "h11_max_header_count": "max_header_count",
}
"""Older spellings of an option."""

BENCH_ALIASES = {
    "base_url": "url",
    "num_prompts": "requests",
    "max_concurrency": "concurrency",
    "request_rate": "rate",
    "random_input_len": "input_len",
}
"""Spellings of `vllm bench`."""


OFFLINE = {"forward_timeout": 0}
"""Defaults of `LLM` that differ: a caller in this process can wait for as long as it likes."""


def kinds_of(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and the annotations within it, but for the keys and values of objects."""
    waiting = [annotation]
    while waiting:
        kind = waiting.pop()
        yield kind
        if get_origin(kind) not in (Literal, dict):
            waiting += get_args(kind)


def choices(layer: type[BaseModel], name: str) -> dict[str, tuple[str, ...]]:
    """Return the values that option `name` may have, if they are a list, and those that its fields may have.

    The option's own values are under an empty name, those of a field under the field's.
    """
    for kind in kinds_of(layer.model_fields[name].annotation):
        if get_origin(kind) is Literal:
            return {"": tuple(map(str, get_args(kind)))}
        if kind is PoolerConfig:
            return {field: values for field in kind.model_fields for values in choices(kind, field).values()}
    return {}


def takes_fields(name: str) -> bool:
    """Return whether option `name` is a JSON object."""
    kinds = kinds_of(known_options()[name].model_fields[name].annotation)
    return any(get_origin(kind) is dict or kind is PoolerConfig for kind in kinds)


def shown_default(layer: type[BaseModel], name: str) -> str:
    """Return the default of option `name` for help, or an empty string if it stands for no value."""
    default = layer.model_fields[name].get_default(call_default_factory=True)
    if default is None or isinstance(default, PoolerConfig):
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def known_options(layers: Iterable[type[BaseModel]] = LAYERS) -> dict[str, type[BaseModel]]:
    """Return the names of options, and the layer that has each."""
    return {name: layer for layer in layers for name in layer.model_fields}


def resolve(
    values: Mapping[str, Any], layers: tuple[type[BaseModel], ...] = LAYERS
) -> tuple[list[BaseModel], list[str]]:
    """Distribute `values` over `layers`.

    Returns:
        One validated config per layer, and a note for every option that has no effect.

    Raises:
        ConfigError: a name is unknown, or a value is not allowed.
    """
    owners = known_options(layers)
    notes: list[str] = []
    split: defaultdict[type[BaseModel], dict[str, Any]] = defaultdict(dict)
    if values.get("task") is not None and owners.get("task") is ModelConfig:
        notes.append(
            f"task={values['task']!r} is the spelling of older releases of vLLM; tasks follow from the model, and "
            "convert or pooler_config.task say what does not"
        )
    for spelling, value in values.items():
        name = ALIASES.get(spelling, spelling)
        if name in FOREIGN:
            notes += _idle_note(spelling, value, FOREIGN[name])
        elif name not in owners:
            raise ConfigError(unknown_name("option", spelling, [*owners, *ALIASES, *FOREIGN]))
        elif name in split[owners[name]]:
            raise ConfigError(f"option {name!r} is given twice, once as {spelling!r}")
        else:
            split[owners[name]][name] = value
    return [_build(layer, split[layer]) for layer in layers], notes


def _idle_note(name: str, value: Any, option: Foreign) -> list[str]:
    """Return the note on an option without effect; there is none on one that is left unset.

    Raises:
        ConfigError: the value would have an effect.
    """
    if value is None:
        return []
    if not option.takes(value):
        raise ConfigError(f"{name} must be {' or '.join(option.values)}, got {value!r}: {option.reason}")
    return [f"{name} has no effect: {option.reason}"]


def _build(layer: type[C], values: dict[str, Any]) -> C:
    try:
        return layer(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(map(_fault, error.errors()))) from None


def _fault(entry: Any) -> str:
    """Return pydantic's report of one fault as a clause."""
    words: str = entry["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, (".".join(map(str, entry["loc"])), words)))


def from_environment(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the options set by `CENOTE_*` variables; lists are separated by commas.

    Raises:
        ConfigError: a variable names no option.
    """
    owners = known_options()
    options: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        name = ALIASES.get(name, name)
        if name not in owners:
            raise ConfigError(f"environment variable {variable}: " + unknown_name("option", name, owners))
        is_list = owners[name].model_fields[name].annotation == tuple[str, ...]
        options[name] = tuple(value.split(",")) if is_list else value
    return options


def from_file(path: str | Path) -> dict[str, Any]:
    """Return the options of a YAML file: one mapping, with names as flags or as fields.

    Raises:
        ConfigError: it cannot be read, is not a mapping, or gives an option twice.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} must be a mapping of options, got {type(content).__name__}")
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = ALIASES.get(name, name)
        if name in options:
            raise ConfigError(f"the config file {path} gives option {name!r} twice")
        options[name] = value
    return options
