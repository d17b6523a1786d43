"""The parser of scripts, where older releases of vLLM have it."""

from cenote.cli.engine_args import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
