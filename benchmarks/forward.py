"""Forwards alone, on one thread: how near they come to the GEMM limit, and what each way to run them gains.

    python -m benchmarks.forward [--rounds 5] [--save NAME]

The texts are docstrings of at most 256 tokens; the models have the shapes of MiniLM-L6, bge-base, Qwen3-0.6B and
DeBERTa-v3-small (3 layers) and random weights. Everything runs in one process, interleaved; figures are medians of
ratios of process CPU time within a round. The GEMM limit is what `torch.nn.functional.linear` takes for the same
products, over 2,048 rows of random numbers, in the same round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
)

from benchmarks.harness import row, save, timed
from cenote.core import Sequence
from cenote.models.hub import embedded
from cenote.models.layouts import Layout, forward
from cenote.models.passes.fuse import Remembered
from cenote.models.passes.subject import Settings
from cenote.models.passes.table import prepared
from cenote.tensors import linear, native, process
from cenote.tensors.packing import Batch, pack
from material.corpus import docstrings

MAX_TOKENS = 256
VOCABULARY = 31_000
ROWS = 2048

Works = dict[str, Callable[[], Any]]


def bert(width: int, layers: int) -> BertModel:
    """BERT with heads of the size that such a width usually has."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
    )
    return BertModel(config, add_pooling_layer=False)


def qwen3(layers: int = 28) -> Qwen3Model:
    """Qwen3-0.6B, but for the vocabulary."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    return Qwen3Model(config)


def deberta() -> DebertaV2Model:
    """DeBERTa-v3-small, half as deep."""
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=512,
        position_biased_input=False,
        type_vocab_size=0,
    )
    return DebertaV2Model(config)


def linears(model: nn.Module) -> list[tuple[int, int]]:
    """Shapes of the Linear layers, before they are packed."""
    return [(x.out_features, x.in_features) for x in model.modules() if isinstance(x, nn.Linear)]


def timings(works: Works, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each, interleaved, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            seconds[name].append(timed(work)[0])
    return {name: own[1:] for name, own in seconds.items()}  # the first round warms up


def ratio(found: dict[str, list[float]], over: str, under: str, factor: float = 1.0) -> float:
    """Median of the ratios within a round, times `factor`."""
    return factor * statistics.median(a / b for a, b in zip(found[over], found[under], strict=True))


def padded(model: PreTrainedModel, ids: list[list[int]], size: int) -> Callable[[], None]:
    """Transformers' own forward over padded batches of `size`, sorted by length."""
    ordered = sorted(ids, key=len, reverse=True)
    batches = []
    for i in range(0, len(ordered), size):
        part = ordered[i : i + size]
        tokens = torch.zeros(len(part), len(part[0]), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for place, own in enumerate(part):
            tokens[place, : len(own)] = torch.tensor(own)
            mask[place, : len(own)] = 1
        batches.append({"input_ids": tokens, "attention_mask": mask})

    def work() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch)

    return work


