"""Flags, from the fields of the config models: one `--kebab-case` flag per field, dots for a field of a field.

Precedence: flags, then `CENOTE_*`, then the config file, then defaults.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, NoReturn

from cenote.config import (
    ALIASES,
    BENCH_ALIASES,
    EXPLAINED,
    LAYERS,
    SWITCHES,
    BenchConfig,
    EngineConfig,
    HostConfig,
    ModelConfig,
    PoolerConfig,
    choices,
    from_environment,
    from_file,
    known_options,
    unknown_name,
)
from cenote.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

COMMANDS: dict[str, tuple[type[BaseModel], ...]] = {
    "serve": LAYERS,
    "engine": (ModelConfig, EngineConfig, HostConfig),
    "bench": (ModelConfig, EngineConfig, BenchConfig),
}
"""The options that each command has as flags; a later layer's win over those of the same name."""
SPELLINGS = {"serve": ALIASES, "engine": ALIASES, "bench": {**ALIASES, **BENCH_ALIASES}}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The parser of `cenote`."""
    top = _Parser(prog="cenote", description="An inference engine for pooling models.", allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve pooling models over HTTP. Without MODEL: the embedded all-MiniLM-L6-v2.\n"
        "With several, --served-model-name gives each its name, in order, and requests choose by `model`.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("models", nargs="*", metavar="MODEL", help="folder or hub id")
    engine = commands.add_parser(
        "engine",
        help="run a model for servers in other processes",
        description="Run a pooling model for servers that connect to a socket: cenote serve --engine PATH.\n"
        "Without MODEL: the embedded all-MiniLM-L6-v2.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engine.add_argument("models", nargs="?", metavar="MODEL", help="folder or hub id")
    bench = commands.add_parser(
        "bench",
        help="measure a model, or a running server",
        description="Measure throughput and latency of a model, or with --url of a running server.\n"
        "Without MODEL: the embedded all-MiniLM-L6-v2, or the server's first.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("models", nargs="?", metavar="MODEL", help="folder or hub id, or the name at the server")
    for name, command in (("serve", serve), ("engine", engine), ("bench", bench)):
        command.add_argument("--config", metavar="FILE", help="YAML file of options")
        owners = known_options(COMMANDS[name])
        for layer in COMMANDS[name]:
            group = command.add_argument_group(layer.__name__.removesuffix("Config").lower())
            for option in layer.model_fields:
                if owners[option] is layer:
                    _add_flag(group, layer, option, SPELLINGS[name])
    return top


def parse(argv: list[str]) -> dict[str, Any]:
    """`argv` and the environment as `{"command": ..., option: value}`.

    Raises:
        ConfigError: a flag, variable or entry is unknown or malformed.
    """
    top = parser()
    argv, explained = _take_explained(argv)
    argv, dotted = _split_dotted(argv)
    known, unknown = top.parse_known_args(argv)
    if known.version:
        return {"command": "version"}
    if known.command is None:
        top.print_help()
        return {"command": "help"}
    if unknown:
        flag = unknown[0].partition("=")[0]
        own = known_options(COMMANDS[known.command])
        options = [_flag(name) for name in (*own, *SPELLINGS[known.command], *EXPLAINED, "config")]
        raise ConfigError(unknown_name("flag", flag, options))
    given = {name: value for name, value in vars(known).items() if value is not None}
    given.pop("version")
    file = given.pop("config", None)
    if models := given.pop("models", None):
        models = [models] if isinstance(models, str) else models
        if "model" in given:
            raise ConfigError(f"the model is given twice: {models[0]!r} and --model {given['model']!r}")
        given |= {"model": models[0]} if len(models) == 1 else {"models": models}
    if dotted:
        given["pooler_config"] = {**_object(given.get("pooler_config", {})), **dotted}
    if "url" in given and (idle := given.keys() - {"command", "model"} - BenchConfig.model_fields.keys()):
        raise ConfigError(
            f"{_flag(min(idle))} has no effect with --url: the server was started with options of its own"
        )
    return {**(from_file(file) if file else {}), **from_environment(), **explained, **given}


def _add_flag(group: argparse._ArgumentGroup, layer: type[BaseModel], name: str, aliases: Mapping[str, str]) -> None:
    field = layer.model_fields[name]
    default = field.get_default(call_default_factory=True)
    default = " ".join(map(str, default)) if isinstance(default, tuple) and default else default
    shown = "" if default in (None, (), "", False) or isinstance(default, PoolerConfig) else f" (default: {default})"
    listed = ", ".join(choices(layer, name))
    text = f"{field.description or ''}{listed and f' [{listed}]'}{shown}".replace("%", "%%")
    spellings = [_flag(name), *(_flag(old) for old, new in aliases.items() if new == name)]
    if isinstance(default, bool):
        group.add_argument(*spellings, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif isinstance(field.default, tuple):
        group.add_argument(*spellings, dest=name, action="extend", nargs="+", default=None, help=text)
    else:
        group.add_argument(*spellings, dest=name, default=None, help=text, metavar=name.upper())


def _take_explained(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take the flags of other engines that have no effect here out of `argv`; `resolve` says why they have none."""
    names = {_flag(name): name for name in EXPLAINED}
    kept: list[str] = []
    taken: dict[str, str] = {}
    rest = list(reversed(argv))
    while rest:
        argument = rest.pop()
        flag, equals, value = argument.partition("=")
        if flag not in names:
            kept.append(argument)
            continue
        if not equals and rest and names[flag] not in SWITCHES and not rest[-1].startswith("-"):
            value = rest.pop()
        taken[names[flag]] = value
    return kept, taken


def _split_dotted(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--pooler-config.field value` out of `argv`."""
    prefixes = tuple(f"{_flag(n)}." for n in ("pooler_config", "override_pooler_config"))
    kept: list[str] = []
    fields: dict[str, Any] = {}
    rest = iter(argv)
    for argument in rest:
        prefix = next((p for p in prefixes if argument.startswith(p)), None)
        if prefix is None:
            kept.append(argument)
            continue
        name, equals, value = argument.removeprefix(prefix).partition("=")
        if not equals:
            value = next(rest, "")
        name = name.replace("-", "_")
        if name not in PoolerConfig.model_fields:
            raise ConfigError(unknown_name("pooler config field", name, PoolerConfig.model_fields))
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return kept, fields


def _object(value: Any) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ConfigError(f"--pooler-config is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--pooler-config must be a JSON object, got {value!r}")
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
