"""The base of plugins."""

from cenote.pipeline.plugins import IOProcessor

__all__ = ["IOProcessor"]
