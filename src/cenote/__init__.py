"""Cenote: an inference engine for pooling models.

Any Transformers checkpoint in; embeddings, token vectors, classes and scores out.
Importing this package is cheap: torch and Transformers load with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.adapters import LoRARequest
    from cenote.cli.engine_args import EngineArgs
    from cenote.config import PoolerConfig
    from cenote.core import LateChunkingParams, PoolingParams
    from cenote.errors import CenoteError
    from cenote.llm import LLM
    from cenote.models.convert import default_pooling_type, register_model
    from cenote.models.families.own import ModelForPooling
    from cenote.outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from cenote.pipeline.plugins import IOProcessor
    from cenote.vllm.inputs import TextPrompt, TokensPrompt

__all__ = [
    "LLM",
    "CenoteError",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "IOProcessor",
    "LateChunkingParams",
    "LoRARequest",
    "ModelForPooling",
    "PoolerConfig",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
    "TextPrompt",
    "TokensPrompt",
    "default_pooling_type",
    "register_model",
]

_HOMES = {
    "LLM": "cenote.llm",
    "CenoteError": "cenote.errors",
    "ClassificationOutput": "cenote.outputs",
    "ClassificationRequestOutput": "cenote.outputs",
    "EmbeddingOutput": "cenote.outputs",
    "EmbeddingRequestOutput": "cenote.outputs",
    "EngineArgs": "cenote.cli.engine_args",
    "IOProcessor": "cenote.pipeline.plugins",
    "LateChunkingParams": "cenote.core",
    "LoRARequest": "cenote.adapters",
    "ModelForPooling": "cenote.models.families.own",
    "PoolerConfig": "cenote.config",
    "PoolingOutput": "cenote.outputs",
    "PoolingParams": "cenote.core",
    "PoolingRequestOutput": "cenote.outputs",
    "ScoringOutput": "cenote.outputs",
    "ScoringRequestOutput": "cenote.outputs",
    "TextPrompt": "cenote.vllm.inputs",
    "TokensPrompt": "cenote.vllm.inputs",
    "default_pooling_type": "cenote.models.convert",
    "register_model": "cenote.models.convert",
}

__path__.append(f"{__path__[0]}/vllm")  # modules that scripts for vLLM import; see `cenote.vllm`

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
