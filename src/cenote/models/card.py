"""The model card of a checkpoint: its title, by which some models are known, and its tags.

A card is text for people, of any size, with metadata of many kinds; a fault in it is not a fault of the model. Only the
block of its tags is parsed, as a list of texts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 4 << 20
"""Bytes of a card that are read; results of benchmarks in the metadata of some take several hundred KiB."""

LARGEST_TAGS = 1 << 14
"""Maximum characters of the block of tags."""

TAGS = re.compile(r"^tags:.*\n(?:[ \t-].*\n|\n)*", re.MULTILINE)
"""The block of tags: its key, and the lines up to the next key."""

HEADING = re.compile(r"^# (.*)$", re.MULTILINE)


def title(path: Path) -> list[str]:
    """Return the first heading of the model card, if there is one."""
    headings = HEADING.findall(_card(path))[:1]
    return [heading.lstrip("# ").strip() for heading in headings]


def tags(path: Path) -> list[str]:
    """Return the tags of the model card, if it has any; a damaged card has none."""
    import yaml

    text = _card(path)
    if not text.startswith("---"):
        return []
    block = TAGS.search(text.split("\n---", 1)[0] + "\n")
    if block is None or len(block[0]) > LARGEST_TAGS:
        return []
    try:
        # Nodes, which have no values yet: dates are texts, and aliases are not followed.
        root = yaml.compose(block[0], Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return []
    return _entries(root)


def _entries(root: object) -> list[str]:
    """Return the texts of a list that is the only value of a mapping; none if it is something else."""
    import yaml

    if not isinstance(root, yaml.MappingNode) or len(root.value) != 1:
        return []
    tags = root.value[0][1]
    if not isinstance(tags, yaml.SequenceNode):
        return []
    return [str(tag.value) for tag in tags.value if isinstance(tag, yaml.ScalarNode)]


def _card(path: Path) -> str:
    """Return the text of the model card, empty if there is none."""
    card = path / "README.md"
    if not card.is_file():
        return ""
    with card.open("rb") as file:
        return file.read(LARGEST).decode("utf-8", errors="replace").replace("\r\n", "\n")
