"""Vectors on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SHOWN = 4
"""Numbers of a vector that are shown."""


def print_embeddings(embeds: Sequence[float], prefix: str = "Embeddings") -> None:
    """Print the first numbers of a vector, or of rows, and how many there are."""
    rest = "" if len(embeds) <= SHOWN else ", ..."
    shown = ", ".join(map(str, embeds[:SHOWN]))
    print(f"{prefix}: [{shown}{rest}] (size={len(embeds)})")
