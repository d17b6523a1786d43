"""Equal sequences of a request run once; what differs in anything that counts runs by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cenote.core import PoolingParams, Sequence
from cenote.engine.engine import LocalEngine
from cenote.engine.equal import distinct
from tests import PATIENCE
from tests.engine.test_engine import Model, check, texts

ONE = Sequence([5, 6, 7])


def test_equal_ids_of_any_type_are_equal() -> None:
    sequences = [ONE, Sequence([5, 6]), Sequence((5, 6, 7)), Sequence(np.array([5, 6, 7])), Sequence([5, 6])]
    assert distinct(sequences) == [[0, 2, 3], [1, 4]]
    assert distinct([ONE]) == [[0]]
    assert distinct([]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"ids": [5, 6, 8]},
        {"type_ids": [0, 0, 1]},
        {"task": "token_embed"},
        {"params": PoolingParams(dimensions=4)},
        {"adapter": "query"},
        {"also": ("token_embed",)},
        {"skip": 1},
        {"hidden": 1},
        {"keep": (0,)},
        {"looked_up": True},
        {"clusters": True},
        {"salt": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_differs_in_anything_that_counts_is_another(change: dict[str, object]) -> None:
    assert distinct([ONE, replace(ONE, **change), replace(ONE)]) == [[0, 2], [1]]  # type: ignore[arg-type]


def test_equal_sequences_run_once_and_each_has_an_output_of_its_own() -> None:
    model = Model()
    engine = LocalEngine(model, max_batch_tokens=4000)
    different = texts(4, 9, 30)
    request = [different[i] for i in (0, 1, 0, 2, 0, 1)]
    counts: list[int] = []
    future = engine.submit(request, progress=counts.append)
    check(future, request)
    engine.close()
    assert [sorted(batch) for batch in model.batches] == [[4, 9, 30]]
    assert sum(counts) == 6
    outputs = future.result(PATIENCE)
    assert outputs[0].data.tobytes() == outputs[2].data.tobytes() == outputs[4].data.tobytes()
    outputs[2].data[:] = 0
    assert outputs[0].data.any()
    assert outputs[4].data.any()


def test_a_request_of_equal_sequences_fails_as_one() -> None:
    def before(sequences: object) -> None:
        raise IndexError

    model = Model(before)
    engine = LocalEngine(model)
    assert engine.submit([ONE, ONE, ONE]).exception(PATIENCE) is not None
    engine.close()
