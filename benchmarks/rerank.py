"""Reranking against sentence-transformers' CrossEncoder, and LLM reranking with and without shared prefixes.

    python -m benchmarks.rerank [--rounds 5] [--save NAME]

The cross-encoder has MiniLM-L6's shape and weights and a random head: 1 query x 100 docstrings of mixed length, at
most 256 tokens a pair. The LLM reranker has the shape of Qwen3-0.6B with 4 layers and random weights: 1 query x 50
docstrings behind a prefix of 200 tokens. Rounds are interleaved, each engine in a process of its own; ratios are
medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Encode, Worker, row, save
from cenote import LLM
from cenote.models.hub import embedded
from material.corpus import docstrings

MAX_TOKENS = 256
DOCUMENTS, LLM_DOCUMENTS = 100, 50
PREFIX_TOKENS = 200
QUERY = "How do I read a file line by line without loading all of it into memory?"
TEMPLATE = "{{ instruction }} {{ messages[0].content }} {{ messages[1].content }} answer"
LAYERS = 4


def cross_encoder_folder(folder: Path) -> str:
    """A cross-encoder in Transformers' format."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    torch.manual_seed(0)
    BertForSequenceClassification.from_pretrained(embedded(), num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded()).save_pretrained(folder)
    return str(folder)


def llm_reranker_folder(folder: Path) -> str:
    """An LLM reranker in Transformers' format."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        num_labels=1,
        pad_token_id=0,
    )
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def cenote(folder: str) -> Encode:
    """Scores of (query, documents) by Cenote."""
    llm = LLM(folder, max_model_len=MAX_TOKENS, auto_truncate=True)
    return lambda order: np.array([o.outputs.score for o in llm.score(*order, use_tqdm=False)])


def cross_encoder(folder: str) -> Encode:
    """Scores of (query, documents) by sentence-transformers, which sorts by length."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder, max_length=MAX_TOKENS, device="cpu")

    def encode(order: tuple[str, list[str]]) -> Any:
        return model.predict([(order[0], document) for document in order[1]], batch_size=32, show_progress_bar=False)

    return encode


def llm_reranker(folder: str, prefix_sharing: bool) -> Encode:
    """Scores of (instruction, query, documents) by Cenote, every pair behind the instruction."""
    llm = LLM(folder, chat_template=TEMPLATE, prefix_sharing=prefix_sharing)

    def encode(order: tuple[str, str, list[str]]) -> Any:
        return np.array([o.outputs.score for o in llm.score(*order[1:], instruction=order[0], use_tqdm=False)])

    return encode


def measure(ours: Encode, theirs: Encode, arguments: tuple[Any, ...], order: Any, rounds: int) -> dict[str, Any]:
    """Ratios theirs / ours: CPU time on one thread, wall time on all; and the largest difference of scores."""
    cores = os.cpu_count() or 1
    (our_one, their_one), (our_all, their_all) = (
        [Worker(make, *given, threads=threads) for make, given in zip((ours, theirs), arguments, strict=True)]
        for threads in (1, cores)
    )
    workers = (our_one, their_one, our_all, their_all)
    for worker in workers:
        worker.ask(order)
    result: dict[str, Any] = {"cpu_ratio": [], "wall_ratio": [], "our_wall_seconds": []}
    for _ in range(rounds):
        their_cpu, _, wanted = their_one.ask(order)
        our_cpu, _, got = our_one.ask(order)
        their_wall, our_wall = their_all.ask(order)[1], our_all.ask(order)[1]
        result["cpu_ratio"].append(their_cpu / our_cpu)
        result["wall_ratio"].append(their_wall / our_wall)
        result["our_wall_seconds"].append(our_wall)
        result["difference"] = float(np.abs(np.asarray(wanted) - got).max())
    for worker in workers:
        worker.stop()
    return result


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    documents = list(docstrings(1500))[:: 1500 // DOCUMENTS][:DOCUMENTS]
    short = [" ".join(text.split()[:60]) for text in documents[:LLM_DOCUMENTS]]
    with tempfile.TemporaryDirectory() as root:
        cross = cross_encoder_folder(Path(root) / "cross-encoder")
        reranker = llm_reranker_folder(Path(root) / "llm-reranker")
        pairs = measure(cenote, cross_encoder, ((cross,), (cross,)), (QUERY, documents), options.rounds)
        llm = LLM(reranker)
        ids = llm.get_tokenizer()(" ".join(documents), add_special_tokens=False)["input_ids"][:PREFIX_TOKENS]
        instruction = llm.get_tokenizer().decode(ids)
        llm.close()
        shared = measure(
            llm_reranker,
            llm_reranker,
            ((reranker, True), (reranker, False)),
            (instruction, QUERY, short),
            options.rounds,
        )
    median = statistics.median
    print(f"\n1 query x {DOCUMENTS} docstrings, MiniLM-L6-shaped cross-encoder, fp32, at most {MAX_TOKENS} tokens")
    row("largest difference to CrossEncoder", f"{pairs['difference']:.1e}", "<= 1e-5")
    row(
        "rerank vs CrossEncoder.predict (sorted, batch 32), CPU, 1 thread",
        f"{median(pairs['cpu_ratio']):.2f} x",
        ">= 1.9",
    )
    row("  same, wall, all threads", f"{median(pairs['wall_ratio']):.2f} x")
    print(
        f"\n1 query x {LLM_DOCUMENTS}, Qwen3-0.6B's shape, {LAYERS} layers, prefix of {PREFIX_TOKENS} tokens and more"
    )
    row("largest difference with and without sharing", f"{shared['difference']:.1e}", "<= 1e-5")
    row("shared prefixes vs none, CPU, 1 thread", f"{median(shared['cpu_ratio']):.2f} x", ">= 1.5")
    row("  same, wall, all threads", f"{median(shared['wall_ratio']):.2f} x")
    if options.save:
        command = f"python -m benchmarks.rerank --rounds {options.rounds}"
        save(options.save, {"cross_encoder": pairs, "llm_reranker": shared}, command)


if __name__ == "__main__":
    main()
