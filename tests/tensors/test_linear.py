"""The kernel for Linears with narrow weights, on every path that this processor has, against sums in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote import LLM
from cenote.config import Isa, ModelConfig
from cenote.errors import ConfigError
from cenote.models.load import load
from cenote.tensors import library, linear, native
from cenote.tensors.chains import ACTIVATIONS, Chain, Step
from cenote.tensors.linear import FASTEST, PATHS, Exact, Kernel, narrow, quantize
from cenote.tensors.native import Target
from tests import checkpoints
from tests.threads import threads

if native.chosen("auto") == "none":
    pytest.skip("CENOTE_ISA switches the kernels off", allow_module_level=True)

INT8 = tuple(name for name, path in PATHS.items() if path.kind == "int8")
SHAPES = [(1, 3, 2), (2, 64, 32), (7, 70, 50), (16, 384, 96), (33, 130, 97), (65, 1536, 40), (150, 9, 33)]
"""Rows, inputs and outputs: whole and broken blocks, lines, vectors and tiles."""


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return linear.load()


@pytest.fixture(scope="module")
def narrowest() -> Kernel:
    """As built for a processor with nothing but AVX2, once for all runs."""
    with library.compiled(linear.SOURCE, native.TARGETS["avx2"].march) as file:
        return Kernel(file)


@dataclass(frozen=True)
class Run:
    """A kernel and a path of it."""

    kernel: Kernel
    path: str

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Tensor:
        return self.kernel.chain((Step(narrow(weight, bias, self.path), activation),))(x)


@pytest.fixture(params=[*PATHS, "AVX2 alone", "float16 alone"])
def run(request: pytest.FixtureRequest, kernel: Kernel, narrowest: Kernel) -> Run:
    path = request.param.removesuffix(" alone")
    if path != request.param:
        return Run(narrowest, path)
    if path not in kernel.paths:
        pytest.skip(f"this processor has no {path}")
    return Run(kernel, path)


def drawn(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator) * torch.rand(inputs, generator=generator) * 5 + 0.3
    weight = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)
    return x, weight, torch.randn(outputs, generator=generator)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, path: str) -> Tensor:
    """Rows rounded to 256 steps of their own range, weights to 255 of each output's; or what is rounded to halves."""
    if path == "AMX-FLOAT32":
        return F.linear(x.double(), weight.double(), bias.double())
    if path not in INT8:
        half = weight.half() if path.lower().endswith("float16") and path != "bfloat16" else weight.bfloat16()
        return F.linear((x.bfloat16() if path == "AMX-BF16" else x).double(), half.double(), bias.double())
    rows = []
    for row in x:
        low, width = row.min(), row.max() - row.min()
        scale = torch.tensor(255.0) / width if width > 0 else torch.tensor(0.0)
        rows.append(torch.round((row - low) * scale).double() * width.double() / 255 + low.double())
    codes, scale = quantize(weight, pairs=path == "AVX2")
    return F.linear(torch.stack(rows), codes.double() * scale.double()[:, None], bias.double())


def near(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got.double(), expected, rtol=1e-5, atol=2e-6 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(("shape", "count"), list(itertools.product(SHAPES, [1, 3])))
def test_equals_the_same_sums_by_hand(run: Run, shape: tuple[int, int, int], count: int) -> None:
    x, weight, bias = drawn(*shape)
    expected = by_hand(x, weight, bias, run.path)
    with threads(count):
        assert near(run(x, weight, bias), expected)
    exact = F.linear(x, weight, bias).double()
    assert float((expected - exact).norm() / exact.norm()) < 0.03, "the sums stand for those of the Linear"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(run: Run, activation: str) -> None:
    x, weight, bias = drawn(33, 130, 97)
    expected = ACTIVATIONS[activation](by_hand(x, weight, bias, run.path))
    assert near(run(x, weight, bias, activation), expected)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (5, 3), (40, 2), (150, 1), (300, 2)])
