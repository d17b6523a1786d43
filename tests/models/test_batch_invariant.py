"""`batch_invariant`: a row has the same bits whatever shares its batch, the order, and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cenote import LLM
from cenote.config import Isa, ModelConfig
from cenote.core import PoolingParams, Sequence
from cenote.models.layouts import forward
from cenote.models.load import load
from cenote.models.model import PoolingModel
from cenote.models.passes import narrow
from cenote.models.passes.subject import Settings, Subject
from cenote.models.passes.table import prepared
from cenote.tensors import native
from cenote.tensors.native import torch_on_one_thread
from cenote.tensors.packing import pack
from material.zoo import FIRST_TOKEN, VOCABULARY, ZOO, build
from tests.checkpoints import classifier, decoder
from tests.models.families.test_bge_m3 import m3
from tests.models.test_parity_zoo import missing
from tests.threads import threads

pytestmark = pytest.mark.full  # bits of rows whose figures `make test` compares
ROWS = {row.name: row for row in ZOO}
TOGETHER = ("bert", "xlm-roberta", "modernbert", "qwen3", "gemma3", "electra", "nomic-bert")
"""Sequences share forwards; the others have forwards of their own."""
APART = ("qwen3-moe", "mixtral", "gpt-oss", "deberta-v2", "gemma2", "t5", "mpnet", "gpt2")
NARROWED = ("bert", "modernbert", "qwen3", "qwen3-moe", "deberta-v2")
WANTED = 37
"""Tokens of the sequence that is watched."""
KERNELS = native.chosen("auto") != "none"


@cache
def subject(name: str, kind: str = "float32", isa: Isa = "auto", *, invariant: bool = True) -> Subject:
    kernels = native.load(isa)
    narrowing = narrow.choose(
        quantization="int8" if kind == "int8" else "none", dtype=torch.bfloat16 if kind == "bfloat16" else None, isa=isa
    )
    products = narrow.products(kernels, narrowing, steady=invariant)
    settings = Settings(max_length=150, kernels=kernels, products=products, narrowing=narrowing, invariant=invariant)
    return prepared(build(ROWS[name]), settings, leave_out=("last_layer", "graphs") if invariant else ())


def draw(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(FIRST_TOKEN, VOCABULARY, length).tolist()


def companies() -> Iterator[tuple[list[list[int]], int]]:
    """Batches, random and directed, and the place of the sequence that is watched, which is the same in all."""
    rng = np.random.default_rng(5)
    wanted = draw(rng, WANTED)
    prefixed = [[*wanted[:20], *draw(rng, n)] for n in (1, 9, 40)]
    boundary = [draw(rng, n) for n in (31, 64)]
    many = [draw(rng, 1) for _ in range(20)]
    batches = [
        [*prefixed, wanted],  # a common beginning
        [draw(rng, WANTED), wanted, draw(rng, WANTED)],  # one length
        [draw(rng, 130), wanted],  # behind the longest
        [wanted, *many],
        [*boundary, wanted],  # over the edge of a block
        [wanted, wanted],
    ]
    for count in (3, 9):
        others = [draw(rng, int(n)) for n in rng.integers(1, 120, count)]
        batches.append([*others, wanted])
    for batch in batches:
        yield batch, batch.index(wanted)


def rows(subject: Subject, batch: list[list[int]], place: int) -> Tensor:
    with torch_on_one_thread():
        return forward(subject.layout, pack([Sequence(ids) for ids in batch])).split(list(map(len, batch)))[place]


def check(subject: Subject) -> None:
    batch, place = next(companies())
    with threads(1):
        alone = rows(subject, [batch[place]], 0)
    batches = [*companies()]
    for count, some in ((1, batches), (2, batches[:2]), (8, batches[1:2])):
        with threads(count):
            for batch, place in some:
                assert torch.equal(rows(subject, batch, place), alone), (count, list(map(len, batch)))
    assert torch.isfinite(alone).all()


@pytest.mark.parametrize("name", TOGETHER + APART)
def test_no_bit_moves_in_float32(name: str) -> None:
    model = subject(name)
    assert model.layout.is_apart == (name in APART or not KERNELS), model.outcomes["company"].text
    check(model)


@pytest.mark.skipif(not KERNELS, reason="CENOTE_ISA switches the kernels off")
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", NARROWED)
def test_no_bit_moves_with_narrow_weights(name: str, kind: str) -> None:
    model = subject(name, kind)
    assert model.outcomes["narrow"].text
    assert model.layout.is_apart == (name in APART)
    check(model)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("isa", ["none", "avx2", "avx512", "amx"])
def test_no_bit_moves_by_any_instructions(isa: Isa, kind: str) -> None:
    if reason := missing(isa):
        pytest.skip(reason)
    if (isa, kind) == ("none", "int8"):
        pytest.skip("there is no int8 without kernels")
    for name in ("modernbert", "qwen3"):
        model = subject(name, kind, isa)
        assert model.layout.is_apart == (isa == "none")
        check(model)


def seen(subject: Subject, batch: list[list[int]]) -> list[tuple[int, int]]:
    """The tokens and torch's threads of each forward over `batch`."""
    forwards: list[tuple[int, int]] = []

    def note(module: object, args: tuple[Tensor, ...], output: object) -> None:
        forwards.append((args[0].numel(), torch.get_num_threads()))

    hook = subject.backbone.get_input_embeddings().register_forward_hook(note)
    try:
        one_thread = torch_on_one_thread() if subject.settings.invariant else nullcontext()
        with threads(2), one_thread:
            forward(subject.layout, pack([Sequence(ids) for ids in batch]))
    finally:
        hook.remove()
    return forwards


