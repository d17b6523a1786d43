"""The cost of `--batch-invariant`: CPU time of forwards with it, over that without, on one thread.

    python -m benchmarks.invariant [--rounds 5] [--save NAME]

Models of the shapes of MiniLM-L6, ModernBERT-base, Qwen3-0.6B, Qwen3-MoE (16 experts) and DeBERTa-v3-small, cut to a
few layers, with random weights. Texts are docstrings; short ones are their first twelve tokens. Batches have 768
tokens, as on a CPU by default. Both run in one process, interleaved; figures are medians of ratios within a round, and
of CPU time a token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeModel,
)

from benchmarks.harness import row, save, timed
from cenote.core import Sequence
from cenote.models.hub import embedded
from cenote.models.layouts import Layout, forward
from cenote.models.passes.narrow import choose as narrowing
from cenote.models.passes.narrow import products
from cenote.models.passes.subject import Settings
from cenote.models.passes.table import prepared
from cenote.tensors import native, process
from cenote.tensors.native import torch_on_one_thread
from cenote.tensors.packing import Batch, pack
from material.corpus import docstrings

BATCH, LONGEST, SHORT = 768, 256, 12
"""Tokens of a batch, of the longest text, and of a short one."""
DECODER = {
    "vocab_size": 31_000,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "MiniLM-L6": (
        lambda: BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)),
        False,
    ),
    "MiniLM-L6, int8": (
        lambda: BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)),
        True,
    ),
    "ModernBERT-base, 6 layers": (
        lambda: ModernBertModel(ModernBertConfig(vocab_size=31_000, num_hidden_layers=6, pad_token_id=0)),
        False,
    ),
    "Qwen3-0.6B, 4 layers": (
        lambda: Qwen3Model(Qwen3Config(**DECODER, intermediate_size=3072, num_hidden_layers=4)),
        False,
    ),
    "Qwen3-MoE, 2 layers": (
        lambda: Qwen3MoeModel(
            Qwen3MoeConfig(
                **DECODER, num_hidden_layers=2, moe_intermediate_size=384, num_experts=16, num_experts_per_tok=4
            )
        ),
        False,
    ),
    "DeBERTa-v3-small, 3 layers": (
        lambda: DebertaV2Model(DebertaV2Config(vocab_size=31_000, num_hidden_layers=3, **DISENTANGLED)),
        False,
    ),
}
"""How each is made, and whether its weights are narrowed to int8."""


def layout(make: Callable[[], PreTrainedModel], *, int8: bool, invariant: bool) -> Layout:
    """The model in the layout that is chosen for it, the same weights in both modes."""
    torch.manual_seed(0)
    kernels, weights = native.load(), narrowing(quantization="int8" if int8 else "none")
    settings = Settings(
        max_length=512,
        kernels=kernels,
        products=products(kernels, weights, steady=invariant),
        narrowing=weights,
        invariant=invariant,
    )
    subject = prepared(make().eval(), settings, leave_out=("last_layer", "graphs"))
    if invariant:
        print(f"  {subject.outcomes['company'].text}", flush=True)
    return subject.layout


def batches(texts: list[list[int]]) -> list[Batch]:
    """The texts in batches of at most `BATCH` tokens, the longest first in each."""
    parts: list[list[list[int]]] = [[]]
    for ids in texts:
        if sum(map(len, parts[-1])) + len(ids) > BATCH:
            parts.append([])
        parts[-1].append(ids)
    return [pack([Sequence(ids) for ids in sorted(part, key=len, reverse=True)]) for part in parts]


def run(layout: Layout, work: list[Batch], *, invariant: bool) -> None:
    """Run the backbone over batches."""
    with torch.inference_mode():
        for batch in work:
            if invariant:
                with torch_on_one_thread():
                    forward(layout, batch)
            else:
                forward(layout, batch)


def measure(name: str, works: dict[str, list[Batch]], rounds: int) -> dict[str, Any]:
    """Ratios and CPU time a token of one model, by kind of batch."""
    make, int8 = MODELS[name]
    print(f"\n{name}")
    layouts = {invariant: layout(make, int8=int8, invariant=invariant) for invariant in (False, True)}
    result: dict[str, Any] = {}
    for kind, work in works.items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds + 1):
            for invariant, used in seconds.items():
                used.append(timed(partial(run, layouts[invariant], work, invariant=invariant))[0])
        tokens = sum(batch.tokens for batch in work)
        pairs = list(zip(seconds[True][1:], seconds[False][1:], strict=True))  # the first round warms up
        ratio = statistics.median(over / under for over, under in pairs)
        usual, kept = (1e6 * statistics.median(pair[i] for pair in pairs) / tokens for i in (1, 0))
        row(f"  {kind}: {usual:.0f} -> {kept:.0f} us a token", f"{ratio:.2f} x")
        result[kind] = {"ratio": ratio, "us_per_token": usual, "us_per_token_invariant": kept, "tokens": tokens}
    return result


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    process.keep_freed_memory(31 << 20)
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    texts = [ids[:LONGEST] for ids in tokenizer(list(docstrings(1500))[::37], truncation=True)["input_ids"]]
    works = {
        "mixed lengths": batches(texts),
        "short texts": batches([ids[:SHORT] for ids in texts] * 2),
        "one short text": batches([texts[0][:SHORT]]),
    }
    result = {name: measure(name, works, options.rounds) for name in MODELS}
    if options.save:
        save(options.save, result, f"python -m benchmarks.invariant --rounds {options.rounds}")


if __name__ == "__main__":
    main()
