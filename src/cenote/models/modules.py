"""A module of a Sentence-Transformers checkpoint: its entry in `modules.json`, and the layer in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cenote.errors import CheckpointError
from cenote.models.reading import about, check_kind, load
from cenote.models.weights import PICKLE, SAFETENSORS, floats
from cenote.models.weights import read as read_tensors
from cenote.tensors.heads import normalize

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


PACKAGES = ("sentence_transformers.", "pylate.")
"""Packages whose modules are known by the name of their class."""


@dataclass(frozen=True)
class Module:
    """One entry of `modules.json`.

    Attributes:
        type: import path of its class.
        folder: its files.
        path: the same, relative to the checkpoint.
        side: "query" if only queries pass it; empty = every input does.
    """

    type: str
    folder: Path
    path: str = ""
    side: str = ""

    @property
    def kind(self) -> str:
        """Name of the class, without the package; empty if it is of a package that is not known."""
        return self.type.rpartition(".")[2] if self.type.startswith(PACKAGES) else ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of its `config.json`, empty if it has none."""
        return load(self.folder / "config.json")


def check_names(module: Module, inputs: Collection[str], outputs: Collection[str] = ()) -> None:
    """Refuse a module that reads or writes another value than it is at."""
    for key, names in (("module_input_name", inputs), ("module_output_name", outputs or inputs)):
        value = module.config.get(key)
        if value is not None and value not in names:
            raise CheckpointError(f"{module.path}: {key} {value!r} is not honoured here, only {' or '.join(names)}")


class Normalized(nn.Module):
    """`normalize` as a module."""

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, D] -> [R, D]`."""
        return normalize(x_RD)


class _Dense(nn.Module):
    """Linear, activation, and an optional residual around both."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, activation: nn.Module, residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float32)
        self.activation = activation
        self.use_residual = residual
        self.residual: nn.Module = nn.Identity()
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False, dtype=torch.float32)

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, in] -> [R, out]`."""
        y_RD: Tensor = self.activation(self.linear(x_RD))
        return y_RD + self.residual(x_RD) if self.use_residual else y_RD


def dense(
    module: Module,
    allow_pickle: bool,
    over: str = "sentence_embedding",
    outputs: Collection[str] = (),
) -> tuple[nn.Module, int]:
    """Return the layer of a Dense module over vectors of the name `over`, and its output size.

    Args:
        module: the module.
        allow_pickle: its weights may be pickled.
        over: name of the value that it reads.
        outputs: names of the value that it may write; none = the same.

    Raises:
        CheckpointError: a setting is not honoured, or the weights do not fit.
    """
    config = module.config
    check_names(module, (over,), outputs)
    with torch.device("meta"):
        layer = _Dense(
            config["in_features"],
            config["out_features"],
            bias=config.get("bias", True),
            activation=activation(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
            residual=bool(config.get("use_residual", False)),
        )
    return loaded(layer, module.folder, allow_pickle, ("out_features", "in_features")), config["out_features"]


def activation(name: str) -> nn.Module:
    """Return an activation by its import path; only classes of `torch.nn` are looked up, nothing is imported.

    Raises:
        CheckpointError: it is none of them, or needs arguments.
    """
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CheckpointError(f"activation_function is {name!r}, expected a module of torch.nn")
    try:
        return kind()
    except TypeError as error:
        message = f"activation_function is {name!r}, which cannot be made without arguments: {error}"
        raise CheckpointError(message) from None


def loaded(module: nn.Module, folder: Path, allow_pickle: bool, sizes: Sequence[str]) -> nn.Module:
    """Give a module, which is on the meta device, its weights, all of them, and freeze it in float32.

    A module without storage cannot ask for more memory than its file has.
    """
    source = f"{_file(folder, allow_pickle).name} of {folder.name}, of the {' and '.join(sizes)} in config.json"
    return fitted(module, weights(folder, allow_pickle), source)


def fitted(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """Give a module on the meta device its tensors, all of them, and freeze it.

    Args:
        module: its shape alone.
        tensors: float32, by their names in it.
        source: of both, for messages.

    Raises:
        CheckpointError: they are not the module's, or of other shapes.
    """
    with about(source, "correct the sizes, or take the weights that belong to them"):
        module.load_state_dict(tensors, assign=True)
        return module.eval().requires_grad_(False)


def weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors of a module's folder by name, float32.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    file = _file(folder, allow_pickle)
    return floats(f"{file.name} of {folder.name}", read_tensors(file))


def _file(folder: Path, allow_pickle: bool) -> Path:
    """Return the file of weights in a module's folder.

    Raises:
        CheckpointError: there is none.
    """
    safe, pickled = folder / SAFETENSORS, folder / PICKLE
    for file in (safe, pickled):
        check_kind(file)
    if safe.is_file():
        return safe
    if pickled.is_file() and allow_pickle:
        return pickled
    hint = " (there is a pytorch_model.bin, which --safetensors-only leaves unread)" if pickled.is_file() else ""
    raise CheckpointError(f"{folder} has no model.safetensors{hint}")
