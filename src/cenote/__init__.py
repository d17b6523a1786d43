"""Cenote: an inference engine for pooling models.

Any Transformers checkpoint in; embeddings, token vectors, classes and scores out.
Importing this package is cheap: torch and Transformers load with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.config import PoolerConfig
    from cenote.core import LateChunkingParams, LoRARequest, PoolingParams
    from cenote.errors import CenoteError
    from cenote.llm import LLM
    from cenote.models.convert import default_pooling_type, register_model
    from cenote.models.families.own import ModelForPooling
    from cenote.pipeline.plugins import IOProcessor

__all__ = [
    "LLM",
    "CenoteError",
    "IOProcessor",
    "LateChunkingParams",
    "LoRARequest",
    "ModelForPooling",
    "PoolerConfig",
    "PoolingParams",
    "default_pooling_type",
    "register_model",
]

_HOMES = {
    "LLM": "cenote.llm",
    "CenoteError": "cenote.errors",
    "IOProcessor": "cenote.pipeline.plugins",
    "LateChunkingParams": "cenote.core",
    "LoRARequest": "cenote.core",
    "ModelForPooling": "cenote.models.families.own",
    "PoolerConfig": "cenote.config",
    "PoolingParams": "cenote.core",
    "default_pooling_type": "cenote.models.convert",
    "register_model": "cenote.models.convert",
}

try:
    __version__ = version("cenote")
except PackageNotFoundError:
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cenote' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
