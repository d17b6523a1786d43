"""Flags, from the fields of the config models: one `--kebab-case` flag per field, dots for a field of a field.

Precedence: flags, then `CENOTE_*`, then the config file, then defaults.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from cenote.cli.spelling import SHORT, dashed, merged, take_fields, take_foreign
from cenote.config import BenchConfig, EngineConfig, HostConfig, ModelConfig
from cenote.errors import ConfigError, unknown_name
from cenote.foreign import FOREIGN
from cenote.option_values import parse_json
from cenote.settings import (
    ALIASES,
    BENCH_ALIASES,
    LAYERS,
    choices,
    from_environment,
    from_file,
    known_options,
    shown_default,
    takes_fields,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

COMMANDS: dict[str, tuple[type[BaseModel], ...]] = {
    "serve": LAYERS,
    "engine": (ModelConfig, EngineConfig, HostConfig),
    "bench": (ModelConfig, EngineConfig, BenchConfig),
    "info": (ModelConfig, EngineConfig),
}
"""The options that each command has as flags; of two options of one name, the later layer's."""
SPELLINGS = {"serve": ALIASES, "engine": ALIASES, "bench": {**ALIASES, **BENCH_ALIASES}, "info": ALIASES}
"""Older and foreign spellings of each command's options."""
OF_FRONTS = {"served_model_name", "trust_remote_code"}
"""Options of a model that a server in front of engines takes, too."""
OF_ENGINES = {"models", *ModelConfig.model_fields, *EngineConfig.model_fields} - OF_FRONTS
"""Options that a server in front of engines in other processes cannot have."""
OBJECTS = {spelling for spelling in (*known_options(), *ALIASES) if takes_fields(ALIASES.get(spelling, spelling))}
"""Options whose fields have flags of their own, `--option.field`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """Return the parser of `cenote`."""
    top = _Parser(prog="cenote", description="An inference engine for pooling models.", allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _add_command(
        commands,
        "serve",
        "serve a model over HTTP",
        "Serve pooling models over HTTP. Without MODEL: the embedded all-MiniLM-L6-v2.\n"
        "With several, --served-model-name gives each its name, in order, and requests choose by `model`.",
    ).add_argument("models", nargs="*", metavar="MODEL", help="folder or hub id")
    _add_command(
        commands,
        "engine",
        "run a model for servers in other processes",
        "Run a pooling model for servers that connect to a socket: cenote serve --engine PATH.\n"
        "Without MODEL: the embedded all-MiniLM-L6-v2.",
    ).add_argument("models", nargs="?", metavar="MODEL", help="folder or hub id")
    _add_command(
        commands,
        "bench",
        "measure a model, or a running server",
        "Measure throughput and latency of a model, or with --url of a running server.\n"
        "Without MODEL: the embedded all-MiniLM-L6-v2, or the server's first.",
    ).add_argument("models", nargs="?", metavar="MODEL", help="folder or hub id, or the name at the server")
    info = _add_command(
        commands,
        "info",
        "tell how a checkpoint is read",
        "Load a pooling model and tell how its files are read, its tasks and how it runs, without serving it.\n"
        "Without MODEL: the embedded all-MiniLM-L6-v2.",
    )
    info.add_argument("models", nargs="?", metavar="MODEL", help="folder or hub id")
    info.add_argument("--json", action="store_true", default=None, help="one JSON object instead of lines")
    return top


def _add_command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, description: str
) -> argparse.ArgumentParser:
    """Add a command with the flags of its options."""
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--config", metavar="FILE", help="YAML file of options")
    owners = known_options(COMMANDS[name])
    for layer in COMMANDS[name]:
        group = command.add_argument_group(layer.__name__.removesuffix("Config").lower())
        for option in layer.model_fields:
            if owners[option] is layer:
                add_flag(group, layer, option, SPELLINGS[name])
    return command


def parse(argv: list[str]) -> dict[str, Any]:
    """Return `argv` and the environment as `{"command": ..., option: value}`.

    Raises:
        ConfigError: a flag, variable or entry is unknown or malformed.
    """
    top = parser()
    argv, foreign = take_foreign(dashed(argv))
    argv, fields = take_fields(argv, OBJECTS)
    parsed, unknown = top.parse_known_args(argv)
    if parsed.version:
        return {"command": "version"}
    if parsed.command is None:
        top.print_help()
        return {"command": "help"}
    if unknown:
        raise ConfigError(_unknown_flag(parsed.command, unknown[0].partition("=")[0]))
    options = {name: value for name, value in vars(parsed).items() if value is not None}
    options.pop("version")
    file = options.pop("config", None)
    _name_models(options)
    _merge_fields(options, fields)
    if "url" in options:
        _check_remote(options)
    entries = from_file(file) if file else {}
    variables = from_environment()
    is_front = parsed.command == "serve" and "engine" in {**entries, **variables, **options}
    if is_front:  # its engines may have the same variables
        variables = {name: value for name, value in variables.items() if name not in OF_ENGINES}
    return {**entries, **variables, **foreign, **options}


def _unknown_flag(command: str, flag: str) -> str:
    names = (*known_options(COMMANDS[command]), *SPELLINGS[command], *FOREIGN, "config")
    return unknown_name("flag", flag, [*map(flag_of, names), *SHORT])


def _name_models(options: dict[str, Any]) -> None:
    """Make positional models the option `model`, or `models` if there are several."""
    models = options.pop("models", None)
    if not models:
        return
    models = [models] if isinstance(models, str) else models
    if "model" in options:
        raise ConfigError(f"the model is given twice: {models[0]!r} and --model {options['model']!r}")
    options |= {"model": models[0]} if len(models) == 1 else {"models": models}


def _check_remote(options: dict[str, Any]) -> None:
    """Refuse options of the model and the engine where a server is measured."""
    idle = options.keys() - {"command", "model"} - BenchConfig.model_fields.keys()
    if idle:
        raise ConfigError(
            f"{flag_of(min(idle))} has no effect with --url: the server was started with options of its own"
        )


def add_flag(
    group: argparse._ArgumentGroup, layer: type[BaseModel], name: str, aliases: Mapping[str, str]
) -> argparse.Action:
    """Add the flag of an option, with its older spellings."""
    field = layer.model_fields[name]
    spellings = [flag_of(name), *(flag_of(old) for old, new in aliases.items() if new == name)]
    text = _help(layer, name).replace("%", "%%")
    if isinstance(field.default, bool):
        return group.add_argument(*spellings, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
    if isinstance(field.default, tuple):
        return group.add_argument(*spellings, dest=name, action="extend", nargs="+", default=None, help=text)
    return group.add_argument(*spellings, dest=name, default=None, help=text, metavar=name.upper())


def _help(layer: type[BaseModel], name: str) -> str:
    """Return the description of an option, its choices and its default."""
    text = layer.model_fields[name].description or ""
    for field, values in choices(layer, name).items():
        text += f" [{field}: {', '.join(values)}]" if field else f" [{', '.join(values)}]"
    default = shown_default(layer, name)
    if default and default != "False":
        text += f" (default: {default})"
    return text


def _merge_fields(options: dict[str, Any], fields: Mapping[str, dict[str, Any]]) -> None:
    """Put the fields of flags with dots into the objects of options."""
    for spelling, entries in fields.items():
        name = ALIASES.get(spelling, spelling)
        if name == "pooler_config":
            entries = {field.replace("-", "_"): value for field, value in entries.items()}
        options[name] = merged(_object(name, options.get(name, {})), entries)


def _object(name: str, value: Any) -> dict[str, Any]:
    try:
        content = parse_json(value)
    except ValueError as error:
        raise ConfigError(f"{flag_of(name)} is {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{flag_of(name)} must be a JSON object, got {value!r}")
    return content


def flag_of(name: str) -> str:
    """Return the flag of an option."""
    return "--" + name.replace("_", "-")
