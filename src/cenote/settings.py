"""From keyword arguments, environment variables and YAML files to configs: names of options, resolved or refused."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cenote.config import EngineConfig, ModelConfig, PoolerConfig, ServerConfig
from cenote.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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

EXPLAINED = {
    "tensor_parallel_size": "a model runs on one device",
    "gpu_memory_utilization": "pooling needs no key-value cache, so no memory is reserved",
    "seed": "nothing is sampled",
    "tokenizer_mode": "the tokenizer's fast backend is used where there is one",
    "swap_space": "there is no key-value cache",
    "enable_prefix_caching": "there is no key-value cache; see prefix_sharing for what a batch has in common",
    "enable_chunked_prefill": "sequences are never split",
    "engine_worker_queue_port": "the engine lives in the server's process, or listens on a socket; see --engine",
    "disable_log_stats": "statistics are at /metrics",
    "enable_request_id_headers": "X-Request-Id comes with every answer",
    "max_loras": "a batch runs once per adapter in it, however many there are",
    "max_cpu_loras": "all adapters stay loaded",
    "max_lora_rank": "adapters may have any rank",
    "lora_dtype": "adapters have the dtype of the layers that they change",
    "lora_extra_vocab_size": "an adapter adds no tokens",
    "fully_sharded_loras": "a model runs on one device",
}
"""Options of other engines that are accepted without effect, and why they have none."""

SWITCHES = frozenset(
    {
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "disable_log_stats",
        "enable_request_id_headers",
        "fully_sharded_loras",
    }
)
"""Those of `EXPLAINED` whose flags take no value."""


def choices(layer: type[BaseModel], name: str) -> tuple[str, ...]:
    """Return the values that option `name` may have, if they are a list."""
    waiting = [layer.model_fields[name].annotation]
    while waiting:
        kind = waiting.pop()
        if get_origin(kind) is Literal:
            return tuple(map(str, get_args(kind)))
        waiting += [part for part in get_args(kind) if part is not type(None)]
    return ()


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
        if name in EXPLAINED:
            if name == "tensor_parallel_size" and str(value) != "1":
                raise ConfigError(f"tensor_parallel_size must be 1, got {value!r}: {EXPLAINED[name]}")
            notes.append(f"{spelling} has no effect: {EXPLAINED[name]}")
        elif name not in owners:
            raise ConfigError(unknown_name("option", spelling, [*owners, *ALIASES, *EXPLAINED]))
        elif name in split[owners[name]]:
            raise ConfigError(f"option {name!r} is given twice, once as {spelling!r}")
        else:
            split[owners[name]][name] = value
    return [_build(layer, split[layer]) for layer in layers], notes


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
