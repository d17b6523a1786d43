"""The native kernels against torch, and what happens where they cannot be had."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.core import Sequence
from cenote.models.passes.fuse import fuse
from cenote.tensors import linear, native
from cenote.tensors.attention import Rule, attend_runs
from cenote.tensors.chains import ACTIVATIONS, Products, Step
from cenote.tensors.native import Kernels
from cenote.tensors.packing import pack

if native.chosen("auto") == "none":
    pytest.skip("CENOTE_ISA switches the kernels off", allow_module_level=True)

LENGTHS = [1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 64, 65, 130, 300]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = native.load()
    assert found is not None, "the suite runs where there is a C++ compiler and wide vectors"
    return found


RULES = [(False, None), (True, None), (False, 3), (False, 64), (True, 1), (True, 20), (True, 200)]
"""Causal or not, and the window."""


@pytest.mark.parametrize(("causal", "window"), RULES)
@pytest.mark.parametrize(("size", "group"), list(itertools.product([32, 64, 80, 128], [1, 2, 4])))
def test_attention_equals_torch(kernels: Kernels, size: int, group: int, causal: bool, window: int | None) -> None:
    generator = torch.Generator().manual_seed(size)
    batch = pack([Sequence([1] * n) for n in LENGTHS])
    states = [torch.randn(1, batch.tokens, n, size, generator=generator) * 1.5 for n in (4, 4 // group, 4 // group)]
    q, k, v = (x.transpose(1, 2) for x in states)
    with torch.inference_mode():
        assert kernels.can_attend(q, k, v, batch.max_length)
        got = kernels.attend(q, k, v, batch.spans_B7, size**-0.5, causal=causal, window=window)
    expected = attend_runs(q.double(), k.double(), v.double(), batch, Rule(causal, window))
    allowed = 1e-5 if causal or window else 5e-6
    assert torch.allclose(got.double(), expected, atol=allowed), (got - expected).abs().max()


@pytest.mark.parametrize("window", [None, 9])
def test_what_comes_later_moves_no_bit(kernels: Kernels, window: int | None) -> None:
    batch = pack([Sequence([1] * 70)])
    q, k, v = (torch.randn(1, 2, 70, 32) for _ in range(3))
    others = [x.clone() for x in (q, k, v)]
    for x in others:
        x[:, :, 41:] = torch.randn(1, 2, 29, 32) * 1e6
    with torch.inference_mode():
        one, other = (
            kernels.attend(*states, batch.spans_B7, 0.2, causal=True, window=window) for states in ((q, k, v), others)
        )
    assert torch.equal(one[:, :41], other[:, :41])
    assert not torch.equal(one[:, 41:], other[:, 41:])


@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 3, 128), (4, 97), (300, 1024), (0, 64)])
def test_rms_norm_equals_torch(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x, gamma = torch.randn(shape) * 3, torch.randn(shape[-1])
    wanted = F.rms_norm(x.double(), shape[-1:], gamma.double(), 1e-3)
    assert torch.allclose(kernels.rms_norm(x, gamma, 1e-3).double(), wanted, atol=1e-6, rtol=1e-6)
    turned = torch.randn(*shape[:-1][::-1], shape[-1]).transpose(0, -2)
    assert torch.equal(kernels.rms_norm(turned, gamma, 1e-3), kernels.rms_norm(turned.contiguous(), gamma, 1e-3))


def test_rms_norm_refuses_other_numbers(kernels: Kernels) -> None:
    for x in (torch.randn(3, 8).double(), torch.randn(3, 9)):
        with pytest.raises(TypeError, match=r"expected float32 \[..., 8\] on the CPU, got torch.float"):
            kernels.rms_norm(x, torch.ones(8), 1e-5)


def test_attention_survives_extreme_scores(kernels: Kernels) -> None:
    batch = pack([Sequence([1] * 40)])
    q, k, v = (torch.randn(1, 2, 40, 32) * scale for scale in (50, 50, 1))
    with torch.inference_mode():
        got = kernels.attend(q, k, v, batch.spans_B7, 1.0)
    expected = attend_runs(q, k, v, batch, Rule(causal=False, scaling=1.0))
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_poisoned_query_stays_poisoned_and_alone(kernels: Kernels) -> None:
    batch = pack([Sequence([1] * 20), Sequence([1] * 20)])
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    q[0, :, 3] = float("nan")
    with torch.inference_mode():
        rows = kernels.attend(q, k, v, batch.spans_B7, 0.2)[0].isnan().flatten(1).any(1)
    assert rows.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q[..., :20], k[..., :20], v[..., :20]),
        lambda q, k, v: (q, k, v[..., :16]),
        lambda q, k, v: (q.transpose(2, 3).contiguous().transpose(2, 3), k, v),
    ],
    ids=["dtype", "head size", "value size", "stride"],
)
def test_refuses_what_it_cannot_do(kernels: Kernels, spoil: object) -> None:
    states = spoil(*(torch.randn(1, 2, 40, 32) for _ in range(3)))  # type: ignore[operator]
    with torch.inference_mode():
        assert not kernels.can_attend(*states, longest=40)


def test_refuses_long_sequences_and_gradients(kernels: Kernels) -> None:
    states = [torch.randn(1, 2, 40, 32) for _ in range(3)]
    assert not kernels.can_attend(*states, longest=40), "autograd is on"
    with torch.inference_mode():
        assert kernels.can_attend(*states, longest=40)
        assert not kernels.can_attend(*states, longest=native.LONGEST + 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 63, 64, 65, 300, 1025])
@pytest.mark.parametrize(("into", "middle", "out"), [(32, 64, 32), (7, 50, 33), (48, 1600, 1)])
def test_chains_equal_torch(kernels: Kernels, rows: int, into: int, middle: int, out: int, threads: int) -> None:
    torch.manual_seed(rows)
    first, second, norm = nn.Linear(into, middle), nn.Linear(middle, out, bias=False), nn.LayerNorm(out, eps=1e-3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    wide, residual = torch.randn(rows, into + 5), torch.randn(1, rows, out)
    x = wide[None, :, :into]  # rows further apart than they are long
    before, torch_threads = wide.clone(), torch.get_num_threads()
    packed = [kernels.pack(linear.weight, linear.bias) for linear in (first, second)]
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for name, apply in ACTIVATIONS.items():
                steps = (Step(packed[0], activation=name), Step(packed[1], norm=norm))
                got = kernels.chain(steps)(x, residual)
                inner = apply(F.linear(x.double(), first.weight.double(), first.bias.double()))
                total = F.linear(inner, second.weight.double()) + residual
                expected = F.layer_norm(total, (out,), norm.weight.double(), norm.bias.double(), norm.eps)
                assert got.shape == (1, rows, out)
                assert torch.allclose(got.double(), expected, atol=2e-5), name
            alone = kernels.chain((Step(packed[0]),))(x)
            assert torch.allclose(alone, first(x), atol=1e-5)
    finally:
        torch.set_num_threads(torch_threads)
    assert torch.equal(wide, before), "the input stays"


def test_activations_in_a_chain_equal_torch_everywhere(kernels: Kernels) -> None:
    x = torch.cat([torch.linspace(-20, 20, 2048), torch.randn(2048) * 3, torch.tensor([-1e4, 1e4, 0.0])])[:, None]
    one = kernels.pack(torch.ones(1, 1))
    for name, apply in ACTIVATIONS.items():
        got = kernels.chain((Step(one, activation=name),))(x)
        assert torch.allclose(got.double(), apply(x.double()), atol=2e-6, rtol=1e-6), name


def test_a_poisoned_row_of_a_chain_stays_alone(kernels: Kernels) -> None:
    x = torch.randn(9, 8)
    x[4, 2] = float("nan")
    packed = kernels.pack(torch.randn(8, 8), torch.randn(8))
    steps = (Step(packed, activation="gelu"), Step(packed, norm=nn.LayerNorm(8)))
    poisoned = kernels.chain(steps)(x, torch.randn(9, 8)).isnan().all(1)
    assert poisoned.nonzero().flatten().tolist() == [4]


def test_chains_refuse_other_numbers(kernels: Kernels) -> None:
    chain = kernels.chain((Step(kernels.pack(torch.randn(4, 4))),))
    with pytest.raises(TypeError, match=r"expected float32 on the CPU, got torch\.float64"):
        chain(torch.randn(2, 4).double())
    assert chain(torch.randn(0, 4)).shape == (0, 4)


def test_unpacking_gives_the_very_same_matrix(kernels: Kernels) -> None:
    weight = torch.randn(70, 300) * torch.logspace(-20, 20, 300)
    assert torch.equal(kernels.unpack(kernels.pack(weight, torch.randn(70))), weight)


def test_no_compiler_means_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert native._load.__wrapped__("auto") is None


def test_a_failing_compiler_means_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    assert native._load.__wrapped__("auto") is None


def test_kernels_that_disagree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "agree_with_torch", lambda _: False)
    assert native._load.__wrapped__("auto") is None


@pytest.fixture(params=["BLAS", "AMX"])
def products(kernels: Kernels, request: pytest.FixtureRequest) -> Products[Any]:
    found = linear.float32(kernels) if request.param == "AMX" else kernels
    if isinstance(found, linear.Exact) != (request.param == "AMX"):
        pytest.skip("this processor has no AMX")
    assert found is not None
    return found


class Block(nn.Module):
    """A feed-forward block whose activation may be shared, or its input used again."""

    def __init__(self, activation: nn.Module, *, reuse: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64)
        self.activation, self.reuse, self.twice = activation, reuse, twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        y = self.activation(h)
        if self.reuse:
            y = y + h
        if self.twice:
            y = y * self.activation(self.gate(x))
        return self.down(y)


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize(
    ("activation", "options", "natively", "plainly"),
    [
        (nn.GELU, {}, ("packed", "activated", "chained"), ("in place",)),
        (nn.GELU, {"twice": True}, ("packed", "activated"), ("in place",)),
        (nn.GELU, {"reuse": True}, ("packed",), ()),
        # Of the same class, but not the exact form.
        (partial(nn.GELU, approximate="tanh"), {}, ("packed",), ()),
        (nn.SiLU, {}, ("packed", "activated", "chained"), ("in place",)),
        (nn.ReLU, {}, ("packed", "activated", "chained"), ("in place",)),
        (nn.ReLU, {"reuse": True}, ("packed",), ()),
        (nn.Tanh, {}, ("packed", "in place"), ("in place",)),
    ],
)
def test_fusing_never_changes_the_result(
    kernels: Kernels,
    products: Products[Any],
    with_kernels: bool,
    activation: Callable[[], nn.Module],
    options: dict[str, bool],
    natively: tuple[str, ...],
    plainly: tuple[str, ...],
) -> None:
    torch.manual_seed(0)
    block = Block(activation(), **options).eval()
    x, other = torch.randn(1, 9, 32), torch.randn(1, 5, 32)
    with torch.inference_mode():
        expected, unseen = block(x).clone(), block(other).clone()
        kinds = fuse(block, lambda: block(x), lambda: block(other), *((kernels, products) if with_kernels else ()))
        assert torch.allclose(block(x), expected, atol=2e-6)
        assert torch.allclose(block(other), unseen, atol=2e-6)
    assert kinds == (natively if with_kernels else plainly)
    assert (block.up.weight.device.type == "meta") == with_kernels, "the plain matrix is freed where it is not needed"


class Named(nn.Module):
    """A feed-forward block that calls Linears with their input's name: `up`, `down` or both."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)
        self.activation = nn.GELU()
        self.names = names

    def _run(self, name: str, x: torch.Tensor) -> torch.Tensor:
        linear = getattr(self, name)
        y: torch.Tensor = linear(input=x) if name in self.names else linear(x)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self._run("down", self.activation(self._run("up", x))))
        return y


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ((), ("packed", "activated", "chained")),
        (("down",), ("packed", "activated")),
        (("up",), ("packed",)),
        (("up", "down"), ("packed",)),
    ],
    ids=str,
)
def test_linears_that_are_called_by_keyword_stay_as_they_are(
    kernels: Kernels, products: Products[Any], names: tuple[str, ...], kinds: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    block = Named(*names).eval()
    x, other = torch.randn(1, 9, 32), torch.randn(1, 5, 32)
    with torch.inference_mode():
        expected, unseen = block(x).clone(), block(other).clone()
        assert fuse(block, lambda: block(x), lambda: block(other), kernels, products) == kinds
        assert torch.allclose(block(x), expected, atol=2e-6)
        assert torch.allclose(block(other), unseen, atol=2e-6)
    stays = {name for name in ("up", "down", "last") if getattr(block, name).weight.device.type == "cpu"}
    assert stays == set(names)


class Residual(nn.Module):
    """A Linear, a residual and a LayerNorm; `twist` changes how they are joined."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(32, 32), nn.LayerNorm(32), nn.Dropout(0.5)
        self.twist = twist

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.dense(h))
        if self.twist == "scaled":
            return self.norm(y + 0.5 * x)
        if self.twist == "inside":
            return x + self.norm(y)
        if self.twist == "after":
            return self.norm(y + x) * 1.5
        if self.twist == "weight":
            return self.norm(y + x) + self.dense.weight.sum()
        return self.norm(y + x)


@pytest.mark.parametrize("twist", ["", "scaled", "inside", "after", "weight", "hooked"])
def test_only_a_sum_with_the_residual_is_normalised_natively(
    kernels: Kernels, products: Products[Any], twist: str
) -> None:
    torch.manual_seed(1)
    block = Residual(twist).eval()
    if twist == "hooked":
        block.dense.register_forward_hook(lambda module, args, y: y + 1)
    x, residual = torch.randn(1, 9, 32), torch.randn(1, 9, 32)
    weight = block.dense.weight.clone()
    with torch.inference_mode():
        expected = block(x, residual).clone()
        kinds = fuse(block, lambda: block(x, residual), lambda: block(residual, x), kernels, products)
        assert torch.allclose(block(x, residual), expected, atol=2e-6)
    assert kinds == {"": ("packed", "normalised"), "weight": ()}.get(twist, ("packed",))
    if twist == "weight":
        assert torch.equal(block.dense.weight, weight), "a model that reads the matrix gets it back"


class Scaled(nn.Module):
    """Rows over their root mean square; `twist` does something else."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        self.weight, self.eps, self.twist = nn.Parameter(torch.randn(32)), 1e-2, twist

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True) if self.twist == "centred" else x
        y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return y * (1 + self.weight if self.twist == "one more" else self.weight)


