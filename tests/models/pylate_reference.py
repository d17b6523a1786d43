"""Writes PyLate's own vectors of folders, in an environment that has PyLate; see `test_pylate.py`.

`python pylate_reference.py JOBS.json`, where the file is a list of `{"folder": ..., "texts": {"query": [...],
"document": [...]}}`. Beside each folder, `<folder>.npz` gets the arrays `query_0`, `query_1`, ...: the vectors of the
texts of a side, one text at a time. A job with `"source"` first has PyLate make the folder from an encoder, with the
arguments `"settings"`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pylate.models import ColBERT


def loaded(job: dict[str, Any]) -> ColBERT:
    """The model of a job."""
    if "source" in job:
        torch.manual_seed(0)
        ColBERT(job["source"], device="cpu", **job["settings"]).save_pretrained(job["folder"])
    return ColBERT(job["folder"], device="cpu")


def vectors(model: ColBERT, texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """The vectors of each text, behind the prompt of its side."""
    rows = {}
    for side, listed in texts.items():
        prompt = side if side in model.prompts else None
        for number, text in enumerate(listed):
            encoded = model.encode([text], is_query=side == "query", prompt_name=prompt, show_progress_bar=False)
            rows[f"{side}_{number}"] = encoded[0]
    return rows


for job in json.loads(Path(sys.argv[1]).read_text()):
    np.savez(f"{job['folder']}.npz", **vectors(loaded(job), job["texts"]))
