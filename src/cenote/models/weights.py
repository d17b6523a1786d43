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


def tensor_files(folder: Path, *, allow_pickle: bool) -> dict[str, Path]:
    """Name of every tensor of a checkpoint to the file that holds it.

    Raises:
        CheckpointError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {file.name} of {folder.name}: {first_line(error)}") from error
    if not found and allow_pickle:
        for file in sorted(folder.glob("pytorch_model*.bin")):
            found |= dict.fromkeys(_pickled(file), file)
    return found


def tensors(folder: Path, names: Collection[str], *, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors called `names`."""
    from safetensors import safe_open

    files = tensor_files(folder, allow_pickle=allow_pickle)
    found = {}
    for name in names:
        if files[name].suffix == ".safetensors":
            with safe_open(files[name], framework="pt") as opened:
                found[name] = opened.get_tensor(name)
        else:
            found[name] = _pickled(files[name])[name]
    return found


def _pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, without running what else it holds; read when they are used, if its format allows."""
    try:
        weights: dict[str, Tensor] = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"cannot read {file.name}: {first_line(error)}") from error
    return weights
