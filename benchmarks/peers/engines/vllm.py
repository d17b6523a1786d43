"""vLLM's CPU build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def load(task: str, folder: str, variant: str, threads: int) -> Callable[[Any], Any]:
    """What answers orders of `task`; vLLM computes in a process of its own, whose CPU time counts too."""
    from vllm import LLM

    llm = LLM(folder, runner="pooling", dtype="float32")
    if task == "rerank":
        return lambda order: np.array([o.outputs.score for o in llm.score(*order, use_tqdm=False)])
    return lambda texts: np.array([o.outputs.embedding for o in llm.embed(texts, use_tqdm=False)])
