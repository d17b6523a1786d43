"""Tensors of a checkpoint by name, out of its safetensors files or, where there are none, out of pickles.

The files are those that Transformers reads, in its order; any other file beside them is not the model's. Pickles are
read by torch's restricted unpickler, which takes tensors out of them and runs no code in them.
"""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cenote.errors import CheckpointError
from cenote.models.inside import inside
from cenote.models.reading import about, check_kind, read_json

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = ".index.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header of its file describes it.

    Attributes:
        file: that file.
        shape: of the tensor.
        dtype: its name in safetensors ("F32", "BF16", "I64", "BOOL") or, of a pickle, in torch ("float32").
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_floating(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.dtype.lower().startswith(("f", "bf"))


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


def stored(folder: Path, *, pickles: bool) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by name, without their values.

    Raises:
        CheckpointError: a file is damaged, or two of them have the same tensor.
    """
    tensors: dict[str, Stored] = {}
    for name in model_files(folder, pickles=pickles):
        of_file = header(folder / name)
        twice = sorted(tensors.keys() & of_file.keys())
        if twice:
            raise CheckpointError(
                f"{name} of {folder.name} has the tensor {twice[0]}, which {tensors[twice[0]].file.name} has too, and "
                "model.safetensors.index.json can mean only one of them; take one away, or download both again"
            )
        tensors |= of_file
    return tensors


FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of floating-point dtypes in safetensors to those in torch."""


def dtype_of(stored: Mapping[str, Stored]) -> str | None:
    """Return the name in torch of the dtype of most floating-point values of a checkpoint; `None` if it has none."""
    counts: Counter[str] = Counter()
    for tensor in stored.values():
        if tensor.is_floating:
            counts[FLOATS.get(tensor.dtype, tensor.dtype)] += math.prod(tensor.shape)
    return max(counts, key=counts.__getitem__, default=None)


def tensors(folder: Path, names: Collection[str], *, pickles: bool) -> dict[str, Tensor]:
    """Return the tensors called `names`, whose values are finite."""
    places = stored(folder, pickles=pickles)
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(places[name].file for name in names):
        of_file = _some(file, [name for name in names if places[name].file == file])
        check_values(f"{file.name} of {folder.name}", of_file)
        tensors |= of_file
    return tensors


def _some(file: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of a file called `names`, of which a pickle is read whole."""
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        pickled = _pickled(file)
        return {name: pickled[name] for name in names}
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def _indexed(index: Path) -> tuple[str, ...]:
    """Return the files that an index names.

    Raises:
        CheckpointError: it is damaged, or one of them is not there.
    """
    content = read_json(index)
    suffix = Path(index.name.removesuffix(INDEX)).suffix
    with about(index):
        names = sorted({_file_name(name, suffix) for name in content["weight_map"].values()})
    for name in names:
        if not inside(index.parent, name, index.name).is_file():
            raise CheckpointError(f"{index.parent.name} lacks {name}, which {index.name} names; download it again")
    return tuple(names)


def _file_name(name: object, suffix: str) -> str:
    """Return an entry of an index, which has to be the name of a file of weights."""
    if not isinstance(name, str) or not name.endswith(suffix):
        raise ValueError(f"weight_map has {name!r}, expected the name of a file that ends in {suffix}")
    return name


def read(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file or a pickle.

    Raises:
        CheckpointError: it is damaged.
    """
    from safetensors.torch import load_file

    check_kind(file)
    if file.suffix != ".safetensors":
        return _pickled(file)
    with about(file):
        return load_file(file)


def header(file: Path) -> dict[str, Stored]:
    """Return the tensors of a file of weights by name, without their values.

    Raises:
        CheckpointError: it is damaged.
    """
    from safetensors import safe_open

    check_kind(file)
    if file.suffix != ".safetensors":
        return {name: _described(file, tensor) for name, tensor in _pickled(file).items()}
    with about(file), safe_open(file, framework="pt") as opened:
        return {name: _sliced(file, name, opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118


def _sliced(file: Path, name: str, part: Any) -> Stored:
    """Return the header of a tensor in a safetensors file.

    Complex numbers are refused, which no model has, and of which a cast would drop a half.
    """
    dtype = part.get_dtype()
    if dtype.startswith("C"):
        raise ValueError(f"{name} is {dtype}, expected real numbers")
    return Stored(file, tuple(part.get_shape()), dtype)


def _described(file: Path, tensor: Tensor) -> Stored:
    """Return the header that a tensor would have."""
    return Stored(file, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, without running code in it; read when they are used, if its format allows."""
    remedy = "torch's restricted unpickler, which runs no code, refuses it; save the weights as safetensors"
    with about(file, remedy):
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    with about(file):
        if not isinstance(weights, dict):
            raise ValueError(f"it holds {type(weights).__name__}, expected tensors by name")
        for name, tensor in weights.items():
            _check_pickled(name, tensor)
    return weights


def _check_pickled(name: object, tensor: object) -> None:
    """Refuse an entry of a pickle that is no tensor, or one that shows more values than the pickle has."""
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise ValueError(f"its entry {name!r} is {type(tensor).__name__}, expected tensors by name")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{name} is no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} of the shape {tuple(tensor.shape)} has fewer values than that")


def floats(place: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return float32 copies of tensors, which are checked; see `check_values`."""
    check_values(place, tensors)
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


def check_values(place: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with values that are not finite, or that are no floating-point numbers, but for single counters.

    Args:
        place: their file, for the message.
        tensors: by name.

    Raises:
        CheckpointError: one of them is NaN, infinite, or of another kind of dtype.
    """
    for name, tensor in tensors.items():
        is_counter = tensor.shape == () and tensor.dtype == torch.int64
        if not (tensor.is_floating_point() or is_counter):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{place}: {name} is {kind}, expected floating-point numbers; download it again")
        if not is_finite(tensor):
            raise CheckpointError(
                f"{place}: {name} has values that are not finite (NaN or infinity); download it again, or save it "
                "in a dtype that holds its values"
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value of a tensor is NaN or infinite, without a copy of it."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.element_size() == 1:
        return True  # the 8-bit floating-point types have no such function; forwards show their values
    extremes = torch.stack(torch.aminmax(tensor.detach()))
    return bool(torch.isfinite(extremes).all())