def test_chains(run: Run, rows: int, count: int) -> None:
    """Up, activation, down, residual, LayerNorm; each step on what the one before gave in float32."""
    x, up, bias = drawn(rows, 70, 200)
    _, down, _ = drawn(rows + 1, 200, 70)
    norm = nn.LayerNorm(70).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    residual = torch.randn(rows, 70)
    first, last = Step(narrow(up, bias, run.path), "gelu"), Step(narrow(down, None, run.path), norm=norm)
    with threads(count):
        between = run.kernel.chain((first,))(x)
        apart = run.kernel.chain((last,))(between, residual)
        together = run.kernel.chain((first, last))(x, residual)
    assert torch.equal(together, apart)
    summed = by_hand(between, down, torch.zeros(70), run.path) + residual
    expected = F.layer_norm(summed, (70,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert torch.allclose(together.double(), expected, atol=2e-5)


@pytest.fixture
def exact(kernel: Kernel) -> Exact:
    path = kernel.path("float32")
    if path is None:
        pytest.skip("this processor has no AMX")
    return Exact(kernel, path)


@pytest.mark.parametrize(("stored", "parts"), [(torch.float32, 3), (torch.float16, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("shape", [(1, 5, 7), (40, 1024, 64), (77, 1025, 33), (300, 2100, 40)])
def test_float32_loses_nothing(exact: Exact, shape: tuple[int, int, int], stored: torch.dtype, parts: int) -> None:
    """Errors of float32 products, but for those of torch's; inputs beyond 1,024 are added in a second turn."""
    x, weight, bias = drawn(*shape)
    x[0] *= torch.logspace(-12, 12, shape[1])
    weight = weight.to(stored).float()
    packed = exact.pack(weight, bias)
    assert packed.parts == parts
    assert packed.panels.nbytes == stored.itemsize * -(-shape[2] // 32) * 32 * -(-shape[1] // 32) * 32
    assert torch.equal(exact.unpack(packed), weight)
    expected = by_hand(x, weight, bias, exact.path)
    per_row = expected.abs().amax(1, keepdim=True)
    off = ((exact.chain((Step(packed),))(x) - expected) / per_row).norm()
    assert off <= max(1.5 * float(((F.linear(x, weight, bias) - expected) / per_row).norm()), 3e-8)


def test_float32_is_kept_as_it_was_stored() -> None:
    """Also where a half would hold all numbers but one."""
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    for dtype in linear.PARTS:
        assert linear.as_stored(weight.to(dtype).float()).dtype == dtype
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        mixed = weight.to(dtype).float()
        mixed[3, 5] = 1 + 2**-20
        assert linear.as_stored(mixed).dtype == other
    assert linear.as_stored(weight.bfloat16().float() * 2.0**40).dtype == torch.bfloat16, "no float16 is that large"
    assert linear.as_stored(weight.half().float() * 2.0**40).dtype == torch.float32


def test_float32_takes_amx_where_there_is_some(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = native.load()
    assert linear.float32(None) is None
    if (path := kernel.path("float32")) is not None:
        assert linear.float32(kernels) == Exact(kernel, path)
    monkeypatch.setattr(kernel, "paths", ("AVX2",))
    assert linear.float32(kernels) is (kernels if kernels is not None and kernels.can_chain else None)


def test_large_weights(run: Run) -> None:
    """Blocks have more rows there than a tile."""
    x, weight, bias = drawn(100, 2100, 4100)
    assert near(run(x, weight, bias)[70:, 4000:], by_hand(x[70:], weight[4000:], bias[4000:], run.path))


def test_a_row_knows_nothing_of_its_neighbours(run: Run) -> None:
    x, weight, bias = drawn(150, 384, 97)
    whole = run(x, weight, bias)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(x[order], weight, bias), whole[order])
    for rows in (slice(0, 1), slice(5, 9), slice(60, 75), slice(3, 150)):
        assert torch.equal(run(x[rows], weight, bias), whole[rows])
        with threads(3):
            assert torch.equal(run(x[rows], weight, bias), whole[rows])
    assert torch.equal(run(x.view(2, 75, 384), weight, bias), whole.view(2, 75, 97))
    assert torch.equal(run(x.t().contiguous().t(), weight, bias), whole), "a strided matrix"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 37, 69])
def test_a_poisoned_row_stays_poisoned_and_alone(run: Run, poison: float, place: int) -> None:
    x, weight, bias = drawn(9, 70, 33)
    x[4, place] = poison
    finite = run(x, weight, bias).isfinite().all(1)
    assert finite.tolist() == [row != 4 for row in range(9)]


def test_rows_without_a_range(run: Run) -> None:
    """Equal values have no steps between them."""
    _, weight, bias = drawn(3, 70, 33)
    x = torch.tensor([[0.0], [2.0], [-0.5]]).expand(3, 70)
    assert near(run(x, weight, bias), by_hand(x, weight, bias, run.path))
    assert torch.allclose(run(torch.full((1, 70), 1e-42), weight, bias)[0], bias, atol=1e-6)


def test_the_largest_products_do_not_overflow(run: Run) -> None:
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(32)
    x = torch.ones(8, 4096)
    x[:, -1] = 0  # so that the others are 255 steps above the lowest
    rounded = 0.01 if run.path == "AVX2" else 1e-4  # equal neighbours have codes of 64 there, not 127
    assert torch.allclose(run(x, signs[:, None].expand(64, 4096)), (4095 * signs).expand(8, 64), rtol=rounded)


def test_no_rows(run: Run) -> None:
    _, weight, bias = drawn(1, 40, 33)
    assert run(torch.empty(0, 40), weight, bias).shape == (0, 33)


def test_too_wide_a_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear of 65537 inputs is too wide, expected at most 65536"):
        narrow(torch.empty(1, 65_537), None, "AVX2")


@pytest.mark.parametrize("pairs", [False, True])
def test_codes_of_weights(pairs: bool) -> None:
    _, weight, _ = drawn(4, 129, 33)
    weight[3] = 0
    codes, scale = quantize(weight, pairs=pairs)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(1).max() == 127 or pairs
    assert ((codes * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    sums = F.pad(codes.int(), (0, 1)).view(33, -1, 2).sum(-1).abs()
    assert (sums.max() <= 128) == pairs
    assert (codes[3] == 0).all()
    assert (scale > (weight.abs().amax(1) / 126).clamp(min=1e-9)).any() == pairs


@pytest.mark.parametrize(
    ("path", "size"), [*((own, 1) for own in INT8), *((own, 2) for own in PATHS if own not in (*INT8, "AMX-FLOAT32"))]
)
def test_bytes_of_a_weight(path: str, size: int) -> None:
    assert narrow(torch.randn(192, 128), None, path).panels.nbytes == 192 * 128 * size


def test_the_fastest_path_is_chosen(kernel: Kernel, narrowest: Kernel) -> None:
    assert narrowest.paths == ("AVX2", "float16", "bfloat16")
    assert [narrowest.path(kind) for kind in FASTEST] == ["AVX2", "bfloat16", "float16", None]
    assert kernel.path("int8") == next(
        path for path in ("AMX", "AVX512-VNNI", "AVX-VNNI", "AVX2") if path in kernel.paths
    )
    assert (kernel.path("bfloat16") == "AMX-BF16") == ("AMX" in kernel.paths)
    assert (kernel.path("float16") == "AMX-FLOAT16") == ("AMX" in kernel.paths)
    assert (kernel.path("float32") == "AMX-FLOAT32") == ("AMX" in kernel.paths)


def missing_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", "")
    patch.delenv("CXX", raising=False)


def failing_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "/bin/false")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (missing_compiler, "there is no C\\+\\+ compiler"),
        (failing_compiler, "false"),
        (
            lambda patch: patch.setitem(native.TARGETS, "auto", Target("x86-64", 8)),
            "the processor has none of AVX2, VNNI and AMX",
        ),
        (lambda patch: patch.setattr(linear, "_padded", lambda x, _: torch.zeros(128)), "does not agree with torch"),
    ],
    ids=["no compiler", "a failing compiler", "an old processor", "another result"],
)
def test_reasons_to_do_without(
    spoil: Callable[[pytest.MonkeyPatch], None], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if spoil in (missing_compiler, failing_compiler):  # they are noticed where nothing is compiled yet
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spoil(monkeypatch)
    with pytest.raises(RuntimeError, match=reason):
        linear._load.__wrapped__("auto")


# --- instructions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["avx2", "avx512", "amx"])
def test_isa_leaves_out_wider_instructions(isa: Isa) -> None:
    """Each allows what the processor has of it and of those before it."""
    paths = {
        "avx2": ("AVX2", "float16", "bfloat16"),
        "avx512": ("AVX2", "AVX-VNNI", "AVX512-VNNI", "float16", "bfloat16"),
        "amx": tuple(PATHS),
    }
    try:
        linear.require(isa)
    except ConfigError as error:
        assert str(error).startswith(f"CPU kernels with isa {isa} cannot be had here: the processor")
        assert str(error).endswith("; leave isa out for the widest that can")
        pytest.skip(str(error))
    widest = Kernel(library.build(library.cache(), linear.SOURCE))
    assert set(linear.load(isa).paths) == {*paths[isa]} & {*widest.paths}
    kernels = native.load(isa)
    assert kernels is not None
    assert kernels.width == (8 if isa == "avx2" else 16)
    assert isinstance(linear.float32(kernels), Exact) == (isa == "amx")


def test_no_isa_is_plain_torch() -> None:
    linear.require("none")
    assert native.load("none") is None
    with pytest.raises(RuntimeError, match="native kernels are switched off"):
        linear.load("none")


def test_builds_of_two_isas_do_not_mix() -> None:
    march = native.TARGETS["avx2"].march
    assert library.build(library.cache(), native.SOURCE) != library.build(library.cache(), native.SOURCE, march)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (missing_compiler, "there is no C\\+\\+ compiler"),
        (
            lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
            "the processor has no AVX2",
        ),
        (
            lambda patch: patch.setattr(native.Kernels, "agree_with_torch", lambda _: False),
            "they do not agree with tor",
        ),
        (
            lambda patch: patch.setitem(native.TARGETS, "avx2", Target("haswell", 64)),
            "vectors have 8 lanes, expected 64",
        ),
        (lambda patch: patch.setattr(Kernel, "agrees_with_torch", lambda _: False), "the kernel does not agree with"),
    ],
    ids=["no compiler", "an old processor", "another result", "narrow vectors", "other products"],
)
def test_named_instructions_must_be_there(
    spoil: Callable[[pytest.MonkeyPatch], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the variable as from the option, which wins."""
    for module in (native, linear):
        monkeypatch.setattr(module, "_load", module._load.__wrapped__)
    spoil(monkeypatch)
    with pytest.raises(ConfigError, match=f"^CPU kernels with isa avx2 cannot be had here: .*{reason}"):
        linear.require("avx2")
    monkeypatch.setenv("CENOTE_ISA", "avx2")
    with pytest.raises(ConfigError, match=f"^CPU kernels with isa avx2 cannot be had here: .*{reason}"):
        load(ModelConfig())
    assert native.load("none") is None


def test_the_variable_chooses_where_no_option_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CENOTE_ISA", "none")
    assert native.load() is None
    monkeypatch.setenv("CENOTE_ISA", "sse")
    with pytest.raises(
        ConfigError, match="^environment variable CENOTE_ISA is 'sse', expected one of auto, none, avx2"
    ):
        LLM()


def test_isa_reaches_the_model(tmp_path: Path) -> None:
    """int8 tells its instructions, and plain torch makes no chains."""
    folder = checkpoints.bert(tmp_path / "model")
    with LLM(str(folder), isa="avx2", quantization="int8") as llm:
        assert "in int8 by AVX2, cosine" in llm.info.report.linears
    with LLM(str(folder), isa="none", quantization="int8") as llm:
        assert llm.info.report.warnings == ("int8 fell back to float32: native kernels are switched off",)
    for isa in ("none", "avx2"):
        model, _ = load(ModelConfig(model=str(folder), isa=isa))
        chains = [x for x in model.layout.backbone.model.modules() if isinstance(vars(x).get("forward"), Chain)]
        assert bool(chains) == (isa == "avx2")


def test_isa_without_kernels_is_refused() -> None:
    with pytest.raises(ConfigError, match="^isa 'avx2' is for the CPU kernels, and native_kernels switches them off"):
        LLM(isa="avx2", native_kernels=False)
    with pytest.raises(ConfigError, match="isa: Input should be 'auto', 'none', 'avx2', 'avx512' or 'amx'"):
        LLM(isa="sse")
