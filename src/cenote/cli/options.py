"""Writes the page of all options: `python -m cenote.cli.options > docs/options.md`. A test compares the two."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cenote.config import (
    ALIASES,
    BENCH_ALIASES,
    ENV_PREFIX,
    EXPLAINED,
    LAYERS,
    BenchConfig,
    HostConfig,
    PoolerConfig,
    choices,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

HEAD = """# Options

Every option is a flag of `cenote serve`, a variable of the environment and an entry of the `--config` file; those of
the model and the engine are also keyword arguments of `LLM`. Flags win over variables, variables over the file.
Unknown names are errors. This page is made by `python -m cenote.cli.options`.
"""

HOST = """
## Engine in a process of its own

What `cenote engine` takes besides the options of the model and the engine, as flags and in its `--config` file. Entries
and variables of the server's have no effect.

| flag | default | |
|---|---|---|
"""

BENCH = """
## Bench

What `cenote bench` takes besides the options of the model and the engine, as flags and in its `--config` file; there
are no variables. Entries of the server's in the same file have no effect.

| flag | default | |
|---|---|---|
"""


def page() -> str:
    """The page, as Markdown."""
    parts = [HEAD]
    for layer in LAYERS:
        parts.append(
            f"\n## {layer.__name__.removesuffix('Config')}\n\n| flag | variable | default | |\n|---|---|---|---|\n"
        )
        for name, field in layer.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = "" if default in (None, ()) or isinstance(default, PoolerConfig) else f"`{default}`"
            flag, variable = "--" + name.replace("_", "-"), ENV_PREFIX + name.upper()
            parts.append(f"| `{flag}` | `{variable}` | {shown} | {_described(layer, name)} |\n")
    for head, layer in ((HOST, HostConfig), (BENCH, BenchConfig)):
        parts.append(head)
        for name, field in layer.model_fields.items():
            default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            shown = "" if default in (None, "") else f"`{default}`"
            parts.append(f"| `--{name.replace('_', '-')}` | {shown} | {_described(layer, name)} |\n")
    spellings = ", ".join(f"`--{a.replace('_', '-')}` is `{n}`" for a, n in BENCH_ALIASES.items())
    parts.append(f"\nSpellings of `vllm bench`: {spellings}.\n")
    parts.append("\nOlder spellings: " + ", ".join(f"`--{a.replace('_', '-')}` is `{n}`" for a, n in ALIASES.items()))
    parts.append(".\n\n## Accepted without effect\n\nOptions of other engines, and why they do nothing here.\n\n")
    parts += [f"- `--{name.replace('_', '-')}`: {why}\n" for name, why in EXPLAINED.items()]
    return "".join(parts)


def _described(layer: type[BaseModel], name: str) -> str:
    """What an option is, and the values that it may have."""
    values = ", ".join(f"`{value}`" for value in choices(layer, name))
    return f"{layer.model_fields[name].description}{values and f'; one of {values}'}"


if __name__ == "__main__":
    sys.stdout.write(page())
