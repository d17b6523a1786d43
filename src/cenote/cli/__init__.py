"""The command line: `cenote serve` starts a server, `cenote engine` runs a model for servers, `cenote bench` measures,
`cenote info` tells how a checkpoint is read.

Flags are made from the fields of `cenote.config`.
"""

from __future__ import annotations

import sys

from cenote.cli import flags, lines
from cenote.errors import CenoteError
from cenote.functions import coalesce


def main(argv: list[str] | None = None) -> int:
    """Run `cenote`, and return the exit status. Errors of the user are one line, not a traceback."""
    try:
        argv = coalesce(argv, sys.argv[1:])
        arguments = flags.parse(argv)
        if arguments["command"] == "bench":
            from cenote.cli import bench

            return bench.run(arguments, argv)
        if arguments["command"] == "engine":
            from cenote.cli import host

            return host.run(arguments)
        if arguments["command"] == "info":
            from cenote.cli import info

            return info.run(arguments)
        from cenote.cli import serve

        return serve.run(arguments)
    except CenoteError as error:
        lines.tell_end(error.message)
        return 2
    except KeyboardInterrupt:
        return 130
