"""Chains of Linear layers and the operations that follow each, run by native kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.functions import optional

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
"""Functions that a chain can apply to a layer's output, in the order of kernels.cpp."""


W = TypeVar("W")
"""The weights of a Linear layer, in the form of those `Products`."""


@dataclass(frozen=True)
class Step(Generic[W]):
    """A Linear layer and the operations that follow it at once.

    Attributes:
        weights: its matrix and bias.
        activation: a key of `ACTIVATIONS`, applied to the sum.
        norm: a LayerNorm over the sum with the residual; not together with an activation.
        linear: the module whose layer it is, if any.
    """

    weights: W
    activation: str = ""
    norm: nn.LayerNorm | None = None
    linear: nn.Linear | None = None


class Products(Protocol[W]):
    """Products by the matrices of Linear layers, which are kept in an order of their own."""

    def pack(self, weight: Tensor, bias: Tensor | None = None, /) -> W:
        """Copy a float32 matrix `[out, in]` and the bias `[out]` of its layer."""

    def unpack(self, packed: W, /) -> Tensor:
        """Return the very same matrix."""

    def chain(self, steps: tuple[Step[W], ...], /) -> Chain[W]:
        """Return a chain of the layers; only the last may normalise."""


class Chain(Generic[W]):
    """Linear layers run one behind the other, block of rows by block of rows: states between them stay in cache.

    Args:
        run: the native function: the layers, the number of rows; then addresses and from row to row the distance in
            floats, of the input and of the residual, or `None` and 0; and the address of the result. Rows are
            contiguous, and the result is as a whole.
        layers: as it reads them, with the attribute `out` of the last.
        steps: the layers.
    """

    def __init__(
        self,
        run: Callable[..., None],
        layers: ctypes.Array[Any],
        steps: tuple[Step[W], ...],
    ) -> None:
        self._run = run
        self._layers = layers
        self._columns = int(layers[-1].out)
        self.steps = steps

    def __deepcopy__(self, memo: object) -> Chain[W]:
        """Itself: it never changes."""
        return self

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[..., in]` float32 to `[..., out]`; the residual has the shape of the result.

        Raises:
            MemoryError: there is no room for a block.
            TypeError: the input is not float32 on the CPU.
        """
        if x.dtype != torch.float32 or not x.is_cpu:
            raise TypeError(f"expected float32 on the CPU, got {x.dtype} on {x.device}")
        out = torch.empty(*x.shape[:-1], self._columns, dtype=torch.float32, device="cpu")
        x, stride = _rows(x)
        after, after_stride = None, 0
        if residual is not None:
            residual, after_stride = _rows(residual if residual.shape == out.shape else residual.expand(out.shape))
            after = residual.data_ptr()
        rows = out.numel() // self._columns
        if rows:
            self._run(self._layers, rows, x.data_ptr(), stride, after, after_stride, out.data_ptr())
        return out


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Return `x` with contiguous rows, and the distance between them."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x_RD = x.reshape(-1, x.shape[-1])
    x_RD = x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()
    return x_RD, x_RD.stride(0)


def address_of(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's memory."""
    return optional(torch.Tensor.data_ptr, tensor)


def numbers_of(step: Step[Any]) -> tuple[int | None, int | None, float, int]:
    """Return the addresses of a step's norm, its epsilon and the number of the activation, as kernels take them."""
    number = ["", *ACTIVATIONS].index(step.activation)
    if step.norm is None:
        return None, None, 0.0, number
    return step.norm.weight.data_ptr(), step.norm.bias.data_ptr(), step.norm.eps, number
