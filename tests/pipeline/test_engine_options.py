"""Options of the engine, from their names to the order in which requests run."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest

from cenote.config import EngineConfig, ModelConfig
from cenote.core import Sequence
from cenote.pipeline.pipeline import _local_engine
from tests import PATIENCE
from tests.engine.test_engine import Model, texts

PRIORITIES = {18: 5, 17: 0, 16: -1}
"""Of requests that wait, by their lengths, in the order in which they come."""


@pytest.mark.parametrize(("policy", "order"), [("priority", [16, 17, 18]), ("fcfs", [18, 17, 16])])
def test_scheduling_policy(policy: str, order: list[int]) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(_: Seq[Sequence]) -> None:
        begun.set()
        assert go.wait(PATIENCE)

    model = Model(hold)
    options = EngineConfig.model_validate({"scheduling_policy": policy, "max_num_batched_tokens": 20})
    engine = _local_engine(model, options, None, ModelConfig())  # type: ignore[arg-type]
    futures = [engine.submit(texts(3))]
    assert begun.wait(PATIENCE)
    for length, priority in PRIORITIES.items():
        futures.append(engine.submit([replace(sequence, priority=priority) for sequence in texts(length)]))
    go.set()
    for future in futures:
        future.result(PATIENCE)
    engine.close()
    assert model.batches == [[3], *([length] for length in order)]
