"""`cenote serve` with an engine that leaks: what `benchmarks.soak` must not let pass.

    python -m benchmarks.leaking memory | time [flags of cenote serve]

The engine is a wrapper around the real one, by the protocol `cenote.core.Engine`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from cenote.cli import main as cenote
from cenote.core import Engine, Output, Sequence
from cenote.pipeline.pipeline import Service

KEPT = 4096
"""Bytes that are kept of each text where memory leaks."""


class Leaking:
    """An engine that keeps something of everything.

    Args:
        engine: does the work.
        kind: `memory` keeps bytes of each text, `time` looks at all earlier requests for each one.
    """

    def __init__(self, engine: Engine, kind: str) -> None:
        self.info = engine.info
        self._engine = engine
        self._kind = kind
        self._kept: list[bytes] = []
        self._lengths: list[list[int]] = []

    @property
    def fault(self) -> str:
        """See `cenote.core.Engine.fault`."""
        return self._engine.fault

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`."""
        if self._kind == "memory":
            self._kept += [os.urandom(KEPT) for _ in sequences]
        else:
            self._lengths.append([len(sequence) for sequence in sequences])
            for lengths in self._lengths:
                str(lengths)
        return self._engine.submit(sequences, progress=progress)

    def healthy(self) -> bool:
        """See `cenote.core.Engine.healthy`."""
        return self._engine.healthy()

    def close(self) -> None:
        """See `cenote.core.Engine.close`."""
        self._engine.close()


def main() -> int:
    """Serve, and return the exit status."""
    kind, *flags = sys.argv[1:]
    opened = Service.open

    def leaking(*args: Any, **options: Any) -> Service:
        service = opened(*args, **options)
        return replace(service, engine=Leaking(service.engine, kind))

    Service.open = leaking  # type: ignore[method-assign,assignment]
    return cenote(["serve", *flags])


if __name__ == "__main__":
    sys.exit(main())
