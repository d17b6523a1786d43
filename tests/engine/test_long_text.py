"""A single text of many blocks lets other requests pass between its batches."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from cenote.core import Output, Sequence
from cenote.engine.blocks import ChunkedEngine
from cenote.engine.engine import LocalEngine
from cenote.engine.fake import FAKE_INFO, fake_vector
from tests import PATIENCE

BLOCK = 64
BLOCKS = 400
PER_BATCH = 8
SHORT = 10


class Done:
    """A batch that is over."""

    def __init__(self, outputs: list[Output]) -> None:
        self.outputs = outputs

    def ready(self) -> bool:
        return True

    def finish(self) -> list[Output]:
        return self.outputs


class Stepped:
    """A model that runs each batch when it is let, and notes the lengths of its sequences."""

    def __init__(self) -> None:
        self.info = replace(FAKE_INFO, max_model_len=BLOCK)
        self.batches: list[list[int]] = []
        self.steps = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def launch(self, sequences: Seq[Sequence]) -> Done:
        self.begun.release()
        assert self.steps.acquire(timeout=PATIENCE)
        self.batches.append([len(sequence) for sequence in sequences])
        return Done([Output(fake_vector(sequence, 8)) for sequence in sequences])


def test_short_requests_pass_a_text_of_many_blocks() -> None:
    model = Stepped()
    engine = LocalEngine(model, max_batch_tokens=PER_BATCH * BLOCK)
    chunked = ChunkedEngine(engine)
    long = chunked.submit([Sequence([*range(BLOCKS * BLOCK)])])
    assert model.begun.acquire(timeout=PATIENCE), "the first batch is full of the long text"
    for number in range(5):
        begun = len(model.batches)
        short = chunked.submit([Sequence([number] * SHORT)])
        for _ in range(3):  # the batch under way, one of the long text, the one of the short request
            model.steps.release()
            assert model.begun.acquire(timeout=PATIENCE), "the next one is under way"
        assert np.array_equal(short.result(PATIENCE)[0].data, fake_vector(Sequence([number] * SHORT), 8))
        assert len(model.batches) == begun + 3
        assert any(SHORT in batch for batch in model.batches[begun:]), "it is in one of the next three batches"
    assert not long.done()
    for _ in range(BLOCKS):
        model.steps.release()
    assert long.result(PATIENCE)[0].data.shape == (8,)
    engine.close()
    ran = [length for batch in model.batches for length in batch]
    assert (ran.count(BLOCK), ran.count(SHORT)) == (BLOCKS, 5), "every block once"
    shorts = [place for place, batch in enumerate(model.batches) if SHORT in batch]
    assert max(np.diff(shorts)) <= 3
