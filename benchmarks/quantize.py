"""The default model with fewer bits, against itself in float32: speed, agreement, and quality of search.

    python -m benchmarks.quantize [--texts 600] [--rounds 5] [--save NAME]

One process for each way to keep the weights, one thread, interleaved; figures are medians of ratios of CPU time within
a round. A second set of processes has only AVX2, as processors had before AVX-512: kernels are compiled for it, and MKL
and oneDNN are told to keep to it.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import numpy as np

from benchmarks.harness import Encode, Worker, row, save
from material.corpus import docstrings
from material.retrieval import TOKENS, collect, ndcg_at_10

FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}
GOALS = {"as it is": 1.8, "AVX2": 1.3}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""What torch and its libraries have to be told."""
PAIRS = 2000


def engine(form: str, processor: str) -> Encode:
    """`LLM.embed` to a NumPy array; asked for nothing, how the Linear layers run."""
    from cenote import LLM

    isa = "avx2" if processor == "AVX2" else "auto"
    llm = LLM(auto_truncate=True, max_model_len=TOKENS, isa=isa, **FORMS[form])

    def encode(texts: list[str]) -> Any:
        if not texts:
            return llm.info.report.linears or "float32"
        return np.array([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)])

    return encode


def measured(processor: str, texts: list[str], rounds: int) -> dict[str, Any]:
    """Ratios to float32, and how far the vectors are from it."""
    if processor == "AVX2":
        os.environ.update(AVX2)
    workers = {form: Worker(engine, form, processor, threads=1) for form in FORMS}
    found: dict[str, Any] = {form: {"runs": worker.ask([])[2], "ratios": []} for form, worker in workers.items()}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    vectors = {}
    for _ in range(rounds + 1):
        for form, worker in workers.items():
            cpu, _, vectors[form] = worker.ask(texts)
            seconds[form].append(cpu)
    pairs = collect(PAIRS)
    for form, worker in workers.items():
        own = found[form]
        own["seconds"] = seconds[form][1:]  # the first round warms up
        own["ratios"] = [whole / one for whole, one in zip(seconds["float32"][1:], own["seconds"], strict=True)]
        cosines = (vectors[form] * vectors["float32"]).sum(1)
        own["cosine_mean"], own["cosine_min"] = float(cosines.mean()), float(cosines.min())
        embedded = worker.ask([*pairs.queries, *pairs.documents])[2]
        own["ndcg_at_10"] = ndcg_at_10(embedded[:PAIRS], embedded[PAIRS:])
        worker.stop()
    for variable in AVX2:
        os.environ.pop(variable, None)
    return found


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    texts = list(docstrings(options.texts))
    result: dict[str, Any] = {}
    for processor, goal in GOALS.items():
        result[processor] = measured(processor, texts, options.rounds)
        whole = result[processor]["float32"]["ndcg_at_10"]
        for form, own in result[processor].items():
            if form == "float32":
                continue
            row(f"{processor}, {own['runs']}", "")
            row(
                "  CPU time of float32, 1 thread",
                f"{statistics.median(own['ratios']):.2f} x",
                f">= {goal}" * (form == "int8"),
            )
            row("  cosine to float32, mean and least", f"{own['cosine_mean']:.5f} {own['cosine_min']:.5f}", ">= 0.995")
            row(f"  nDCG@10 of {PAIRS} docstrings", f"{own['ndcg_at_10'] / whole - 1:+.2%}", "within 1 %")
    if options.save:
        save(options.save, result, f"python -m benchmarks.quantize --texts {options.texts} --rounds {options.rounds}")


if __name__ == "__main__":
    main()
