"""Every architecture, packed or padded as the probe decides, equals itself: eager, one sequence at a time, fp32.

And forwards of several threads beside each other equal those, unless the model remembers something between them.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from cenote.config import Isa
from cenote.core import Sequence
from cenote.errors import ConfigError
from cenote.models.layouts import forward
from cenote.models.passes.subject import Settings, Subject
from cenote.models.passes.table import prepared
from cenote.models.probe import stable
from cenote.tensors import linear, native
from cenote.tensors.packing import pack
from material.zoo import FIRST_TOKEN, ZOO, Architecture, build

LAYOUTS = json.loads((Path(__file__).parents[1] / "data" / "layouts.json").read_text())
"""The layout of each architecture, whether it shares prefixes, and the tokens for which alone its last layer can run:
the same on every processor, with any number of threads."""
LENGTHS = (17, 3, 100, 40, 1, 17, 64)
AMPLIFIES = {"qwen3.5", "qwen3-next"}
"""Architectures whose recurrence amplifies rounding: see `amplified`."""
DRAWS = 8
ROUNDOFF = torch.finfo(torch.float32).eps / 2


def sequences(vocab: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(7)
    return [Sequence(torch.randint(FIRST_TOKEN, vocab, (n,), generator=generator).tolist()) for n in LENGTHS]


def alone(model: torch.nn.Module, batch: list[Sequence]) -> list[torch.Tensor]:
    """The reference: the model's own eager forward, shortest first, so that no rotary frequency is left grown."""
    rows: dict[int, torch.Tensor] = {}
    for i in sorted(range(len(batch)), key=lambda i: len(batch[i])):
        ids = torch.tensor([batch[i].ids])
        with torch.inference_mode():
            rows[i] = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
    return [rows[i] for i in range(len(batch))]


def in_float64(architecture: Architecture) -> torch.nn.Module:
    """The model in float64; grouped products over experts take no float64."""
    model = build(architecture).double()
    model.set_experts_implementation("eager")
    return model


@functools.cache
def amplified(name: str) -> tuple[torch.Tensor, float]:
    """Rows in float64 `[T, D]`, and how far they move at most when float32 rounds each weight once, in 8 draws.

    A forward in float32 rounds more often than that, so whoever is no further away has lost nothing.
    """
    architecture = next(row for row in ZOO if row.name == name)
    exact = in_float64(architecture)
    batch = sequences(exact.get_input_embeddings().weight.shape[0])
    exact_TD, furthest = torch.cat(alone(exact, batch)), 0.0
    draw = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        moved = in_float64(architecture)
        for weight in moved.parameters():
            rounding = torch.rand(weight.shape, generator=draw, dtype=torch.float64) * 2 - 1
            weight.data *= 1 + rounding * ROUNDOFF
        moved_TD = torch.cat(alone(moved, batch))
        furthest = max(furthest, float((moved_TD - exact_TD).abs().max()))
    return exact_TD, furthest


PRODUCTS: dict[str, Isa] = {"torch": "none", "AVX2": "avx2", "BLAS": "avx512", "AMX": "amx"}
"""What multiplies, and the instructions of the kernels beside it: with wide vectors that is a BLAS, or AMX."""


def missing(isa: Isa) -> str:
    """Why the kernels of `isa` cannot be had on this machine; empty if they can."""
    try:
        linear.require(isa)
    except ConfigError as error:
        return str(error)
    return ""


def kept() -> Isa:
    """The kernels that `make test` runs: those of `CENOTE_ISA`, or the fastest."""
    isa = native.chosen("auto")
    return isa if isa != "auto" else next(x for x in reversed(PRODUCTS.values()) if not missing(x))


KEPT = kept()


def make(name: str, isa: Isa) -> tuple[Subject, torch.Tensor]:
    """An architecture after all passes, and its rows of `sequences`, `[T, D]`."""
    kernels = native.load(isa)
    model = build(next(row for row in ZOO if row.name == name))
    subject = prepared(model, Settings(kernels=kernels, products=linear.float32(kernels)))
    return subject, forward(subject.layout, pack(sequences(model.get_input_embeddings().weight.shape[0])))


_once = functools.cache(make)


