"""Embedding with the default model against sentence-transformers and against the GEMM limit.

    python -m benchmarks.embed [--texts 500] [--rounds 9] [--save NAME]

Rounds are interleaved, each engine in a process of its own that the other's settings do not reach, and ratios are
medians over rounds; absolute figures of a shared machine mean little. "CPU" is process CPU time with one thread,
"wall" is wall time with all threads. The GEMM limit is what the Linear layers alone would take at the rate that
`torch.nn.functional.linear` reaches in the same round.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import numpy as np

from benchmarks.harness import Encode, Worker, gemm_rate, row, save
from cenote import LLM
from cenote.models.hub import embedded
from material.corpus import docstrings

MAX_TOKENS = 256
SHAPES = [*[(384, 384)] * 4, (1536, 384), (384, 1536)]
LAYERS = 6
LINEAR_PARAMETERS = LAYERS * sum(a * b for a, b in SHAPES)


def cenote() -> Encode:
    """Vectors of texts by Cenote; of the order "gemm" the GEMM rate."""
    llm = LLM(auto_truncate=True)

    def encode(texts: list[str] | str) -> Any:
        if texts == "gemm":
            return gemm_rate(SHAPES, LAYERS)
        return np.array([o.outputs.embedding for o in llm.embed(texts, use_tqdm=False)])

    return encode


def sentence_transformers() -> Encode:
    """Vectors of texts by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(embedded()), device="cpu")
    model.max_seq_length = MAX_TOKENS
    return lambda texts: np.asarray(model.encode(texts, batch_size=32, show_progress_bar=False))


def offline(texts: list[str], rounds: int) -> dict[str, Any]:
    """Offline throughput, interleaved: CPU time on one thread, then wall time on all; and one request of 32."""
    cores = os.cpu_count() or 1
    ours, theirs = Worker(cenote, threads=1), Worker(sentence_transformers, threads=1)
    ours_all, theirs_all = Worker(cenote, threads=cores), Worker(sentence_transformers, threads=cores)
    for worker in (ours, theirs, ours_all, theirs_all):
        worker.ask(texts[:64])
    some = texts[:: len(texts) // 32][:32]
    tokens = sum(min(len(ids), MAX_TOKENS) for ids in LLM(auto_truncate=True).get_tokenizer()(texts)["input_ids"])
    flop = 2 * tokens * LINEAR_PARAMETERS
    names = ("cpu_ratio", "wall_ratio", "gemm_fraction", "texts_per_second", "one_request")
    result: dict[str, Any] = {name: [] for name in names}
    result["tokens"] = tokens
    for _ in range(rounds):
        st_cpu, _, st_vectors = theirs.ask(texts)
        our_cpu, _, our_vectors = ours.ask(texts)
        rate = ours.ask("gemm")[2]
        st_wall, our_wall = theirs_all.ask(texts)[1], ours_all.ask(texts)[1]
        result["cpu_ratio"].append(st_cpu / our_cpu)
        result["gemm_fraction"].append(flop / rate / our_cpu)
        result["wall_ratio"].append(st_wall / our_wall)
        result["texts_per_second"].append(len(texts) / our_wall)
        result["one_request"] += [theirs_all.ask(some)[1] / ours_all.ask(some)[1] for _ in range(3)]
        result["difference"] = float(np.abs(our_vectors - st_vectors).max())
        print(
            f"  round: sentence-transformers {st_cpu:.2f} CPU s, {st_wall:.2f} s; Cenote {our_cpu:.2f} CPU s, "
            f"{our_wall:.2f} s; GEMM {rate / 1e9:.0f} GFLOP/s",
            flush=True,
        )
    for worker in (ours, theirs, ours_all, theirs_all):
        worker.stop()
    return result


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    texts = list(docstrings(options.texts))
    result: dict[str, Any] = {"offline": offline(texts, options.rounds)}

    median = statistics.median
    found = result["offline"]
    print(
        f"\n{options.texts} docstrings, {found['tokens']} tokens, all-MiniLM-L6-v2, fp32, at most {MAX_TOKENS} tokens"
    )
    row("largest difference to sentence-transformers", f"{found['difference']:.1e}", "<= 1e-5")
    row(
        "throughput vs sentence-transformers (batch 32), CPU, 1 thread",
        f"{median(found['cpu_ratio']):.2f} x",
        ">= 1.75",
    )
    row("  same, wall, all threads", f"{median(found['wall_ratio']):.2f} x")
    row("share of the GEMM limit, CPU, 1 thread", f"{median(found['gemm_fraction']):.0%}", ">= 70 %")
    row("offline rate, all threads", f"{median(found['texts_per_second']):.0f} texts/s")
    row("32 mixed texts as one request vs one padded batch, wall", f"{median(found['one_request']):.2f} x", ">= 3")
    if options.save:
        save(options.save, result, f"python -m benchmarks.embed --texts {options.texts} --rounds {options.rounds}")


if __name__ == "__main__":
    main()
