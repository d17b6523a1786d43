"""Checkpoints that are adapters: the model that they change, which may lie beside them or be named by them.

An adapter in the folder of a backbone is part of the model. Where no weights lie beside it, `adapter_config.json` names
the base, which may be an adapter of another in turn.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cenote.errors import CheckpointError, first_line
from cenote.models import lora, lora_changes
from cenote.models.inside import inside
from cenote.models.lora import CONFIG, SUFFIXES
from cenote.models.reading import about, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig

    from cenote.models.audit import Audit
    from cenote.models.lora import Adapter

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spiece*", "bpe.codes", "merges.txt")
"""Patterns of a tokenizer's files, one of which a folder with a tokenizer has."""


@dataclass(frozen=True)
class Base:
    """The model that adapters change.

    Attributes:
        path: its folder, with the files of Sentence-Transformers.
        folder: its backbone's folder, with the weights.
        adapters: those that change it, in the order in which they do; empty = it is a model by itself.
    """

    path: Path
    folder: Path
    adapters: tuple[Adapter, ...] = ()

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: of the last adapter that has one, else of the model."""
        return self._last_with(TOKENIZERS)

    @property
    def config(self) -> Path:
        """The folder of the config: of the last adapter that has one, else of the model."""
        return self._last_with(("config.json",))

    def _last_with(self, patterns: tuple[str, ...]) -> Path:
        """Return the folder of the last adapter with a file of one of `patterns`, else of the model."""
        for adapter in reversed(self.adapters):
            if any(chain.from_iterable(map(adapter.folder.glob, patterns))):
                return adapter.folder
        return self.folder


def resolve(path: Path, folder: Path, audit: Audit, locate: Callable[[str, str | None], Path]) -> Base:
    """Return the model whose weights a checkpoint runs with, and the adapters that change it for good.

    Args:
        path: folder of the checkpoint.
        folder: folder of its backbone.
        audit: gets the settings of the adapters.
        locate: returns the folder of a base, by its name and revision.

    Raises:
        CheckpointError: a base is not named, is not there, or is an adapter of itself; or see `lora.read`.
    """
    if (path / CONFIG).is_file() and not (folder / CONFIG).is_file():
        remedy = f"the backbone is in {folder.name}, and Transformers reads an adapter there; move it"
        audit.refuse(CONFIG, [CONFIG], remedy, noun="the file")
    root = path
    adapters: list[Adapter] = []
    seen: set[Path] = set()
    while (folder / CONFIG).is_file():
        is_whole = _has_weights(folder)
        place = "" if folder == root else f"{folder.name}/"
        adapter = lora.read(folder.resolve().name, folder, audit, place=place, applies=not is_whole)
        adapters.insert(0, adapter)
        if is_whole:
            break
        seen.add(folder.resolve())
        path = _located(adapter, locate)
        folder = _backbone(path)
        if folder.resolve() in seen:
            raise adapter.fault(f"has the base_model_name_or_path {str(path)!r}, which is an adapter of it")
    return Base(path, folder, tuple(adapters))


def _located(adapter: Adapter, locate: Callable[[str, str | None], Path]) -> Path:
    """Return the folder of the model that `adapter` changes."""
    base, revision = adapter.settings.base_model_name_or_path, adapter.settings.revision
    if not base:
        raise adapter.fault(
            f"lies in a folder without weights, and its {CONFIG} names no base_model_name_or_path; write the folder "
            "or hub id of the model that was trained there"
        )
    try:
        return locate(base, revision)
    except CheckpointError as error:
        raise adapter.fault(
            f"lies in a folder without weights, and its base_model_name_or_path is not there: {first_line(error)}; "
            f"correct it in {CONFIG}, or serve the base and the adapter with --lora-modules"
        ) from error


def _backbone(path: Path) -> Path:
    """Return the folder of the backbone of the checkpoint at `path`, which may be one of Sentence-Transformers."""
    file = path / "modules.json"
    if not file.is_file():
        return path
    entries = read_json(file)
    with about(file):
        return inside(path, str(entries[0]["path"]), file.name)


def _has_weights(folder: Path) -> bool:
    """Return whether a whole model lies beside the adapter in `folder`."""
    weights = {*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")} - {folder / lora.WEIGHTS}
    return (folder / "config.json").is_file() and bool(weights)


def keep_code(config: PretrainedConfig, base: Base) -> None:
    """Let the Python code that a config names be found beside that config, where the weights lie elsewhere."""
    if base.config == base.folder:
        return
    classes = getattr(config, "auto_map", None) or {}
    for name, reference in classes.items():
        if isinstance(reference, str) and "--" not in reference:
            classes[name] = f"{base.config}--{reference}"


def adapt_config(config: PretrainedConfig, adapters: tuple[Adapter, ...]) -> None:
    """Set the class and the labels of a model whose head adapters bring.

    Raises:
        CheckpointError: Transformers has no such class for the model.
    """
    from transformers.models.auto import modeling_auto

    names = {
        "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    for adapter in adapters:
        task = adapter.settings.task_type
        shapes = lora_changes.trained_heads(adapter)
        if not shapes:
            continue
        architecture = config.architectures[0] if config.architectures else ""
        if not architecture.endswith(SUFFIXES[task]):
            architecture = names[task].get(config.model_type, "")
        if not architecture:
            raise adapter.fault(f"has the task {task}, for which Transformers has no {config.model_type} model")
        config.architectures = [architecture]
        labels = {shape[0] for key, shape in shapes.items() if key.endswith(LAST)}
        if len(labels) == 1:
            config.num_labels = labels.pop()


LAST = ("score.weight", "classifier.weight", "out_proj.weight")
"""Ends of the names of matrices whose rows are labels; heads of several layers have one of them."""


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """Show `folder` without its adapter, which Transformers would apply once more where PEFT is installed."""
    if not (folder / CONFIG).is_file():
        yield folder
        return
    with TemporaryDirectory(prefix="cenote-") as place:
        folder = folder.resolve()
        shown = Path(place) / folder.name
        shutil.copytree(folder, shown, copy_function=os.symlink, ignore=shutil.ignore_patterns("adapter_*"))
        yield shown