def products(shapes: list[tuple[int, int]]) -> tuple[Callable[[], None], float]:
    """The matrix products of some layers over `ROWS` rows of random numbers, and which part of `shapes` they are."""
    some = shapes[: 7 * max(1, len(shapes) // 28)]  # layers are alike
    weights = [torch.randn(out, into) for out, into in some]
    inputs = {into: torch.randn(ROWS, into) for _, into in some}

    def work() -> None:
        with torch.inference_mode():
            for weight in weights:
                nn.functional.linear(inputs[weight.shape[1]], weight)

    return work, sum(a * b for a, b in some) / sum(a * b for a, b in shapes)


def encoder(width: int, layers: int, ids: list[list[int]], rounds: int) -> dict[str, Any]:
    """Share of the GEMM limit, sorted padding, and the last layer for the first tokens alone."""
    torch.manual_seed(0)
    plain = bert(width, layers).eval()
    shapes = linears(plain)
    layout, batch = packed(copy.deepcopy(plain), ids)
    gemm, part = products(shapes)
    works: Works = {
        "packed": partial(forward, layout, batch),
        "gemm": gemm,
        "first": partial(forward, layout, batch, "first"),
        "sorted": padded(plain, ids, 8),
    }
    found = timings(works, rounds)
    # Of the units of a layer, 12 x width^2 a token: 4 for the attention, 8 for the feed-forward part.
    return {
        "tokens": batch.tokens,
        "gemm_fraction": ratio(found, "gemm", "packed", batch.tokens / ROWS / part),
        "sorted_ratio": ratio(found, "sorted", "packed"),
        "last_layer": ratio(found, "packed", "first"),
        "last_layer_predicted": 1 / (1 - 9 / 12 / layers),
        "seconds": found,
    }


def decoder(ids: list[list[int]], rounds: int) -> dict[str, Any]:
    """Qwen3-0.6B's shape against one padded batch and sorted small ones, its share of the limit, and its last layer."""
    torch.manual_seed(0)
    plain = qwen3().eval()
    shapes = linears(plain)
    copied = copy.deepcopy(plain)
    layout, batch = packed(copied, ids)
    gemm, part = products(shapes)
    works: Works = {
        "packed": partial(forward, layout, batch),
        "gemm": gemm,
        "last": partial(forward, layout, batch, "last"),
        "one": padded(plain, ids, len(ids)),
        "sorted": padded(plain, ids, 4),
    }
    found = timings(works, rounds)
    spared = (2 * 1024 * 2048 + 3 * 1024 * 3072) / sum(a * b for a, b in shapes)
    return {
        "tokens": batch.tokens,
        "gemm_fraction": ratio(found, "gemm", "packed", batch.tokens / ROWS / part),
        "one_ratio": ratio(found, "one", "last"),
        "sorted_ratio": ratio(found, "sorted", "last"),
        "last_layer": ratio(found, "packed", "last"),
        "last_layer_predicted": 1 / (1 - spared),
        "seconds": found,
    }


def relative_positions(ids: list[list[int]], rounds: int) -> dict[str, Any]:
    """DeBERTa with and without remembering what it makes of its positions: a batch, and a query of 12 tokens."""
    torch.manual_seed(0)
    model = deberta().eval()
    layout, batch = packed(model, ids)
    query = pack([Sequence(ids[0][:12])])
    memories = [(x, own) for x in model.modules() if isinstance(own := vars(x).get("forward"), Remembered)]

    def run(on: bool, what: Batch) -> None:
        for module, memory in memories:
            vars(module)["forward"] = memory if on else memory.plain
        forward(layout, what)

    found = timings(
        {
            f"{name} {on}": partial(run, on, what)
            for name, what in (("batch", batch), ("query", query))
            for on in (0, 1)
        },
        rounds,
    )
    return {what: ratio(found, f"{what} 0", f"{what} 1") for what in ("batch", "query")}


def packed(model: PreTrainedModel, ids: list[list[int]]) -> tuple[Layout, Batch]:
    """The layout that is chosen for a model, and a batch."""
    kernels = native.load()
    subject = prepared(model, Settings(kernels=kernels, products=linear.float32(kernels)))
    for reason in subject.reasons:
        print(f"  {type(model).__name__}: {reason}")
    return subject.layout, pack([Sequence(own) for own in sorted(ids, key=len, reverse=True)])


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    process.keep_freed_memory(31 << 20)
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    ids = [own[:MAX_TOKENS] for own in tokenizer(list(docstrings(1500))[::37], truncation=True)["input_ids"]]
    result = {
        "minilm": encoder(384, 6, ids, options.rounds),
        "bge-base": encoder(768, 12, ids, options.rounds),
        "decoder": decoder(ids[:16], min(options.rounds, 3)),
        "deberta": relative_positions(ids[:32], options.rounds),
    }
    for name in ("minilm", "bge-base"):
        own = result[name]
        print(f"\n{name}'s shape, {own['tokens']} tokens, fp32, CPU time, 1 thread")
        row("share of the GEMM limit", f"{own['gemm_fraction']:.0%}", ">= 80 %")
        row("packed vs sorted by tokens, padded, batch 8", f"{own['sorted_ratio']:.2f} x", ">= 1.1")
        predicted = f"{own['last_layer_predicted']:.2f} predicted"
        row("last layer for the first tokens alone vs for all", f"{own['last_layer']:.2f} x", predicted)
    own = result["decoder"]
    print(f"\nQwen3-0.6B's shape, 28 layers, 16 texts, {own['tokens']} tokens, last token pooled")
    row("vs one padded batch of 16", f"{own['one_ratio']:.2f} x", ">= 3")
    row("vs sorted padded batches of 4", f"{own['sorted_ratio']:.2f} x", ">= 1.6")
    row("share of the GEMM limit, all tokens", f"{own['gemm_fraction']:.0%}", ">= 80 %")
    predicted = f"{own['last_layer_predicted']:.2f} predicted"
    row("last layer for the last tokens alone vs for all", f"{own['last_layer']:.2f} x", predicted)
    print("\nDeBERTa-v3-small's shape, 3 layers")
    row("relative positions remembered vs not, 32 texts", f"{result['deberta']['batch']:.2f} x")
    row("  same, one query of 12 tokens", f"{result['deberta']['query']:.2f} x")
    if options.save:
        save(options.save, result, f"python -m benchmarks.forward --rounds {options.rounds}")


if __name__ == "__main__":
    main()
