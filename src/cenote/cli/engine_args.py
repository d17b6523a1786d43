"""The arguments of `LLM` as flags of a script of yours, in vLLM's spelling: `EngineArgs` and its parser."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import field, fields, make_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from cenote.cli import flags
from cenote.cli.spelling import SHORT, dashed, take_fields
from cenote.config import EngineConfig, ModelConfig
from cenote.foreign import FOREIGN
from cenote.option_values import parse_count
from cenote.settings import ALIASES, OFFLINE, kinds_of, known_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

P = TypeVar("P", bound=argparse.ArgumentParser)

LAYERS = (ModelConfig, EngineConfig)


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser that takes flags as vLLM does: with underscores, and `--option.field value` for options that are JSON.

    A flag that is added later replaces an earlier one of its name.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"conflict_handler": "resolve", **options})

    def parse_known_args(  # type: ignore[override] # as argparse, which has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the values of known flags, and the arguments that are left."""
        if args is None:
            args = sys.argv[1:]
        actions = self._option_string_actions
        argv = [argument if argument.partition("=")[0] in actions else dashed([argument])[0] for argument in args]
        names = {flag.removeprefix("--").replace("-", "_") for flag in actions if flag.startswith("--")}
        argv, objects = take_fields(argv, names)
        argv += [f"--{name.replace('_', '-')}={json.dumps(content)}" for name, content in objects.items()]
        return super().parse_known_args(argv, namespace)


class _Arguments:
    """Functions of `EngineArgs`."""

    @staticmethod
    def add_cli_args(parser: P) -> P:
        """Add a flag for each argument, and return the parser."""
        group = parser.add_argument_group("engine", "arguments of LLM")
        for layer in LAYERS:
            for name in layer.model_fields:
                action = flags.add_flag(group, layer, name, ALIASES)
                if int in kinds_of(layer.model_fields[name].annotation):
                    action.type = _whole
        for name, option in FOREIGN.items():
            spellings = [*(short for short, long in SHORT.items() if long == flags.flag_of(name)), flags.flag_of(name)]
            action_of = argparse.BooleanOptionalAction if option.is_switch else "store"
            group.add_argument(
                *spellings, dest=name, action=action_of, default=None, help=f"no effect: {option.reason}"
            )
        parser.set_defaults(**_defaults())
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Return the arguments among the values of flags."""
        values = vars(args)
        names = [entry.name for entry in fields(cls)]  # type: ignore[arg-type] # the subclass is a dataclass
        return cls(**{name: values[name] for name in names if name in values})


def _whole(value: str) -> Any:
    """Return a whole number, or a word that stands for one, as `auto`."""
    number = parse_count(value)
    return int(number) if str(number).lstrip("-").isdigit() else value


def _defaults() -> dict[str, Any]:
    """Return the default of each argument; `None` for those of other engines."""
    owners = known_options(LAYERS)
    defaults = {name: layer.model_fields[name].get_default(call_default_factory=True) for name, layer in owners.items()}
    lists = {name: list(value) for name, value in defaults.items() if isinstance(value, tuple)}
    return {**defaults, **lists, **dict.fromkeys(FOREIGN), **OFFLINE}


def _default_of(name: str) -> Any:
    return _defaults()[name]


EngineArgs = make_dataclass(
    "EngineArgs",
    [(name, Any, field(default_factory=partial(_default_of, name))) for name in _defaults()],
    bases=(_Arguments,),
    namespace={"__module__": __name__},
)
EngineArgs.__doc__ = """The arguments of `LLM`, options of other engines without effect among them.

`LLM(**dataclasses.asdict(EngineArgs(model="intfloat/e5-small")))` is `LLM(model="intfloat/e5-small")`.
"""
