"""Prompts, as the mappings that `LLM` takes."""

from __future__ import annotations

from typing import Any, TypedDict


class _Pictures(TypedDict, total=False):
    """Fields that every prompt may have."""

    multi_modal_data: dict[str, Any]
    mm_processor_kwargs: dict[str, Any]


class TextPrompt(_Pictures):
    """A text, with the pictures that stand in it."""

    prompt: str


class TokensPrompt(_Pictures):
    """Token ids."""

    prompt_token_ids: list[int]
