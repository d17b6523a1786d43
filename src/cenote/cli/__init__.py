"""The command line: `cenote serve` starts a server, `cenote engine` runs a model for servers, `cenote bench` measures,
`cenote info` tells how a checkpoint is read.

Flags are made from the fields of `cenote.config`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import cenote
from cenote.cli import flags, lines
from cenote.errors import CenoteError
from cenote.functions import coalesce

if TYPE_CHECKING:
    from collections.abc import Callable


def main(argv: list[str] | None = None) -> int:
    """Run `cenote`, and return the exit status. Errors of the user are one line, not a traceback."""
    try:
        argv = coalesce(argv, sys.argv[1:])
        arguments = flags.parse(argv)
        return COMMANDS[arguments.pop("command")](arguments, argv)
    except CenoteError as error:
        lines.tell_end(error.message)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(arguments: dict[str, Any], _: list[str]) -> int:
    from cenote.cli import serve

    return serve.run(arguments)


def _engine(arguments: dict[str, Any], _: list[str]) -> int:
    from cenote.cli import host

    return host.run(arguments)


def _bench(arguments: dict[str, Any], argv: list[str]) -> int:
    from cenote.cli import bench

    return bench.run(arguments, argv)


def _info(arguments: dict[str, Any], _: list[str]) -> int:
    from cenote.cli import info

    return info.run(arguments)


def _version(*_: Any) -> int:
    print(cenote.__version__)
    return 0


def _help(*_: Any) -> int:
    return 0  # the parser has printed it


COMMANDS: dict[str, Callable[[dict[str, Any], list[str]], int]] = {
    "serve": _serve,
    "engine": _engine,
    "bench": _bench,
    "info": _info,
    "version": _version,
    "help": _help,
}
"""What runs for each command; modules are loaded for their own alone."""
