"""Tensors of a checkpoint by name, out of its safetensors files or, where there are none, out of pickles.

The files are those that Transformers reads, in its order; any other file beside them is not the model's. Pickles are
read by torch's restricted unpickler, which takes tensors out of them and runs no code in them.
"""

from __future__ import annotations

import json
import zipfile
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch

from cenote.errors import CheckpointError, first_line
from cenote.models.inside import inside

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from torch import Tensor

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = ".index.json"


def model_files(folder: Path, *, pickles: bool) -> tuple[str, ...]:
    """Return the names of the files that hold the weights of the model in `folder`; empty if there are none.

    Args:
        folder: of the model.
        pickles: look for pickles where there is no safetensors file.

    Raises:
        CheckpointError: an index is damaged, or names a file that is not there.
    """
    for name in (SAFETENSORS, PICKLE) if pickles else (SAFETENSORS,):
        if (folder / name).is_file():
            return (name,)
        if (folder / f"{name}{INDEX}").is_file():
            return _indexed(folder / f"{name}{INDEX}")
    return ()


def tensor_files(folder: Path, *, pickles: bool) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint, by the tensor's name.

    Raises:
        CheckpointError: a file is damaged.
    """
    files: dict[str, Path] = {}
    for name in model_files(folder, pickles=pickles):
        file = folder / name
        files |= dict.fromkeys(_names(file) if file.suffix == ".safetensors" else _pickled(file), file)
    return files


def tensors(folder: Path, names: Collection[str], *, pickles: bool) -> dict[str, Tensor]:
    """Return the tensors called `names`."""
    from safetensors import safe_open

    files = tensor_files(folder, pickles=pickles)
    tensors: dict[str, Tensor] = {}
    for name in names:
        if files[name].suffix == ".safetensors":
            with safe_open(files[name], framework="pt") as opened:
                tensors[name] = opened.get_tensor(name)
        else:
            tensors[name] = _pickled(files[name])[name]
    return tensors


def _indexed(index: Path) -> tuple[str, ...]:
    """Return the files that an index names.

    Raises:
        CheckpointError: it is damaged, or one of them is not there.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {index.name} of {index.parent.name}: {first_line(error)}") from error
    for name in names:
        if not inside(index.parent, name, index.name).is_file():
            raise CheckpointError(f"{index.parent.name} lacks {name}, which {index.name} names; download it again")
    return tuple(names)


def read(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file or a pickle.

    Raises:
        CheckpointError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        return _pickled(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file.name} of {file.parent.name}: {first_line(error)}") from error


def _names(file: Path) -> list[str]:
    """Return the names of the tensors of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file.name} of {file.parent.name}: {first_line(error)}") from error


def _pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, without running code in it; read when they are used, if its format allows."""
    try:
        weights: dict[str, Tensor] = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            f"cannot read {file.name} of {file.parent.name}: torch's restricted unpickler, which runs no code, refuses "
            f"it: {first_line(error)}"
        ) from error
    return weights
