"""The choice of an adapter."""

from cenote.adapters import LoRARequest

__all__ = ["LoRARequest"]
