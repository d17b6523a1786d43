"""Where results lie until they are answered: in memory of their own, apart from that of activations.

Results outlive the forwards that make them. Among activations they would keep the holes between them from growing
together again, and the allocator from giving anything back.
"""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SLAB = 1 << 20
"""Bytes that are mapped at once: results of some dozens of batches. A slab goes when the last result in it goes."""
LINE = 64


class _Slab(threading.local):
    """The slab that a thread is filling."""

    def __init__(self) -> None:
        self.bytes = np.empty(0, np.uint8)
        self.used = 0

    def take(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        size = -(-size // LINE) * LINE
        if self.used + size > len(self.bytes):
            self.bytes, self.used = np.frombuffer(mmap.mmap(-1, max(SLAB, size)), np.uint8), 0
        self.used += size
        return self.bytes[self.used - size : self.used]


_SLAB = _Slab()


def kept(x: Tensor) -> np.ndarray[Any, Any]:
    """A copy of a CPU tensor that may stay."""
    source = x.numpy()
    if not source.nbytes:
        return source
    copy = _SLAB.take(source.nbytes)[: source.nbytes].view(source.dtype).reshape(source.shape)
    copy[...] = source
    return copy
