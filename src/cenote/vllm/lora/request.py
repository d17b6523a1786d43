"""The choice of an adapter."""

from cenote.core import LoRARequest

__all__ = ["LoRARequest"]
