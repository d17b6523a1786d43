"""Writes the page of all options: `python -m cenote.cli.options > docs/options.md`. A test compares the two."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cenote.config import BenchConfig, HostConfig
from cenote.foreign import FOREIGN
from cenote.settings import ALIASES, BENCH_ALIASES, ENV_PREFIX, LAYERS, choices, shown_default

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from cenote.foreign import Foreign

HEAD = """# Options

Every option is a flag of `cenote serve`, a variable of the environment and an entry of the `--config` file; those of
the model and the engine are also keyword arguments of `LLM`. Flags win over variables, variables over the file.
Unknown names are errors. This page is made by `python -m cenote.cli.options`.
"""

HOST = """
## Engine in a process of its own

Options of `cenote engine` besides those of the model and the engine, as flags and in its `--config` file. Entries
and variables of the server's have no effect.

| flag | default | |
|---|---|---|
"""

BENCH = """
## Bench

Options of `cenote bench` besides those of the model and the engine, as flags and in its `--config` file; there
are no variables. Entries of the server's in the same file have no effect.

| flag | default | |
|---|---|---|
"""


def page() -> str:
    """Return the page, as Markdown."""
    parts = [HEAD]
    for layer in LAYERS:
        title = layer.__name__.removesuffix("Config")
        parts.append(f"\n## {title}\n\n| flag | variable | default | |\n|---|---|---|---|\n")
        parts += [
            f"| {_flag(name)} | `{ENV_PREFIX}{name.upper()}` | {_default(layer, name)} | {_described(layer, name)} |\n"
            for name in layer.model_fields
        ]
    for head, layer in ((HOST, HostConfig), (BENCH, BenchConfig)):
        parts.append(head)
        parts += [
            f"| {_flag(name)} | {_default(layer, name)} | {_described(layer, name)} |\n" for name in layer.model_fields
        ]
    parts.append(f"\nSpellings of `vllm bench`: {_spellings(BENCH_ALIASES)}.\n")
    parts.append(f"\nOlder spellings: {_spellings(ALIASES)}.\n")
    parts.append("\n## Accepted without effect\n\nOptions of other engines, and why they do nothing here.\n\n")
    parts += [f"- {_flag(name)}{_values(option)}: {option.reason}\n" for name, option in FOREIGN.items()]
    return "".join(parts)


def _flag(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"


def _default(layer: type[BaseModel], name: str) -> str:
    default = shown_default(layer, name)
    return f"`{default}`" if default else ""


def _described(layer: type[BaseModel], name: str) -> str:
    """Return the description of an option, and its choices."""
    description = str(layer.model_fields[name].description)
    for field, values in choices(layer, name).items():
        subject = f"{field} is one" if field else "one"
        description += f"; {subject} of {', '.join(f'`{value}`' for value in values)}"
    return description


def _values(option: Foreign) -> str:
    """Return the values that an option without effect may have."""
    return f" ({', '.join(option.values)})" if option.values else ""


def _spellings(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{_flag(spelling)} is `{name}`" for spelling, name in aliases.items())


if __name__ == "__main__":
    sys.stdout.write(page())
