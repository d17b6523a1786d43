"""Late interaction and bge-m3's three outputs.

    python -m benchmarks.search [--rounds 5] [--save NAME]

Encoding 300 docstrings as ColBERT documents (MiniLM-L6's shape and weights, random projection to 128) against
sentence-transformers' MultiVectorEncoder; MaxSim of 1 query x 1,000 documents of mixed length against a padded einsum;
dense, sparse and token vectors of one forward against dense alone (a bge-m3 with MiniLM's backbone and random heads).
Engines take turns, each in a process of its own; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Encode, Worker, row, save, timed
from cenote import LLM
from cenote.models.hub import embedded
from cenote.tensors.similarity import max_sim
from material.corpus import docstrings

MAX_TOKENS = 256
DOCUMENTS = 300
WIDTH = 384


def colbert(root: Path) -> str:
    """A ColBERT folder as sentence-transformers writes it."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    torch.manual_seed(0)
    of_tokens = {"module_input_name": "token_embeddings"}
    modules = [
        Transformer(str(embedded()), document_length=MAX_TOKENS),
        Dense(WIDTH, 128, bias=False, activation_function=torch.nn.Identity(), **of_tokens),
        MultiVectorMask(),
        Normalize(**of_tokens),
    ]
    MultiVectorEncoder(modules=modules, device="cpu").save_pretrained(str(root / "colbert"))
    return str(root / "colbert")


def bge_m3(root: Path) -> str:
    """A folder with bge-m3's heads beside MiniLM's backbone."""
    folder = root / "bge-m3"
    shutil.copytree(embedded(), folder)
    for file, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", WIDTH)):
        torch.save({"weight": torch.randn(width, WIDTH) / WIDTH**0.5, "bias": torch.zeros(width)}, folder / file)
    return str(folder)


def cenote(folder: str, tasks: list[str]) -> Encode:
    """Results of `tasks` for texts."""
    llm = LLM(folder, auto_truncate=True, max_model_len=MAX_TOKENS)
    kind = {"input_type": "document"} if "colbert" in Path(folder).name else {}

    def encode(texts: list[str]) -> Any:
        return [o.outputs.data.numpy() for o in llm.encode(texts, pooling_task=tasks, use_tqdm=False, **kind)]

    return encode


def sentence_transformers(folder: str) -> Encode:
    """Token vectors of documents."""
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(folder, device="cpu")
    return lambda texts: [np.asarray(v) for v in model.encode_document(texts, batch_size=32, show_progress_bar=False)]


def in_turn(first: tuple[Any, ...], second: tuple[Any, ...], texts: list[str], rounds: int) -> dict[str, Any]:
    """CPU seconds (1 thread) and wall seconds (all) of the first over the second; the last answers' difference."""
    cores = os.cpu_count() or 1
    one = [Worker(*engine, threads=1) for engine in (first, second)]
    every = [Worker(*engine, threads=cores) for engine in (first, second)]
    for worker in (*one, *every):
        worker.ask(texts[:32])
    result: dict[str, Any] = {"cpu_ratio": [], "wall_ratio": []}
    for _ in range(rounds):
        (slow, _, wanted), (fast, _, got) = (worker.ask(texts) for worker in one)
        result["cpu_ratio"].append(slow / fast)
        slow_wall, fast_wall = (worker.ask(texts)[1] for worker in every)
        result["wall_ratio"].append(slow_wall / fast_wall)
    result["difference"] = float(max(np.abs(a - b).max() for a, b in zip(wanted, got, strict=True)))
    for worker in (*one, *every):
        worker.stop()
    return result


def padded_max_sim(query_QD: torch.Tensor, documents: list[torch.Tensor]) -> torch.Tensor:
    """MaxSim as it is usually written: pad, multiply all, mask, maximum, sum."""
    padded_NTD = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    lengths = torch.tensor([len(document) for document in documents])
    hidden_NT = torch.arange(padded_NTD.shape[1]) >= lengths[:, None]
    products_NQT = torch.einsum("qd,ntd->nqt", query_QD, padded_NTD)
    return products_NQT.masked_fill(hidden_NT[:, None], float("-inf")).amax(-1).sum(-1)


def scoring(rounds: int) -> dict[str, Any]:
    """Padded over ragged MaxSim, wall seconds with all threads."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 301, (1000,), generator=generator).tolist()
    documents = [torch.nn.functional.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in lengths]
    query = torch.nn.functional.normalize(torch.randn(32, 128, generator=generator), dim=1)
    arrays = [document.numpy() for document in documents]
    ratios = []
    for _ in range(rounds + 2):
        _, slow, wanted = timed(lambda: padded_max_sim(query, documents))
        _, fast, got = timed(lambda: max_sim(query.numpy(), arrays))
        ratios.append(slow / fast)
    return {"wall_ratio": ratios[2:], "difference": float(np.abs(wanted.numpy() - got).max())}


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    texts = list(docstrings(1500))[:: 1500 // DOCUMENTS][:DOCUMENTS]
    with tempfile.TemporaryDirectory() as root:
        folder, three = colbert(Path(root)), bge_m3(Path(root))
        tasks = ["embed", "sparse", "token_embed"]
        result = {
            "colbert": in_turn(
                (sentence_transformers, folder), (cenote, folder, ["token_embed"]), texts, options.rounds
            ),
            "max_sim": scoring(options.rounds),
            "bge_m3": in_turn((cenote, three, tasks), (cenote, three, ["embed"]), texts, options.rounds),
        }
    median = statistics.median
    late, sim, m3 = result["colbert"], result["max_sim"], result["bge_m3"]
    row("ColBERT: largest difference to MultiVectorEncoder", f"{late['difference']:.1e}", "<= 1e-5")
    row(f"{DOCUMENTS} documents vs MultiVectorEncoder, CPU, 1 thread", f"{median(late['cpu_ratio']):.2f} x", ">= 1.9")
    row("  same, wall, all threads", f"{median(late['wall_ratio']):.2f} x")
    row("MaxSim 1 x 1,000: largest difference to a padded einsum", f"{sim['difference']:.1e}", "<= 1e-5")
    row("  padded einsum / ragged, wall, all threads", f"{median(sim['wall_ratio']):.2f} x", ">= 3")
    row("bge-m3: three outputs / dense alone, CPU, 1 thread", f"{median(m3['cpu_ratio']):.2f} x", "<= 1.15")
    row("  same, wall, all threads", f"{median(m3['wall_ratio']):.2f} x")
    if options.save:
        save(options.save, result, f"python -m benchmarks.search --rounds {options.rounds}")


if __name__ == "__main__":
    main()
