"""torch's default dtype is the process's, and Transformers changes it while it builds a model in half precision.

So whatever runs beside must name the dtype of each tensor; native code would write beyond the end of one that is too
small.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from cenote import LLM
from cenote.tensors import linear, native
from cenote.tensors.chains import Step
from cenote.tensors.native import BlasMatrix
from cenote.tensors.packing import spans_of
from tests import forked
from tests.checkpoints import bert

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

kernels_needed = pytest.mark.skipif(native.chosen("auto") == "none", reason="CENOTE_ISA switches the kernels off")
TEXTS = ["old boat", "the lake is deep and clear", "a"]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@kernels_needed
def test_the_kernels_agree_with_torch_under_any_default(default_dtype: torch.dtype) -> None:
    kernels = native.load()
    assert kernels is not None
    assert kernels.agree_with_torch()
    assert linear.load().agrees_with_torch()


@kernels_needed
def test_results_of_kernels_are_float32_under_any_default(default_dtype: torch.dtype) -> None:
    kernels = native.load()
    assert kernels is not None
    q = torch.ones(1, 1, 4, 32, dtype=torch.float32)
    assert kernels.attend(q, q, q, spans_of([0, 4]), 1.0).dtype == torch.float32
    if kernels.can_chain:
        packed: BlasMatrix = kernels.pack(torch.eye(32, dtype=torch.float32))
        assert kernels.unpack(packed).dtype == torch.float32
        assert kernels.chain((Step(packed),))(q[0, 0]).equal(q[0, 0])


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"plain": True}], ids=str)
def test_embeddings_are_the_same_under_any_default(tmp_path: Path, options: dict[str, object]) -> None:
    folder = bert(tmp_path / "model")
    with LLM(str(folder), **options) as llm:
        before = [output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)]
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                outputs = llm.embed(TEXTS, use_tqdm=False)
            finally:
                torch.set_default_dtype(torch.float32)
            assert np.abs(np.array([output.outputs.embedding for output in outputs]) - np.array(before)).max() < 1e-6


BESIDE = """
    import sys, threading
    import numpy as np
    import torch
    from transformers import AutoModel
    from cenote import LLM
    from tests.checkpoints import bert
    from pathlib import Path

    folder, other = Path(sys.argv[1]) / "model", Path(sys.argv[1]) / "other"
    bert(folder)
    bert(other)
    texts = ["old boat", "the lake is deep and clear"] * 8
    with LLM(str(folder)) as llm:
        first = np.array([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)])
        largest, runs, loads = 0.0, 0, []

        def load():
            for _ in range(20):
                loads.append(AutoModel.from_pretrained(other, dtype=torch.bfloat16).dtype)

        thread = threading.Thread(target=load)
        thread.start()
        while thread.is_alive():
            rows = np.array([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)])
            largest, runs = max(largest, float(np.abs(rows - first).max())), runs + 1
    assert largest < 1e-6, largest
    assert len(loads) == 20 and runs > 10, (loads, runs)
"""


def test_another_thread_loads_a_model_in_half_precision_meanwhile(tmp_path: Path) -> None:
    done = forked.run(textwrap.dedent(BESIDE), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
