"""`python -m clients.full`: a server whose queue is full and whose bodies are bounded, for the messages of both."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from typing import Any

import uvicorn
from transformers import AutoTokenizer

from cenote.config import ServerConfig
from cenote.engine.fake import FAKE_INFO, FakeEngine
from cenote.errors import Overloaded
from cenote.models.hub import embedded
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.app import build

INFO = replace(
    FAKE_INFO,
    tasks=("embed", "token_embed", "classify"),
    vocab_size=30_522,
    num_labels=1,
    labels=("LABEL_0",),
    score_types=("bi-encoder",),
    reward="classify",
)
"""Of every route that a model may have."""
MOST_BYTES = 2000
"""Of a body."""


class Full(FakeEngine):
    """An engine that takes nothing."""

    def submit(self, *arguments: Any, **options: Any) -> Any:
        """Refuse.

        Raises:
            Overloaded: always.
        """
        raise Overloaded("16384 sequences wait already", retry_after=1)


def main() -> None:
    """Serve on a free port, and tell its URL as `cenote serve` does."""
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    service = Service(Full(INFO), Renderer(tokenizer, INFO), ("minilm",))
    app = build([service], ServerConfig(max_body_bytes=MOST_BYTES, any_model_name=True))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"serving http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