@pytest.mark.skipif(not KERNELS, reason="CENOTE_ISA switches the kernels off")
@pytest.mark.parametrize(
    ("name", "usual", "invariant"),
    [
        ("modernbert", [(42, 2)], [(64, 1)]),
        ("qwen3-moe", [(42, 2)], [(5, 1), (37, 1)]),
        ("deberta-v2", [(74, 2)], [(37, 1), (5, 1)]),
    ],
)
def test_forwards_by_which_rows_would_depend_on_each_other(
    name: str, usual: list[tuple[int, int]], invariant: list[tuple[int, int]]
) -> None:
    """Ends of tensors, experts over all tokens, padding: whether that moves a bit is a matter of the processor."""
    rng = np.random.default_rng(1)
    batch = [draw(rng, 5), draw(rng, 37)]
    assert seen(subject(name, invariant=False), batch) == usual
    assert seen(subject(name), batch) == invariant


@pytest.mark.skipif(not KERNELS, reason="CENOTE_ISA switches the kernels off")
@pytest.mark.parametrize("isa", ["auto", "avx2"])
@pytest.mark.parametrize(
    ("name", "length", "other"),
    [
        pytest.param("modernbert", 1, 9, id="modernbert: one row of a gated layer lies in one piece, several do not"),
        pytest.param("deberta-v2", 5, 101, id="deberta-v2: sums over padding"),
        pytest.param("qwen3-moe", 5, 130, id="qwen3-moe: products by the rows of an expert"),
    ],
)
def test_each_cause_moves_bits_without_the_mode(name: str, length: int, other: int, isa: Isa) -> None:
    """A directed neighbour, so that the tests above would fail without the mode."""
    if reason := missing(isa):
        pytest.skip(reason)
    rng = np.random.default_rng(3)
    batch = [draw(rng, other), draw(rng, length)]
    moved = []
    with threads(1):
        for invariant in (False, True):
            model = subject(name, isa=isa, invariant=invariant)
            moved.append(not torch.equal(rows(model, batch, 1), rows(model, batch[1:], 0)))
    assert moved == [True, False]


@pytest.mark.skipif(not KERNELS, reason="CENOTE_ISA switches the kernels off")
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_attention_over_prefixes_by_torch_is_left_out(kind: str) -> None:
    """Shared by default in float32, where it moves rows by rounding; in int8 it moved them by 8e-3."""
    usual, model = subject("gemma2", kind, invariant=False).layout, subject("gemma2", kind).layout
    assert usual.shares_prefixes == (kind == "float32")
    assert not model.shares_prefixes


def loaded(folder: Path, **options: object) -> PoolingModel:
    return load(ModelConfig(model=str(folder), batch_invariant=True, **options))[0]  # type: ignore[arg-type]


def bits(model: PoolingModel, *sequences: Sequence) -> list[bytes]:
    """The bytes of the first sequence's outputs."""
    output = model.launch(sequences).finish()[0]
    return [part.data.tobytes() for part in (output, *output.others.values())]  # type: ignore[union-attr]


bge_m3 = m3
"""The fixture of a checkpoint."""


def test_heads_poolers_and_other_tasks_move_no_bit(tmp_path: Path, bge_m3: Path) -> None:
    """A cross-encoder, all three outputs of bge-m3, and a decoder's last token beside whole texts."""
    rng = np.random.default_rng(2)
    texts = [rng.integers(5, 60, int(n)).tolist() for n in (19, 3, 40, 19, 1, 7)]
    cross = loaded(classifier(tmp_path / "cross", num_labels=1, hidden_size=96))
    m3 = loaded(bge_m3)
    last = loaded(decoder(tmp_path / "last", "Qwen3Model"))
    for model, task, also in (
        (cross, "classify", ()),
        (cross, "embed", ("token_embed",)),
        (m3, "embed", ("sparse", "token_embed")),
        (last, "embed", ()),
    ):
        wanted = Sequence(texts[0], task=task, also=also)
        alone = bits(model, wanted)
        same = [Sequence(ids, task=task, also=also) for ids in texts]
        others = [Sequence(ids, task="token_embed", params=PoolingParams(use_activation=False)) for ids in texts]
        for company in (same, same[::-1], others, [*others[1:], *same]):
            assert bits(model, wanted, *company) == alone


def test_alone_or_served(tmp_path: Path) -> None:
    """Scores, too: late interaction multiplies each document by itself."""
    folder = decoder(tmp_path, "Qwen3Model")
    texts = ["old boat", "the lake is deep and clear", "a", "quick brown fox jumps", "old boat", "water"]
    found = []
    for options in ({"threads": 1}, {"threads": 2}, {"threads": 2, "max_num_batched_tokens": 8}):
        with LLM(model=str(folder), batch_invariant=True, **options) as llm:  # type: ignore[arg-type]
            found += [[output.outputs.data for output in llm.encode(texts, pooling_task=x)] for x in ("embed",)]
            found.append([llm.encode(text, pooling_task="embed")[0].outputs.data for text in texts])
            tokens = llm.encode(texts, pooling_task="token_embed")
            together = llm.similarity(tokens[:1], tokens)
            singly = torch.cat([llm.similarity(tokens[:1], [other]) for other in tokens], dim=1)
            assert torch.equal(together, singly)
    for vectors in found[1:]:
        assert all(map(torch.equal, vectors, found[0]))
