"""The parser of scripts."""

from cenote.cli.engine_args import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
