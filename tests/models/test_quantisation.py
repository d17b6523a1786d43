"""A further quantisation is a row, a path and a kernel: one is registered here and loaded like any other."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from cenote.config import ModelConfig, Quantization
from cenote.core import Sequence
from cenote.models.load import load
from cenote.tensors import linear, native
from cenote.tensors.linear import FASTEST, FORMS, PATHS, Form
from cenote.tensors.native import drawn
from tests.checkpoints import bert

if native.chosen("auto") == "none":
    pytest.skip("CENOTE_ISA switches the kernels off", allow_module_level=True)

BYTES = FORMS["int8"]


def coarse(weight_ND: Tensor) -> Tensor:
    """Weights of 63 values for each output."""
    step_N1 = weight_ND.abs().amax(1, keepdim=True).clamp(min=1e-30) / 31
    return (weight_ND / step_N1).round() * step_N1


SIX_BITS = Form(
    lambda weight_ND, path: BYTES.narrow(coarse(weight_ND), path),
    lambda x_RD, weight_ND, path: BYTES.emulate(x_RD, coarse(weight_ND), path),
    makes_steps=True,
)


@pytest.fixture
def six_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in six bits, which the kernel of int8 multiplies under another name."""
    kernel = linear.load()
    of_bytes = kernel.path("int8")
    assert of_bytes is not None
    monkeypatch.setitem(FORMS, "int6", SIX_BITS)
    monkeypatch.setitem(PATHS, "SIX", PATHS[of_bytes]._replace(kind="int6", text="int6 for a test"))
    monkeypatch.setitem(FASTEST, "int6", ("SIX",))
    monkeypatch.setitem(kernel._numbers, "SIX", kernel._numbers[of_bytes])
    monkeypatch.setattr(kernel, "paths", (*kernel.paths, "SIX"))


@pytest.mark.usefixtures("six_bits")
def test_a_quantisation_is_added_by_rows(tmp_path: Path) -> None:
    kernel = linear.load()
    assert kernel.agrees_with_torch(), "its emulation is that of its weights"
    options = ModelConfig(model=str(bert(tmp_path / "model")))
    batch = [Sequence([2, 5, 6, 7, 3]), Sequence([2, 9, 3])]
    vectors, linears = {}, {}
    for quantization in ("none", "int8", "int6"):
        model, _ = load(options.model_copy(update={"quantization": quantization}))
        vectors[quantization] = np.stack([output.data for output in model.launch(batch).finish()])  # type: ignore[union-attr]
        linears[quantization] = model.info.report.linears
    assert linears["int6"].startswith("13 of 13 in int6 for a test, cosine ")
    off = {name: float(np.abs(vectors[name] - vectors["none"]).max()) for name in ("int8", "int6")}
    assert 0 < off["int8"] < off["int6"] < 0.1, "fewer bits are further from float32"


@pytest.mark.usefixtures("six_bits")
def test_its_weights_are_its_own() -> None:
    of_bytes = linear.load().path("int8")
    assert of_bytes is not None
    weight_ND = drawn(torch.Generator().manual_seed(1), 40, 64)
    panels = linear.narrow(weight_ND, None, "SIX").panels
    assert torch.equal(panels, linear.narrow(coarse(weight_ND), None, of_bytes).panels)
    assert not torch.equal(panels, linear.narrow(weight_ND, None, of_bytes).panels)


def test_every_choice_of_the_option_has_a_row() -> None:
    assert {*get_args(Quantization)} - {"none"} == {kind for kind in FORMS if kind.startswith("int")}
    assert {path.kind for path in PATHS.values()} == {*FORMS} == {*FASTEST}
    assert sorted(path for paths in FASTEST.values() for path in paths) == sorted(PATHS)
