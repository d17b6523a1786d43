"""fastembed over the model that sentence-transformers exported to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BATCH = 32


def load(task: str, folder: str, variant: str, threads: int) -> Callable[[Any], Any]:
    """What answers orders of `task`."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    here: dict[str, Any] = {"specific_model_path": folder, "threads": threads}
    named: dict[str, Any] = {"model": "here", "sources": ModelSource(hf="here/here"), "model_file": "onnx/model.onnx"}
    if task == "rerank":
        TextCrossEncoder.add_custom_model(**named)
        cross = TextCrossEncoder("here", **here)

        def rerank(order: tuple[str, list[str]]) -> Any:
            logits = np.array(list(cross.rerank(*order, batch_size=BATCH)))
            return 1 / (1 + np.exp(-logits))

        return rerank
    TextEmbedding.add_custom_model(**named, pooling=PoolingType.MEAN, normalization=True, dim=384)
    model = TextEmbedding("here", **here)
    return lambda texts: np.array(list(model.embed(texts, batch_size=BATCH)))
