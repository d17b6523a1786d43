"""Tensors of a checkpoint by name, out of its safetensors files or, where that is allowed, out of pickles."""

from __future__ import annotations

import zipfile
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch

from cenote.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from torch import Tensor


ADAPTER = "adapter_model.safetensors"
"""Tensors of an adapter, which are no part of the model beside it."""


def tensor_files(folder: Path, *, allow_pickle: bool) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint, by the tensor's name.

    Raises:
        CheckpointError: a file is damaged.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == ADAPTER:
            continue
        files |= dict.fromkeys(_names(file), file)
    if files or not allow_pickle:
        return files
    for file in sorted(folder.glob("pytorch_model*.bin")):
        files |= dict.fromkeys(_pickled(file), file)
    return files


def tensors(folder: Path, names: Collection[str], *, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors called `names`."""
    from safetensors import safe_open

    files = tensor_files(folder, allow_pickle=allow_pickle)
    tensors: dict[str, Tensor] = {}
    for name in names:
        if files[name].suffix == ".safetensors":
            with safe_open(files[name], framework="pt") as opened:
                tensors[name] = opened.get_tensor(name)
        else:
            tensors[name] = _pickled(files[name])[name]
    return tensors


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
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"cannot read {file.name}: {first_line(error)}") from error
    return weights
