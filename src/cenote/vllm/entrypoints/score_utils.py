"""Queries and documents with pictures."""

from __future__ import annotations

from typing import Any, TypedDict


class ScoreMultiModalParam(TypedDict):
    """A query or document of `LLM.score`: the content parts of one message."""

    content: list[dict[str, Any]]
