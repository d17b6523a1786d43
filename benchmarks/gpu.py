"""Embedding on a GPU against sentence-transformers and against the GPU's matrix products; and a check that it is right.

    python -m benchmarks.gpu [--save NAME]        the measurement: about five minutes on one H200, eight at most
    python -m benchmarks.gpu --check              every packed architecture of material/zoo.py, in float32 and bfloat16
    python -m benchmarks.gpu --device cpu --tiny  a dry run, of --check too

Models: bge-m3's shape (XLM-RoBERTa large, random weights, MiniLM's vocabulary) and all-MiniLM-L6-v2. Texts of 32, 128
and 512 tokens, and docstrings of mixed length. Rounds are interleaved in one process; ratios are medians of rounds.

"End to end" is texts to vectors, tokenization included, at the better of two batch sizes of sentence-transformers.
"Forward" is token ids to vectors on the host, as the engine runs batches; its share of the GEMM rate counts the Linear
layers of real tokens only, over the rate that `torch.nn.functional.linear` reaches with the same shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

from benchmarks.harness import RESULTS, row, save
from cenote import LLM
from cenote.core import PoolingParams, Sequence
from cenote.models.hub import embedded
from cenote.models.layouts import Packed, forward
from cenote.models.passes.subject import Settings
from cenote.models.passes.table import prepared
from cenote.pipeline.options import TextOptions
from cenote.tensors.graphs import MOST_SEQUENCES, rounded
from cenote.tensors.packing import pack
from material.corpus import docstrings
from material.zoo import FIRST_TOKEN, ZOO, Architecture, build

BATCH_TOKENS = 16384
ST_BATCHES = (32, 256)
MAX_TOKENS = 512


@dataclass(frozen=True)
class Scale:
    """How large all of it is."""

    layers: int = 24
    hidden: int = 1024
    lengths: tuple[str, ...] = ("32", "128", "512", "mixed")
    tokens: int = 400_000
    rounds: int = 3
    queries: int = 50
    parity: int = 64
    rows: int | None = None


TINY = Scale(layers=2, hidden=64, lengths=("32",), tokens=64, rounds=1, queries=1, parity=4, rows=2)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall seconds until the device is done too, and the result."""
    _wait(device)
    began = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - began, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def large(folder: Path, scale: Scale, device: torch.device) -> Path:
    """A checkpoint of bge-m3's shape: CLS pooling, normalised."""
    tokenizer = AutoTokenizer.from_pretrained(embedded(), model_max_length=1024)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.hidden // 64,
        intermediate_size=4 * scale.hidden,
        max_position_embeddings=1026,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with device:
        XLMRobertaModel(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    transformer = st_modules.Transformer(str(folder / "backbone"))
    pooling = st_modules.Pooling(scale.hidden, "cls")
    SentenceTransformer(modules=[transformer, pooling, st_modules.Normalize()], device="cpu").save(str(folder / "st"))
    return folder / "st"


def texts(kind: str, tokens: int, folder: Path) -> list[str]:
    """About `tokens` tokens of text: docstrings, or texts of exactly so many tokens, special ones included."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "mixed":
        own = list(docstrings(400))
        total = sum(len(ids) for ids in tokenizer(own, truncation=True, max_length=MAX_TOKENS)["input_ids"])
        return (own * (tokens // total + 1))[: max(4, tokens * len(own) // total)]
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    drawn = np.random.default_rng(0).choice(words, (max(2, tokens // int(kind)), int(kind) - 2))
    return [" ".join(line) for line in drawn]


def linear_shapes(model: torch.nn.Module) -> list[tuple[int, int]]:
    """(out, in) of every Linear layer that sees every token."""
    return [
        tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    ]


def gemm_rate(shapes: list[tuple[int, int]], device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """FLOP per second of Linear layers of these shapes, each with weights of its own; the best of five rounds."""
    weights = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    inputs = {into: torch.randn(tokens, into, device=device, dtype=dtype) for _, into in shapes}

    def work() -> None:
        for w in weights:
            torch.nn.functional.linear(inputs[w.shape[1]], w)

    with torch.inference_mode():
        best = min(timed(work, device)[0] for _ in range(6))
    return 2 * tokens * sum(w.numel() for w in weights) / best


def engines(folder: Path, device: torch.device) -> dict[str, LLM]:
    """Ours as it comes, with forwards recorded where launching takes longer than running, and with all recorded."""
    options: dict[str, Any] = {"auto_truncate": True, "max_model_len": MAX_TOKENS}
    kinds = {
        "default": {},
        "graphs": {"cuda_graphs": True},
        "all graphs": {"cuda_graphs": True, "max_cudagraph_capture_size": BATCH_TOKENS},
    }
    return {name: LLM(str(folder), device=str(device), **options, **own) for name, own in kinds.items()}


def warm_up(llm: LLM, sequences: list[Sequence]) -> None:
    """Record the shapes that batches of such sequences can fall into."""
    ends = list(accumulate(map(len, sequences[:MOST_SEQUENCES])))
    counts = {rounded(end): count for count, end in enumerate(ends, 1) if end <= BATCH_TOKENS}
    for count in counts.values():
        llm._service.engine.submit(sequences[:count]).result()


def peers(folder: Path, device: torch.device) -> dict[str, SentenceTransformer]:
    """sentence-transformers as it comes (float32), in bfloat16, and with flash attention where that is installed."""
    kinds: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}}
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        kinds["bfloat16, flash"] = {"dtype": torch.bfloat16, "attn_implementation": "flash_attention_2"}
    made = {
        name: SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": torch.float32, **own})
        for name, own in kinds.items()
    }
    for model in made.values():
        model.max_seq_length = MAX_TOKENS
    return made


def encode(peer: SentenceTransformer, own: list[str], size: int = 32) -> np.ndarray:
    """Vectors by sentence-transformers."""
    return np.asarray(peer.encode(own, batch_size=size, show_progress_bar=False), dtype=np.float32)


def embed(llm: LLM, own: list[str]) -> np.ndarray:
    """Vectors by us."""
    return np.array([o.outputs.embedding for o in llm.embed(own, use_tqdm=False)], dtype=np.float32)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of the vectors at the same place."""
    found: np.ndarray = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return found


class Bench:
    """One model: ours and theirs, side by side in one process."""

    def __init__(self, folder: Path, device: torch.device, scale: Scale) -> None:
        self.folder, self.device, self.scale = folder, device, scale
        self.ours, self.peers = engines(folder, device), peers(folder, device)
        report = self.ours["default"].info.report
        self.dtype = getattr(torch, report.dtype)
        self.shapes = linear_shapes(self.peers["bfloat16"])
        self.result: dict[str, Any] = {"dtype": report.dtype, "layout": report.layout, "notes": list(report.warnings)}

    def parity(self) -> None:
        """Cosines to sentence-transformers in float32, of ours and of theirs in bfloat16.

        With random weights all texts have nearly the same vector ("between_texts"): there, little is shown by them.
        """
        own = texts("mixed", self.scale.tokens, self.folder)[: self.scale.parity]
        expected = encode(self.peers["float32"], own)
        among = expected @ expected.T
        cosines = {name: cosine(embed(llm, own), expected) for name, llm in self.ours.items()}
        cosines["sentence-transformers bfloat16"] = cosine(encode(self.peers["bfloat16"], own), expected)
        self.result["cosine_to_float32"] = {
            **{name: {"mean": float(own.mean()), "least": float(own.min())} for name, own in cosines.items()},
            "between_texts": float((among.sum() - len(own)) / (len(own) * (len(own) - 1))),
        }

    def queries(self) -> None:
        """Median milliseconds of one short text, interleaved."""
        query = texts("16", 32, self.folder)[:1]
        works: dict[str, Callable[[], Any]] = {name: partial(embed, llm, query) for name, llm in self.ours.items()}
        works |= {f"sentence-transformers {name}": partial(encode, peer, query) for name, peer in self.peers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.scale.queries + 3):
            for name, work in works.items():
                seconds[name].append(timed(work, self.device)[0])
        self.result["query_ms"] = {name: 1000 * statistics.median(own[3:]) for name, own in seconds.items()}

    def workload(self, kind: str) -> dict[str, Any]:
        """Seconds of every engine for the same texts, and what the GEMM rate would allow."""
        own = texts(kind, self.scale.tokens, self.folder)
        rendered = {
            name: llm._service.renderer.render(own, "embed", PoolingParams(), TextOptions(truncate=-1))
            for name, llm in self.ours.items()
        }
        tokens = sum(map(len, rendered["default"]))
        for name, llm in self.ours.items():
            warm_up(llm, rendered[name])
        sizes = {name: self._better_size(peer, own[: 2 * max(ST_BATCHES)]) for name, peer in self.peers.items()}
        works: dict[str, Callable[[], Any]] = {}
        for name, llm in self.ours.items():
            works[f"{name}, forward"] = partial(self._forward, llm, rendered[name])
            works[f"{name}, end to end"] = partial(embed, llm, own)
        for name, peer in self.peers.items():
            works[f"sentence-transformers {name}"] = partial(encode, peer, own, sizes[name])
        seconds: dict[str, list[float]] = {name: [] for name in works}
        rates = []
        for turn in range(self.scale.rounds + 1):
            for name, work in works.items():
                if turn == 0 and "float32" in name and self.scale is not TINY:
                    continue  # as slow as all others together, and warm
                taken = timed(work, self.device)[0]
                if turn:  # the first is to warm up, and to record
                    seconds[name].append(taken)
            rates.append(gemm_rate(self.shapes, self.device, self.dtype, min(tokens, BATCH_TOKENS)))
        flop = 2 * tokens * sum(a * b for a, b in self.shapes)
        return {
            "texts": len(own),
            "tokens": tokens,
            "seconds": seconds,
            "batch_sizes": sizes,
            "gemm_flop_per_second": rates,
            "share_of_gemm": {
                name: flop / max(rates) / statistics.median(seconds[f"{name}, forward"]) for name in self.ours
            },
            "ratio": {
                name: statistics.median(own) / statistics.median(seconds["default, end to end"])
                for name, own in seconds.items()
                if name.startswith("sentence")
            },
        }

    def _better_size(self, peer: SentenceTransformer, own: list[str]) -> int:
        seconds = {size: timed(partial(encode, peer, own, size), self.device)[0] for size in ST_BATCHES}
        return min(seconds, key=seconds.__getitem__)

    @staticmethod
    def _forward(llm: LLM, sequences: list[Sequence]) -> None:
        llm._service.engine.submit(sequences).result()

    def close(self) -> None:
        """Give the memory back."""
        for llm in self.ours.values():
            llm.close()


def measure(device: torch.device, scale: Scale, deadline: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure both models; `keep` is given all results after every workload."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Callable[[], Path]] = {
            "bge-m3 shape": lambda: large(Path(folder), scale, device),
            "MiniLM": lambda: embedded(),
        }
        for name, path in found.items():
            if time.monotonic() > deadline:
                print(f"{name}: no time left")
                continue
            bench = Bench(path(), device, scale)
            result[name] = bench.result
            bench.parity()
            bench.queries()
            report(name, bench.result)
            for kind in scale.lengths:
                if time.monotonic() > deadline:
                    print(f"  {name}, {kind}: no time left")
                    continue
                bench.result[kind] = bench.workload(kind)
                report_workload(name, kind, bench.result[kind])
                keep(result)
            bench.close()
    keep(result)


def report(name: str, result: dict[str, Any]) -> None:
    """Print what does not depend on lengths."""
    print(f"\n{name}: {result['dtype']}, {result['layout']}; {'; '.join(result['notes'])}")
    for kind, found in result["cosine_to_float32"].items():
        if isinstance(found, dict):
            row(f"  cosine to float32, {kind}: mean, least", f"{found['mean']:.5f}, {found['least']:.5f}")
    for kind, found in result["query_ms"].items():
        row(f"  one query of 16 tokens, {kind}", f"{found:.2f} ms")


def report_workload(name: str, kind: str, found: dict[str, Any]) -> None:
    """Print the figures of one workload."""
    goal = ">= 50 %" if kind == "512" else ""
    for own, share in found["share_of_gemm"].items():
        row(f"  {name}, {kind}: share of the GEMM rate, forward, {own}", f"{share:.0%}", goal)
    for own, ratio in found["ratio"].items():
        row(f"  {name}, {kind}: end to end against {own}", f"{ratio:.2f} x", ">= 3")
    best = statistics.median(found["seconds"]["default, end to end"])
    row(f"  {name}, {kind}: end to end", f"{found['tokens'] / best:,.0f} tokens/s")


def check(device: torch.device, scale: Scale, deadline: float) -> list[dict[str, Any]]:
    """Every packed architecture in both dtypes, recorded where it can be, against itself one sequence at a time.

    Errors are relative to the float32 rows, in the Frobenius norm. In bfloat16 the model's own one-by-one forward has
    one too, and ours may be twice as large.
    """
    found = []
    for architecture in [own for own in ZOO if own.layout == "packed"][: scale.rows]:
        if time.monotonic() > deadline:
            print(f"no time left for {architecture.name} and what follows")
            break
        exact = [alone(build(architecture).to(device), batch) for batch in CHECKED]
        for dtype in (torch.float32, torch.bfloat16):
            own = checked(architecture, device, dtype, exact)
            line = "  {name:<22} {dtype:<9} {layout:<14} {ours:.1e} (alone {alone:.1e}) {verdict} {note}"
            print(line.format(**own), flush=True)
            found.append(own)
    return found


def checked(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, exact: list[torch.Tensor]
) -> dict[str, Any]:
    """One architecture in one dtype."""
    graph_tokens = 1024 if device.type == "cuda" else 0
    subject = prepared(build(architecture).to(device, dtype), Settings(graph_tokens=graph_tokens))
    layout, reasons = subject.layout, subject.reasons
    model = build(architecture).to(device, dtype)
    ours = max(error(forward(layout, pack(own, device)), rows) for own, rows in zip(CHECKED, exact, strict=True))
    own_error = max(error(alone(model, own), rows) for own, rows in zip(CHECKED, exact, strict=True))
    is_right = ours <= (1e-4 if dtype is torch.float32 else 2 * own_error + 1e-2)
    packed = isinstance(layout, Packed)
    return {
        "name": architecture.name,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout.name,
        "ours": ours,
        "alone": own_error,
        "verdict": "ok" if is_right and (packed or dtype is not torch.float32) else "WRONG",
        "fused": packed and layout.is_fused,
        "note": (layout.unrecorded if packed else reasons[0]) or ("" if not packed or layout.is_fused else "in runs"),
    }


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.float() - exact).norm() / exact.norm())


