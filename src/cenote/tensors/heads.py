"""A head is a list of small steps applied to pooled rows, in float32.

Steps are functions `[R, D] -> [R, D']`; R is B for sequence tasks and T for token tasks. Order: the checkpoint's
own modules (Dense, LayerNorm, ...), then the cut to `dimensions`, then the activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Step = Callable[[Tensor], Tensor]


def normalize(x_RD: Tensor) -> Tensor:
    """Scale rows to length 1 (eps 1e-12, as torch and sentence-transformers)."""
    return F.normalize(x_RD, p=2, dim=-1)


@dataclass(frozen=True)
class Cut:
    """A step that keeps the first `length` columns."""

    length: int

    def __call__(self, x_RD: Tensor) -> Tensor:
        """`[R, D] -> [R, length]`, if there are more columns than that."""
        return x_RD[..., : self.length]


def apply(steps: Sequence[Step], x_RD: Tensor, *, dimensions: int | None, activate: bool) -> Tensor:
    """Run `steps`, keep the first `dimensions` columns, and normalise if `activate`."""
    x_RD = x_RD.float()
    for step in steps:
        x_RD = step(x_RD)
    if dimensions is not None:
        x_RD = x_RD[..., :dimensions]
    return normalize(x_RD) if activate else x_RD
