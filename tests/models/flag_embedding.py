"""FlagEmbedding's rules of bge-m3, written out.

Dense: the first token's row, normalised. Sparse: `relu(sparse_linear(row))` of every token, for each token id the
largest, without cls, eos, pad and unk. Token vectors: `colbert_linear` of all rows but the first, normalised.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel, AutoTokenizer

from tests import checkpoints

if TYPE_CHECKING:
    from pathlib import Path


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def reference(folder: Path, text: str) -> dict[str, Any]:
    """Return what FlagEmbedding gives for one text, by task."""
    tokenizer = _tokenizer(folder)
    model = checkpoints.pretrained(AutoModel, folder, dtype=torch.float32)
    layers = [torch.load(folder / name, weights_only=True) for name in ("sparse_linear.pt", "colbert_linear.pt")]
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        rows = model(**inputs).last_hidden_state[0]
        weights, vectors = (torch.nn.functional.linear(rows, layer["weight"], layer["bias"]) for layer in layers)
    ids, values = inputs["input_ids"][0].tolist(), weights.relu()[:, 0].tolist()
    unused = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    lexical: dict[int, float] = {}
    for token, value in zip(ids, values, strict=True):
        if token not in unused and value > lexical.get(token, 0.0):
            lexical[token] = value
    return {
        "embed": torch.nn.functional.normalize(rows[0], dim=0).numpy(),
        "sparse": lexical,
        "token_embed": torch.nn.functional.normalize(vectors[1:], dim=-1).numpy(),
        "token_classify": values[1:-1],
    }