def draw(lengths: tuple[int, ...]) -> list[Sequence]:
    """Random sequences."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [Sequence(torch.randint(FIRST_TOKEN, 300, (n,), generator=generator).tolist()) for n in lengths]


CHECKED = [draw(lengths) for lengths in ((9, 31, 17, 3), (20, 5, 17, 18), (100, 64, 1, 12, 40), (9, 31, 17, 3))]
"""Batches; the first two share a recording."""


def alone(model: torch.nn.Module, sequences: list[Sequence]) -> torch.Tensor:
    """Rows of the model's own eager forward, shortest first, so that no rotary frequency is left grown."""
    rows: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
            rows[i] = model(input_ids=torch.tensor([sequences[i].ids], device=model.device))[0][0].float()
    return torch.cat([rows[i] for i in range(len(sequences))])


def main() -> int:
    """Run, print and save; on a GPU under a dated name unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check", action="store_true", help="whether results are right, instead of how fast")
    parser.add_argument("--tiny", action="store_true", help="small models and few texts: a dry run")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing new is begun")
    parser.add_argument("--save", metavar="NAME", help="write NAME.json")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write it into")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --tiny is a dry run")
    scale, deadline = TINY if options.tiny else Scale(), time.monotonic() + 60 * options.minutes
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    kind = "gpu-check" if options.check else "gpu"
    name = options.save or (f"{date.today().isoformat()}-{kind}" if device.type == "cuda" else None)

    def keep(result: dict[str, Any]) -> None:
        if name:
            command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
            save(name, {"gpu": gpu, **result}, command, folder=options.results)

    print(f"GPU: {gpu}; torch {torch.__version__}")
    if not options.check:
        measure(device, scale, deadline, keep)
        return 0
    found = check(device, scale, deadline)
    wrong = [own for own in found if own["verdict"] != "ok"]
    keep({"checked": found})
    print(f"{len(found)} checked, {len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
