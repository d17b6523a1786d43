"""Inputs of `embed` that are longer than a model reads: run in blocks, whose vectors are averaged."""

from __future__ import annotations

import weakref
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.core import Output, Sequence
from cenote.engine.promise import Promise, times_of
from cenote.errors import TooLong

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq
    from concurrent.futures import Future

    from cenote.core import Engine

    Array = np.ndarray[Any, np.dtype[np.float32]]

UNIT_TOLERANCE = 1e-2
"""Maximum deviation from length 1 of vectors that count as normalised."""


def split(sequences: Seq[Sequence], limit: int) -> tuple[list[Sequence], list[range]]:
    """Cut sequences of `embed` that have more than `limit` tokens into blocks of `limit`.

    The tokens that pooling skips are the first ones of the input. Blocks of nothing else are left out.

    Returns:
        The blocks of all sequences, and the range of blocks of each sequence.

    Raises:
        TooLong: a sequence is too long, and its result is more than a vector.
    """
    parts: list[Sequence] = []
    groups: list[range] = []
    for sequence in sequences:
        begin = len(parts)
        if len(sequence) <= limit:
            parts.append(sequence)
        else:
            parts += _blocks(sequence, limit)
        groups.append(range(begin, len(parts)))
    return parts, groups


def _blocks(sequence: Sequence, limit: int) -> list[Sequence]:
    length = len(sequence)
    if sequence.media:
        raise TooLong(
            f"This model reads at most {limit} tokens at once, and the prompt contains {length}. Pictures are not cut "
            "into blocks; send fewer or smaller ones.",
            param="input_tokens",
        )
    if sequence.task != "embed" or sequence.also or sequence.hidden:
        raise TooLong(
            f"This model reads at most {limit} tokens at once, and the prompt contains {length}. Only the task "
            f"'embed' alone takes longer ones, without a query's expansion; got {[sequence.task, *sequence.also]}.",
            param="input_tokens",
        )
    last = (length - 1) // limit
    first = min(sequence.skip // limit, last)
    return [_block(sequence, start, min(start + limit, length)) for start in range(first * limit, length, limit)]


def _block(sequence: Sequence, start: int, end: int) -> Sequence:
    """Return tokens `start` to `end` of a sequence."""
    types = sequence.type_ids
    return replace(
        sequence,
        ids=sequence.ids[start:end],
        type_ids=None if types is None else types[start:end],
        skip=max(0, sequence.skip - start),
        keep=None,
    )


def merge(outputs: Seq[Output], parts: Seq[Sequence], groups: Seq[range], *, use_activation: bool) -> list[Output]:
    """Return one output for each of `groups`: the mean of its blocks' vectors, weighted by their tokens, in float32.

    Tokens that pooling skips do not count. A mean of unit vectors is scaled to length 1 again, where the activation
    is on.

    Args:
        outputs: outputs of `parts`.
        parts: see `split`.
        groups: see `split`.
        use_activation: default of that request parameter.
    """
    merged = []
    for group in groups:
        if len(group) == 1:
            merged.append(outputs[group[0]])
            continue
        weights = [len(parts[i]) - parts[i].skip for i in group]
        normalize = parts[group[0]].params.activates(use_activation)
        merged.append(Output(_mean([outputs[i].data for i in group], weights, normalize=normalize)))
    return merged


def _mean(vectors: list[Array], weights: list[int], *, normalize: bool) -> Array:
    stacked_ND = np.stack(vectors).astype(np.float32, copy=False)
    weights_N = np.asarray(weights, dtype=np.float32)
    mean_D: Array = (weights_N[:, None] * stacked_ND).sum(0) / weights_N.sum()
    if normalize and bool(np.allclose(np.linalg.norm(stacked_ND, axis=1), 1.0, rtol=UNIT_TOLERANCE, atol=0.0)):
        mean_D = mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
    return mean_D.astype(np.float32, copy=False)


class ChunkedEngine:
    """An engine for sequences of `embed` of any length, which another one runs in blocks.

    Args:
        engine: runs the blocks.
    """

    def __init__(self, engine: Engine) -> None:
        self.info = engine.info
        self._engine = engine

    @property
    def fault(self) -> str:
        """See `cenote.core.Engine.fault`."""
        return self._engine.fault

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`. `progress` is told of blocks as if they were shares of sequences."""
        limit = self.info.max_model_len
        if all(len(sequence) <= limit for sequence in sequences):
            return self._engine.submit(sequences, progress=progress)
        parts, groups = split(sequences, limit)
        promise: Promise[list[Output]] = Promise()
        inner = self._engine.submit(parts, progress=progress and _scaled(progress, len(groups), len(parts)))
        promise.future.times = times_of(inner)
        weak_inner = weakref.ref(inner)  # a cycle would keep the outputs until the garbage is collected

        def leave(outer: Future[list[Output]]) -> None:
            running = weak_inner()
            if outer.cancelled() and running is not None:
                running.cancel()

        def finish(done: Future[list[Output]]) -> None:
            promise.future.times = times_of(done)
            try:
                promise.resolve(merge(done.result(), parts, groups, use_activation=self.info.use_activation))
            except CancelledError:
                promise.future.cancel()
            except Exception as error:  # of the engine, or out of memory
                promise.fail(error)

        promise.future.add_done_callback(leave)
        inner.add_done_callback(finish)
        return promise.future

    def healthy(self) -> bool:
        """See `cenote.core.Engine.healthy`."""
        return self._engine.healthy()

    def close(self) -> None:
        """See `cenote.core.Engine.close`."""
        self._engine.close()


def _scaled(progress: Callable[[int], None], whole: int, parts: int) -> Callable[[int], None]:
    """Return a callback for `parts` blocks that tells `progress` of `whole` sequences in all."""
    done = told = 0

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        before, told = told, done * whole // parts
        if told > before:
            progress(told - before)

    return advance
