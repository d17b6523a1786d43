"""Task adapters: low-rank changes of a model's layers (LoRA, as PEFT saves it), one of which a sequence may choose.

Subfolders with an `adapter_config.json` hold them, and `lora_modules` names others. `cenote.models.passes.shelf` has
the way in which they run.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from cenote.conventions import plain_name
from cenote.errors import CheckpointError
from cenote.models import lora
from cenote.models.lora import CONFIG
from cenote.models.passes.shelf import NAME, Shelf
from cenote.models.passes.subject import Outcome
from cenote.models.probe import fault_of, shortened_windows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Sequence as Seq
    from pathlib import Path

    from cenote.models.audit import Audit
    from cenote.models.lora import Adapter
    from cenote.models.passes.subject import Subject

CHECKPOINT = re.compile(r"checkpoint-\d+")
LEFT_BY_TRAINING = ("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt")
"""Files that a folder has because training was to go on from it."""


def apply(subject: Subject) -> Outcome:
    """Hook the adapters in, and prove that the backbone without an active one is unchanged.

    Raises:
        CheckpointError: an adapter does not fit, or is of a kind that is not understood.
    """
    model, settings = subject.backbone, subject.settings
    if not settings.adapters and not settings.reserves_adapters:
        return Outcome()
    shelf = Shelf(subject.full, model, subject.patches)
    if settings.reserves_adapters:
        shelf.reserve()
    for name in sorted(settings.adapters):
        shelf.add(settings.adapters[name], settings.audit)
    with shortened_windows(model):
        fault = fault_of(partial(subject.probe.fault, subject.layout))
    if fault:
        raise CheckpointError(f"{type(model).__name__} with adapters, of which none is active: {fault}")
    subject.shelf = shelf
    return Outcome()


def undo(subject: Subject) -> None:
    """Take the adapters away."""
    subject.patches.remove(NAME)
    subject.shelf = None


def find(folders: Iterable[Path], audit: Audit) -> dict[str, Path]:
    """Find the adapters below `folders` and below their `adapters`, and return the folder of each by its name.

    Leftovers of training are none, nor are folders that the user lets go unread.

    Raises:
        CheckpointError: two have names that requests could not tell apart.
    """
    paths: dict[str, Path] = {}
    names: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        for file in sorted([*folder.glob(f"*/{CONFIG}"), *folder.glob(f"adapters/*/{CONFIG}")]):
            name = file.parent.name
            if _is_left_out(name, file.parent, audit):
                continue
            same = names.setdefault(plain_name(name), name)
            if paths.setdefault(same, file.parent) != file.parent:
                raise CheckpointError(f"the adapters {same!r} and {name!r} have the same name")
    return paths


def _is_left_out(name: str, folder: Path, audit: Audit) -> bool:
    """Return whether a folder is none of the model's adapters, and enter why."""
    if CHECKPOINT.fullmatch(name) or any((folder / file).exists() for file in LEFT_BY_TRAINING):
        audit.leave(f"{name}/", [CONFIG], "training left it behind, and it is not one of the model's adapters")
        return True
    if audit.allows(f"{name}/", name):
        audit.leave(f"{name}/", [CONFIG], "allowed to go unread")
        return True
    return False


def chosen(
    folders: Iterable[Path], modules: Mapping[str, Path], audit: Audit, merged: Seq[Adapter] = ()
) -> dict[str, Adapter]:
    """Return the adapters that requests may choose, by name: those in `folders`, and `modules`.

    Args:
        folders: see `find`.
        modules: folders of adapters that the user names.
        audit: gets their settings.
        merged: adapters that are part of the model already.

    Raises:
        CheckpointError: an adapter is not understood, or two have one name.
    """
    applied = {adapter.folder.resolve() for adapter in merged}
    paths = {name: path for name, path in find(folders, audit).items() if path.resolve() not in applied}
    if merged:
        remedy = "it changes the base, and the model here is the base with another adapter"
        for name in paths:
            audit.refuse(f"{name}/", [CONFIG], remedy, noun="the file")
        paths = {}
    same = sorted(paths.keys() & modules.keys())
    if same:
        raise CheckpointError(f"lora_modules has the name {same[0]!r}, which is that of an adapter of the model")
    return {name: lora.read(name, path, audit, place=f"{name}/") for name, path in (paths | dict(modules)).items()}
