"""Infinity's engine without its server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np


def load(task: str, folder: str, variant: str, threads: int) -> Callable[[Any], Any]:
    """What answers orders of `task`."""
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    loop = asyncio.new_event_loop()
    arguments = EngineArgs(model_name_or_path=folder, engine="torch", device="cpu", dtype="float32")
    engine = AsyncEmbeddingEngine.from_args(arguments)
    loop.run_until_complete(engine.astart())

    def embed(texts: list[str]) -> Any:
        return np.array(loop.run_until_complete(engine.embed(texts))[0])

    def rerank(order: tuple[str, list[str]]) -> Any:
        ranked, _ = loop.run_until_complete(engine.rerank(query=order[0], docs=order[1]))
        scores = np.empty(len(order[1]), np.float32)
        for result in ranked:
            scores[result.index] = result.relevance_score
        return scores

    return rerank if task == "rerank" else embed