def once(architecture: Architecture, isa: Isa) -> tuple[Subject, torch.Tensor]:
    """`make`, once where several tests have the same."""
    return (_once if isa == KEPT else make)(architecture.name, isa)


@pytest.mark.parametrize(
    "isa",
    [pytest.param(x, id=name, marks=() if x == KEPT else pytest.mark.full) for name, x in PRODUCTS.items()],
)
@pytest.mark.parametrize("architecture", ZOO, ids=lambda a: a.name)
def test_equals_eager_one_by_one(architecture: Architecture, isa: Isa) -> None:
    """By plain torch, and with the kernels of every instruction set that the processor has."""
    if reason := missing(isa):
        pytest.skip(reason)
    model = build(architecture)
    batch = sequences(model.get_input_embeddings().weight.shape[0])
    expected = alone(model, batch)
    subject, rows_TD = once(architecture, isa)
    layout = subject.layout
    assert layout.name == architecture.layout, subject.reasons
    hidden = rows_TD.split([len(s) for s in batch])
    scale = max(1.0, max(float(rows.abs().max()) for rows in expected))
    if isa != "none" and architecture.name in AMPLIFIES:
        exact, furthest = amplified(architecture.name)
        eager_off = float((torch.cat(expected) - exact).abs().max())
        assert (torch.cat(hidden) - exact).abs().max() <= max(eager_off, furthest) + 1e-5 * scale
        assert torch.allclose(torch.cat(hidden), torch.cat(expected), rtol=0, atol=1e-4 * scale)
    else:
        for got, wanted in zip(hidden, expected, strict=True):
            assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * scale), float((got - wanted).abs().max())
    places = sorted(getattr(layout, "places", ()))
    row = {"layout": layout.name, "shares_prefixes": layout.shares_prefixes, "places": places}
    assert row == LAYOUTS[architecture.name]
    for place in getattr(layout, "places", ()):
        at = pack(batch).rows_at(place)
        got = forward(layout, pack(batch), place)
        assert torch.allclose(got[at], torch.cat(expected)[at], rtol=0, atol=1e-5 * scale)
        got[at] = torch.nan
        assert got.isnan().all(), "rows that nobody wants were computed"
    spread = torch.stack([rows[-1] for rows in expected]).std(dim=0).mean()
    assert spread > 1e-3, "the tiny checkpoint gives nearly the same rows for all inputs and would prove nothing"


# --- beside each other ---------------------------------------------------------------------------------------------

STATEFUL = {"funnel", "llama-dynamic-rope", "phi3-longrope", "recurrent-gemma"}
"""Architectures whose modules remember something between forwards."""
BESIDE = ((9, 4), (17, 3, 12), (30,), (5, 5, 5, 22))
"""Tokens of the sequences of batches that run beside each other."""


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ZOO, ids=lambda a: a.name)
def test_forwards_beside_each_other_give_what_each_gives_alone(architecture: Architecture, hasty: None) -> None:
    subject, rows_TD = once(architecture, KEPT)
    model, layout = subject.full, subject.layout
    vocabulary = model.get_input_embeddings().weight.shape[0]
    assert torch.equal(forward(layout, pack(sequences(vocabulary))), rows_TD), "another test has changed the model"
    generator = torch.Generator().manual_seed(3)
    batches = [
        pack([Sequence(torch.randint(FIRST_TOKEN, vocabulary, (n,), generator=generator).tolist()) for n in lengths])
        for lengths in BESIDE
    ]

    def run(number: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [forward(layout, batches[number]).clone()]

    fault = stable(model, [partial(run, number) for number in range(2)])
    assert bool(fault) == (architecture.name in STATEFUL), fault
    if fault:
        return
    alone = [run(number)[0] for number in range(len(batches))]
    found: list[tuple[int, torch.Tensor]] = []

    def work(start: int) -> None:
        for number in range(start, start + 6):
            found.append((number % len(batches), run(number % len(batches))[0]))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    for number, hidden_TD in found:
        scale = max(1.0, float(alone[number].abs().max()))
        assert torch.allclose(hidden_TD, alone[number], rtol=0, atol=1e-5 * scale)
