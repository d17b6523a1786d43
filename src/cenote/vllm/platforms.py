"""The device of torch, for scripts that ask before they choose."""

from __future__ import annotations

import torch


class _Platform:
    def is_cuda(self) -> bool:
        """Return whether there is a GPU of NVIDIA's."""
        return torch.cuda.is_available() and torch.version.cuda is not None

    def is_rocm(self) -> bool:
        """Return whether there is a GPU of AMD's."""
        return torch.cuda.is_available() and torch.version.hip is not None

    def is_cpu(self) -> bool:
        """Return whether there is no GPU."""
        return not torch.cuda.is_available()


current_platform = _Platform()
