"""Cenote. Its cache of results is off unless asked for, so repeated texts are computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}


def load(task: str, folder: str, variant: str, threads: int) -> Callable[[Any], Any]:
    """What answers orders of `task`; threads are those of the environment."""
    from cenote import LLM

    llm = LLM(folder, auto_truncate=True, **FORMS[variant])
    if task == "rerank":
        return lambda order: np.array([o.outputs.score for o in llm.score(*order, use_tqdm=False)])
    if task == "colbert":
        options: dict[str, Any] = {"pooling_task": "token_embed", "input_type": "document", "use_tqdm": False}
        return lambda texts: [o.outputs.data.numpy() for o in llm.encode(texts, **options)]
    return lambda texts: np.array([o.outputs.embedding for o in llm.embed(texts, use_tqdm=False)])
