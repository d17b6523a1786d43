"""sentence-transformers with each of its backends, batches of 32 as it sorts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BATCH = 32


def load(task: str, folder: str, variant: str, threads: int) -> Callable[[Any], Any]:
    """What answers orders of `task`. Variants: torch, onnx, openvino in float32, openvino-default in its own dtype."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    options: dict[str, Any] = {"device": "cpu"}
    if variant != "torch":
        options |= {"backend": variant.removesuffix("-default"), "model_kwargs": _runtime(variant, threads)}
    ask: dict[str, Any] = {"batch_size": BATCH, "show_progress_bar": False}
    if task == "rerank":
        cross = CrossEncoder(folder, **options)
        return lambda order: cross.predict([(order[0], document) for document in order[1]], **ask)
    if task == "colbert":
        from sentence_transformers import MultiVectorEncoder

        tokens = MultiVectorEncoder(folder, **options)
        return lambda texts: [rows.numpy() for rows in tokens.encode_document(texts, **ask)]
    model = SentenceTransformer(folder, **options)
    return lambda texts: model.encode(texts, **ask)


def _runtime(variant: str, threads: int) -> dict[str, Any]:
    if variant == "onnx":
        from onnxruntime import SessionOptions

        session = SessionOptions()
        session.intra_op_num_threads = threads
        return {"session_options": session, "provider": "CPUExecutionProvider"}
    # OpenVINO computes in bfloat16 where the processor has it, unless told otherwise.
    precision = {} if variant.endswith("-default") else {"INFERENCE_PRECISION_HINT": "f32"}
    return {"ov_config": {"INFERENCE_NUM_THREADS": threads, **precision}}


def export(task: str, folder: str, target: str, variant: str) -> None:
    """Write `folder` in the form of the backend `variant`."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    make = CrossEncoder if task == "rerank" else SentenceTransformer
    make(folder, device="cpu", backend=variant).save_pretrained(target)
