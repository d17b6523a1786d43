"""Forwards that a GPU replays as one launch (CUDA graphs), recorded over batches of a few shapes.

Launching a small model's kernels one by one takes the host longer than they run. So a batch is filled up to the next
of a few shapes, its numbers are copied into buffers that never move, and the forward that was recorded over them is
replayed. A batch is filled up with sequences of their own at its end, which no other sees: no value changes.

A recording keeps every number of the host from the time it was made, so a recorded forward gets a `Static` batch, which
has only the numbers that all batches of its shape share. On a device without graphs the same code runs the forward
itself.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cenote.tensors.packing import Static, stage

if TYPE_CHECKING:
    from torch import Tensor

    from cenote.tensors.packing import Batch, Ids, Place

log = logging.getLogger(__name__)

FEWEST_TOKENS = 64
STEPS = 4
"""Numbers of tokens per doubling: a batch is filled up by a quarter at most, on average by a tenth."""
SHORTEST_LIMIT = 128
LIMITS_APART = 4
"""Kernels start work for the longest sequence that a shape allows; these limits are 128, 512, 2048, ..."""
MOST_SEQUENCES = 256

Work = Callable[[], None]


class Shape(NamedTuple):
    """The common traits of the batches of a recording.

    Attributes:
        tokens: rows, filled up.
        sequences: places for sequences, of which some stay empty.
        max_length: no sequence is longer.
        typed: whether tokens have types.
    """

    tokens: int
    sequences: int
    max_length: int
    typed: bool


def rounded(tokens: int) -> int:
    """Round `tokens` up to one of `STEPS` numbers per doubling."""
    tokens = max(tokens, FEWEST_TOKENS)
    step = (1 << (tokens - 1).bit_length()) // (2 * STEPS)
    return -(-tokens // step) * step


def shape_of(batch: Batch) -> Shape | None:
    """Return the shape that `batch` is filled up to; `None` if it has too many sequences."""
    if batch.size > MOST_SEQUENCES:
        return None
    tokens, max_length = rounded(batch.tokens), SHORTEST_LIMIT
    while max_length < batch.max_length:
        max_length *= LIMITS_APART
    filling = -(-tokens // (STEPS * max_length))  # sequences of that length that are enough to fill up
    return Shape(tokens, min(tokens, MOST_SEQUENCES) + filling, max_length, batch.host_type_ids_T is not None)


def lay_out(batch: Batch, shape: Shape) -> list[Ids]:
    """Return the numbers of `batch` in `shape`: ids, positions, offsets of sequences, and types if it has any."""
    offsets = batch.tokens + shape.max_length * np.arange(shape.sequences + 1 - batch.size)
    arrays = (batch.host_ids_T, batch.host_positions_T, batch.host_type_ids_T)
    ids, positions, *types = (np.pad(x_T, (0, shape.tokens - batch.tokens)) for x_T in arrays if x_T is not None)
    return [ids, positions, np.concatenate((batch.starts[:-1], np.minimum(offsets, shape.tokens))), *types]


class Graphs:
    """Recordings of one forward, by shape; a shape's first batch makes its recording.

    One batch at a time, in the order of the device's stream. A result is a tensor of its own.

    Args:
        forward: last hidden states `[T, D]` of a `Static` batch, or `[B, D]` at a place, out of its tensors alone.
        device: where it runs.
        max_tokens: batches with more are not recorded.
        record: turns work over tensors that stay where they are into its replay; `None` = by device.

    Attributes:
        replays: by shape and place; `None` if it cannot be recorded.
        fault: why the last shape that could not be recorded could not, or an empty string.
    """

    def __init__(
        self,
        forward: Callable[[Static, Place | None], Tensor],
        device: torch.device,
        max_tokens: int,
        record: Callable[[Work], Work] | None = None,
    ) -> None:
        self._forward = forward
        self._device = device
        self._record = record or _recorder(device)
        self._hidden_RD: Tensor | None = None
        self.max_tokens = rounded(max_tokens)
        self._numbers = torch.zeros(4 * self.max_tokens + MOST_SEQUENCES, dtype=torch.int64, device=device)
        self.replays: dict[tuple[Shape, Place | None], Work | None] = {}
        self.fault = ""

    @torch.inference_mode()
    def run(self, batch: Batch, place: Place | None = None) -> Tensor | None:
        """Return the last hidden states of `batch`, `[T, D]`, or with a `place` only each sequence's row, `[B, D]`.

        `None` if it fits no shape, or its shape cannot be recorded.
        """
        shape = shape_of(batch)
        if shape is None or shape.tokens > self.max_tokens:
            return None
        parts = lay_out(batch, shape)
        staged = stage(parts, self._device)
        self._numbers[: len(staged)].copy_(staged, non_blocking=True)
        key = (shape, place)
        if key not in self.replays:
            self.replays[key] = self._recording([len(part) for part in parts], shape, place)
        replay = self.replays[key]
        if replay is None:
            return None
        replay()
        assert self._hidden_RD is not None
        return self._hidden_RD[: batch.tokens if place is None else batch.size].clone()

    def _recording(self, lengths: list[int], shape: Shape, place: Place | None) -> Work | None:
        ids_T, positions_T, offsets, *types = torch.split(self._numbers[: sum(lengths)], lengths)

        def work() -> None:
            static = Static(ids_T, positions_T, types[0] if types else None, offsets, shape.max_length)
            hidden_RD = self._forward(static, place)
            if self._hidden_RD is None:
                self._hidden_RD = hidden_RD.new_empty(self.max_tokens + MOST_SEQUENCES, hidden_RD.shape[-1])
            # All recordings leave their result in one place, so that they can share all other memory.
            self._hidden_RD[: len(hidden_RD)].copy_(hidden_RD)

        try:
            return self._record(work)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any error of a model or the driver means: this runs unrecorded
            self.fault = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            log.warning("a forward of %d tokens cannot be recorded: %s", shape.tokens, self.fault)
            return None


def _recorder(device: torch.device) -> Callable[[Work], Work]:
    """Return the function that records on `device`; elsewhere than on a GPU, replaying is doing the work again."""
    if device.type != "cuda":
        return _unrecorded
    pool = torch.cuda.graph_pool_handle()

    def record(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.device(device):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says once that it does not find everything
                torch.cuda.set_sync_debug_mode("error")
            try:
                work()  # an operation that would spoil the recording fails here, by its name
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            # Other threads may go on using the device, if only to pin memory.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
        return graph.replay

    return record


def _unrecorded(work: Work) -> Work:
    work()  # it fails here if it fails
    return work