@pytest.mark.parametrize("twist", ["", "one more", "centred", "hooked"])
def test_only_rows_over_their_root_mean_square_take_one_pass(
    kernels: Kernels, products: Products[Any], twist: str
) -> None:
    torch.manual_seed(4)
    norm = Scaled(twist).eval()
    model = nn.Sequential(nn.Linear(32, 32), norm)
    if twist == "hooked":
        norm.register_forward_hook(lambda module, args, y: y + 1)
    x, other = torch.randn(1, 9, 32), torch.randn(2, 5, 32)
    with torch.inference_mode():
        expected, unseen = model(x).clone(), model(other).clone()
        kinds = fuse(model, lambda: model(x), lambda: model(other), kernels, products)
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert torch.allclose(model(other), unseen, atol=1e-6)
    assert kinds == (("packed", "in one pass") if twist in ("", "one more") else ("packed",))


def test_a_tied_matrix_stays_where_it_is(kernels: Kernels, products: Products[Any]) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)).eval()
    model[1].weight = model[0].weight  # type: ignore[assignment]
    ids = torch.arange(20)
    with torch.inference_mode():
        expected = model(ids).clone()
        assert fuse(model, lambda: model(ids), lambda: model(ids.flip(0)), kernels, products) == ()
        assert torch.equal(model(ids), expected)


