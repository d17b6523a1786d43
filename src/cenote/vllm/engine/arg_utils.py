"""Arguments of `LLM`."""

from cenote.cli.engine_args import EngineArgs

__all__ = ["EngineArgs"]
