"""The model card of a checkpoint: its title, by which some models are known, and its tags."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def title(path: Path) -> list[str]:
    """Return the first heading of the model card, if there is one."""
    headings = [line for line in _card(path).splitlines() if line.startswith("# ")]
    return [line.lstrip("# ").strip() for line in headings[:1]]


def tags(path: Path) -> list[str]:
    """Return the tags of the model card, if it has any; a damaged card has none."""
    import yaml

    text = _card(path)
    if not text.startswith("---"):
        return []
    try:
        head = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return []
    match head:
        case {"tags": [*tags]}:
            return [str(tag) for tag in tags]
    return []


def _card(path: Path) -> str:
    """Return the text of the model card, empty if there is none."""
    card = path / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