class Positions(nn.Module):
    """Adds what a Linear makes of a table to what it makes of the input; `spoil` overwrites the former."""

    def __init__(self, *, spoil: bool) -> None:
        super().__init__()
        self.table, self.dense, self.spoil = nn.Embedding(6, 8), nn.Linear(8, 8), spoil

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        of_table = self.dense(self.table.weight * 2)
        total = self.dense(x) + of_table.mean(0)
        if self.spoil:
            of_table.zero_()
        return total


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("with_kernels", [False, True])
def test_what_depends_on_no_token_is_computed_once(
    kernels: Kernels, products: Products[Any], with_kernels: bool, spoil: bool
) -> None:
    torch.manual_seed(3)
    model = Positions(spoil=spoil).eval()
    x, other, third = torch.randn(1, 9, 8), torch.randn(1, 5, 8), torch.randn(1, 6, 8)
    with torch.inference_mode():
        expected = [model(each).clone() for each in (x, other, third)]
        kinds = fuse(model, lambda: model(x), lambda: model(other), *((kernels, products) if with_kernels else ()))
        for each, wanted in zip((x, other, third), expected, strict=True):
            assert torch.allclose(model(each), wanted, atol=1e-6)
    assert ("remembered" in kinds) != spoil, "who overwrites the answer gets a new one every time"
    if not spoil:
        model.table.weight.data.mul_(2)
        with torch.inference_mode():
            assert not torch.allclose(model(x), expected[0]), "another input gets its own answer"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_products_of_few_rows_make_no_new_threads(kernels: Kernels) -> None:
    """The BLAS uses the threads that there are: in a parallel region of one thread its own would be new every time."""
    if not kernels.can_chain:
        pytest.skip("there is no BLAS that multiplies by packed matrices")
    chain = kernels.chain((Step(kernels.pack(torch.ones(512, 512))),))
    x, seen, ended = torch.ones(40, 512), set[str](), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.update(os.listdir("/proc/self/task"))

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        chain(x)
        old = set(os.listdir("/proc/self/task"))
        watching = threading.Thread(target=watch)
        watching.start()
        for _ in range(300):
            chain(x)
        ended.set()
        watching.join()
    finally:
        torch.set_num_threads(before)
    assert len(seen - old) <= 1, "the watching thread is the only new one"
