"""Queries and documents with pictures, where newer releases of vLLM have them."""

from cenote.vllm.entrypoints.score_utils import ScoreMultiModalParam

__all__ = ["ScoreMultiModalParam"]
