"""`cenote serve` that says with every answer whether it has imported torch: `python -m tests.front FLAGS`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from cenote.cli import main
from cenote.server import app

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from cenote.server.app import Application

HEADER = "x-modules"
HEAVY = ("torch", "cenote.models", "cenote.engine.engine", "safetensors")
"""Modules that a server in front of an engine has no use for."""


class Watched:
    """Adds the header to every answer, after the route has run."""

    def __init__(self, inner: Application) -> None:
        self.inner = inner
        self.under_way = inner.under_way

    @property
    def fault(self) -> str:
        return self.inner.fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = ",".join(name for name in HEAVY if name in sys.modules)
                message["headers"] = [*message["headers"], (HEADER.encode(), found.encode())]
            await send(message)

        await self.inner(scope, receive, told if scope["type"] == "http" else send)


def watched(*arguments: Any) -> Watched:
    """The server's application, with the header."""
    return Watched(build(*arguments))


if __name__ == "__main__":
    build = app.build
    app.build = watched  # type: ignore[assignment]
    sys.exit(main(["serve", *sys.argv[1:]]))
