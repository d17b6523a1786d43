"""Fields of requests that have no effect, and why. `python -m cenote.server.unread` prints the table of the docs."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple


class Unread(NamedTuple):
    """A field that clients send, and that changes nothing.

    Attributes:
        field: its name, behind that of the object that holds it.
        value: as its clients send it.
        clients: the services and programs that have it.
        reason: why nothing comes of it.
    """

    field: str
    value: Any
    clients: str
    reason: str


UNREAD = (
    Unread("user", "someone", "OpenAI, Dify", "users are not told apart"),
    Unread("drop_params", True, "LiteLLM, RAGFlow", "an order to LiteLLM itself"),
    Unread(
        "enable_thinking",
        False,
        "Qwen's templates",
        "nothing is generated; a template reads it in `chat_template_kwargs`",
    ),
    Unread("options", {"wait_for_model": True}, "the hub, Ollama", "models are loaded when the server starts"),
    Unread("keep_alive", "5m", "Ollama", "models stay loaded"),
    Unread("max_chunks_per_doc", 10, "Cohere, SiliconFlow", "documents are read in one piece, and cut at its end"),
    Unread("overlap_tokens", 80, "SiliconFlow", "documents are read in one piece, so no two pieces overlap"),
    Unread("dims", 384, "Weaviate", "a checkpoint says how long vectors are"),
    Unread("vector", [], "Weaviate", "its client sends the form of an answer, unfilled"),
    Unread("error", "", "Weaviate", "its client sends the form of an answer, unfilled"),
    Unread("config.pooling_strategy", "masked_mean", "Weaviate", "a checkpoint says how it is pooled"),
)
BEGIN, END = "<!-- fields without effect -->", "<!-- end of fields -->"
"""Comments around the table in docs/dialects.md."""


def section() -> str:
    """Return the table, as Markdown, between its comments."""
    rows = [f"| `{row.field}` | {row.clients} | {row.reason} |" for row in UNREAD]
    return "\n".join([BEGIN, "", "| field | sent by | |", "|---|---|---|", *rows, "", END])


if __name__ == "__main__":
    sys.stdout.write(f"{section()}\n")
