"""Paths that a checkpoint names, which may not lead out of its folder.

Files of a repository of the hub are links into the folder `blobs` of its entry in the cache, so there the whole entry
counts.
"""

from __future__ import annotations

import os
from pathlib import Path

from cenote.errors import CheckpointError

DEPTH = 3
"""Folders in folders that are looked at."""


def inside(root: Path, name: str, source: str) -> Path:
    """Return the path of `name` in the folder `root`.

    Args:
        root: of the checkpoint, or of a part of it.
        name: as a file of the checkpoint has it.
        source: the name of that file, for messages.

    Raises:
        CheckpointError: it leads out of the folder.
    """
    path = root / name
    if not _is_inside(path, _bound(root)):
        raise CheckpointError(
            f"{source} of {root.name} names {name!r}, which lies outside of the checkpoint's folder, and only files "
            "inside are read; copy it there"
        )
    return path


def check_links(root: Path) -> None:
    """Refuse a folder with a link that leads out of it.

    Raises:
        CheckpointError: it has one.
    """
    bound = _bound(root)
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not _is_inside(path, bound):
                raise CheckpointError(
                    f"{path.relative_to(root)} of {root.name} is a link that leads out of the checkpoint's folder, and "
                    "only files inside are read; put the file itself there (cp -rL copies a folder without links)"
                )
        if len(Path(place).relative_to(root).parts) == DEPTH:
            folders.clear()


def check_snapshot(folder: Path, name: str) -> None:
    """Refuse a folder that does not lie in the entry of the hub's cache for the repository `name`.

    Raises:
        CheckpointError: the entry is damaged.
    """
    if folder.resolve().parent.parent.name != f"models--{name.replace('/', '--')}":
        raise CheckpointError(
            f"the entry of {name!r} in the hub's cache leads to a folder outside of it; delete the entry, and download "
            "it again"
        )


def _is_inside(path: Path, bound: Path) -> bool:
    try:
        return path.resolve().is_relative_to(bound)
    except (OSError, RuntimeError, ValueError):  # links in a circle, a path with NUL
        return False


def _bound(root: Path) -> Path:
    """Return the folder that no path may leave: `root`, or the entry of the hub's cache that it lies in."""
    resolved = root.resolve()
    for place in resolved.parents:
        if place.name == "snapshots" and (place.parent / "blobs").is_dir():
            return place.parent
    return resolved
