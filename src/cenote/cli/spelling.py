"""Flags as vLLM takes them, in the one spelling that the parser knows: dashes, long names, fields of JSON objects.

Each function takes arguments and returns those that are left for the parser.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.errors import ConfigError
from cenote.foreign import FOREIGN

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-asc": "--api-server-count",
    "-q": "--quantization",
    "-O": "--optimization-level",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
}
"""Short flags of vLLM."""
_LEVEL = re.compile(r"-O(?P<level>\d)")
NO = "no_"
_NUMBER = re.compile(r"-\d+(\.\d+)?")


class _Flag(NamedTuple):
    """A flag out of one argument.

    Attributes:
        name: with its dashes, without fields of an object.
        fields: after the first dot, as written.
        value: after the equals sign; `None` = there is none.
    """

    name: str
    fields: str
    value: str | None

    @classmethod
    def of(cls, argument: str) -> _Flag:
        """Return the flag of an argument; its name is empty if it is not one."""
        if not argument.startswith("-"):
            return cls("", "", None)
        flag, equals, value = argument.partition("=")
        name, _, fields = flag.partition(".")
        return cls(name, fields, value if equals else None)

    @property
    def option(self) -> str:
        """Name of the option that a flag sets."""
        return self.name.removeprefix("--").replace("-", "_")

    def __str__(self) -> str:
        text = f"{self.name}.{self.fields}" if self.fields else self.name
        return text if self.value is None else f"{text}={self.value}"


def dashed(argv: Iterable[str]) -> list[str]:
    """Return arguments with dashes for the underscores of flags, and long names for short ones.

    Names of fields, after a dot, stay as they are.
    """
    return list(map(_dashed, argv))


def _dashed(argument: str) -> str:
    level = _LEVEL.fullmatch(argument)
    if level:
        return f"{SHORT['-O']}={level['level']}"
    flag = _Flag.of(argument)
    name = SHORT.get(flag.name, flag.name)
    if not name.startswith("--"):
        return argument
    return str(flag._replace(name=name.replace("_", "-")))


class _Rest:
    """Arguments that are still to be read."""

    def __init__(self, argv: Iterable[str]) -> None:
        self._left = list(reversed(list(argv)))

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self) -> str:
        """Return the next argument."""
        return self._left.pop()

    def value(self) -> str | None:
        """Return the next argument if it is a value, not a flag."""
        if not self._left:
            return None
        is_flag = self._left[-1].startswith("-") and not _NUMBER.fullmatch(self._left[-1])
        return None if is_flag else self._left.pop()


def take_foreign(argv: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Return arguments without the flags of other engines that have no effect here, and the values of those options.

    `cenote.settings.resolve` says why they have none.
    """
    rest = _Rest(argv)
    kept: list[str] = []
    taken: dict[str, Any] = {}
    while rest:
        argument = rest.take()
        flag = _Flag.of(argument)
        option = FOREIGN.get(flag.option)
        if _is_switched_off(flag):
            taken[flag.option.removeprefix(NO)] = False
        elif option is None:
            kept.append(argument)
        elif flag.value is not None:
            taken[flag.option] = flag.value
        elif option.is_switch:
            taken[flag.option] = True
        else:
            taken[flag.option] = rest.value() or ""
    return kept, taken


def _is_switched_off(flag: _Flag) -> bool:
    """Return whether a flag is the form with `--no-` of a switch without effect."""
    option = FOREIGN.get(flag.option.removeprefix(NO))
    return flag.option.startswith(NO) and option is not None and option.is_switch


def take_fields(argv: Iterable[str], objects: Collection[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return arguments without each `--option.field value`, and the fields of each option.

    Dots lead into objects of objects, and a plus at the end appends to a list. Values are JSON, or else text.

    Args:
        argv: the arguments, dashed.
        objects: names of options that are JSON objects.

    Raises:
        ConfigError: a field has no value, or lies within one that is not an object.
    """
    rest = _Rest(argv)
    kept: list[str] = []
    taken: dict[str, dict[str, Any]] = {}
    while rest:
        argument = rest.take()
        flag = _Flag.of(argument)
        if not flag.fields or flag.option not in objects:
            kept.append(argument)
            continue
        value = rest.value() if flag.value is None else flag.value
        if value is None:
            raise ConfigError(f"{argument}: expected one argument")
        _put(taken.setdefault(flag.option, {}), flag, _content(value))
    return kept, taken


def _content(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _put(fields: dict[str, Any], flag: _Flag, value: Any) -> None:
    *parents, last = flag.fields.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{flag.name}.{flag.fields}: {parent!r} has a value already, {fields!r}, and no fields")
    if not last.endswith("+"):
        fields[last] = value
        return
    values = fields.setdefault(last.removesuffix("+"), [])
    if not isinstance(values, list):
        raise ConfigError(f"{flag.name}.{flag.fields}: {last.removesuffix('+')!r} appends to a list, got {values!r}")
    values.append(value)


def merged(content: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return an object with fields put in; objects in both are merged."""
    result = {**content}
    for name, value in fields.items():
        below = result.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            value = merged(below, value)
        result[name] = value
    return result
