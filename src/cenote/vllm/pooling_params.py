"""Parameters of tasks."""

from cenote.core import LateChunkingParams, PoolingParams

__all__ = ["LateChunkingParams", "PoolingParams"]
