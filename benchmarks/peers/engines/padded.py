"""What a padded engine could reach at best: all texts at hand, sorted by tokens, Transformers' forward, little else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load(task: str, folder: str, variant: str, threads: int) -> Callable[[Any], Any]:
    """What answers orders of `task` in batches of `variant` texts."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    make = AutoModelForSequenceClassification if task == "rerank" else AutoModel
    model = make.from_pretrained(folder, dtype=torch.float32).eval()

    def outputs(batch: Any) -> torch.Tensor:
        if task == "rerank":
            scores: torch.Tensor = model(**batch).logits.sigmoid()
            return scores
        hidden_BTD = model(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"][..., None]
        means_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        return torch.nn.functional.normalize(means_BD, dim=1)

    @torch.inference_mode()
    def answer(order: Any) -> Any:
        texts = [(order[0], document) for document in order[1]] if task == "rerank" else order
        encodings = tokenizer(texts)
        lengths = [len(ids) for ids in encodings["input_ids"]]
        ranked = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(ranked), int(variant)):
            chosen = ranked[start : start + int(variant)]
            fields = {name: [values[i] for i in chosen] for name, values in encodings.items()}
            found.update(zip(chosen, outputs(tokenizer.pad(fields, return_tensors="pt")), strict=True))
        answers = torch.stack([found[i] for i in range(len(lengths))]).numpy()
        return answers[:, 0] if task == "rerank" else answers

    return answer
