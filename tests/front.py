"""`cenote serve` that says with every answer whether it has imported torch: `python -m tests.front FLAGS`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from cenote.cli import main
from cenote.server import app

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-modules"
HEAVY = ("torch", "cenote.models", "cenote.engine.engine", "safetensors")
"""Modules that a server in front of an engine has no use for."""


class Watched:
    """Adds the header to every answer, after the route has run."""

    def __init__(self, app: ASGIApp) -> None:
        self.inner = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = ",".join(name for name in HEAVY if name in sys.modules)
                message["headers"] = [*message["headers"], (HEADER.encode(), found.encode())]
            await send(message)

        await self.inner(scope, receive, told if scope["type"] == "http" else send)


def watched(*arguments: Any) -> FastAPI:
    """The server's application, with the header."""
    built = build(*arguments)
    built.add_middleware(Watched)
    return built


if __name__ == "__main__":
    build = app.build
    app.build = watched
    sys.exit(main(["serve", *sys.argv[1:]]))
