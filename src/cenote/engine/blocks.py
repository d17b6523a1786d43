"""Inputs of `embed` that are longer than a model reads: run in blocks, whose vectors are averaged."""

from __future__ import annotations

import logging
import weakref
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.core import Output, Sequence
from cenote.errors import TooLong

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from cenote.core import Engine

    Array = np.ndarray[Any, np.dtype[np.float32]]

log = logging.getLogger(__name__)

UNIT_TOLERANCE = 1e-2
"""By how much the length of a vector that counts as normalised may differ from 1."""


def split(sequences: Seq[Sequence], limit: int) -> tuple[list[Sequence], list[range]]:
    """Cut sequences of `embed` that have more than `limit` tokens into blocks of `limit`.

    The tokens that pooling skips are the first ones of the input. Blocks of nothing else are left out.

    Returns:
        The blocks of all sequences, and for each sequence which of them are its own.

    Raises:
        TooLong: a sequence is too long, and its result is more than a vector.
    """
    parts: list[Sequence] = []
    groups: list[range] = []
    for sequence in sequences:
        begin, length = len(parts), len(sequence)
        if length <= limit:
            parts.append(sequence)
        else:
            if sequence.task != "embed" or sequence.also or sequence.hidden:
                raise TooLong(
                    f"This model reads at most {limit} tokens at once, and the prompt contains {length}. Only the task "
                    "'embed' alone takes longer ones, without a query's expansion; "
                    f"got {[sequence.task, *sequence.also]}.",
                    param="input_tokens",
                )
            last = (length - 1) // limit
            for start in range(min(sequence.skip // limit, last) * limit, length, limit):
                parts.append(_block(sequence, start, min(start + limit, length)))
        groups.append(range(begin, len(parts)))
    return parts, groups


def _block(sequence: Sequence, start: int, end: int) -> Sequence:
    """Tokens `start` to `end` of a sequence."""
    types = sequence.type_ids
    return replace(
        sequence,
        ids=sequence.ids[start:end],
        type_ids=None if types is None else types[start:end],
        skip=max(0, sequence.skip - start),
        keep=None,
    )


def merge(outputs: Seq[Output], parts: Seq[Sequence], groups: Seq[range], *, use_activation: bool) -> list[Output]:
    """One output for each of `groups`: the mean of its blocks' vectors, weighted by their tokens, in float32.

    Tokens that pooling skips do not count. A mean of unit vectors is scaled to length 1 again, where the activation
    is on.

    Args:
        outputs: of `parts`.
        parts: see `split`.
        groups: see `split`.
        use_activation: default of that request parameter.
    """
    merged = []
    for group in groups:
        if len(group) == 1:
            merged.append(outputs[group[0]])
            continue
        activate = parts[group[0]].params.use_activation
        weights = [len(parts[i]) - parts[i].skip for i in group]
        is_on = use_activation if activate is None else activate
        merged.append(Output(_mean([outputs[i].data for i in group], weights, normalize=is_on)))
    return merged


def _mean(vectors: list[Array], weights: list[int], *, normalize: bool) -> Array:
    stacked_ND = np.stack(vectors).astype(np.float32, copy=False)
    weights_N = np.asarray(weights, dtype=np.float32)
    mean_D: Array = (weights_N[:, None] * stacked_ND).sum(0) / weights_N.sum()
    if normalize and bool(np.allclose(np.linalg.norm(stacked_ND, axis=1), 1.0, rtol=UNIT_TOLERANCE, atol=0.0)):
        mean_D = mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
    return mean_D.astype(np.float32, copy=False)


class ChunkedEngine:
    """Answers sequences of `embed` of any length from blocks that `engine` can run.

    Args:
        engine: what runs the blocks.
    """

    def __init__(self, engine: Engine) -> None:
        self.info = engine.info
        self._engine = engine

    def submit(
        self, sequences: Seq[Sequence], *, progress: Callable[[int], None] | None = None
    ) -> Future[list[Output]]:
        """See `cenote.core.Engine.submit`. `progress` is told of blocks as if they were shares of sequences."""
        limit = self.info.max_model_len
        if all(len(sequence) <= limit for sequence in sequences):
            return self._engine.submit(sequences, progress=progress)
        parts, groups = split(sequences, limit)
        outer: Future[list[Output]] = Future()
        inner = self._engine.submit(parts, progress=progress and _scaled(progress, len(groups), len(parts)))
        waiting = weakref.ref(inner)  # a cycle would keep the outputs until the garbage is collected

        def leave(given_up: Future[list[Output]]) -> None:
            if given_up.cancelled() and (running := waiting()) is not None:
                running.cancel()

        def finish(done: Future[list[Output]]) -> None:
            try:
                if done.cancelled():
                    outer.cancel()
                elif (error := done.exception()) is not None:
                    outer.set_exception(error)
                else:
                    outer.set_result(merge(done.result(), parts, groups, use_activation=self.info.use_activation))
            except InvalidStateError:
                log.debug("the caller gave up")
            except Exception as error:  # out of memory
                outer.set_exception(error)

        outer.add_done_callback(leave)
        inner.add_done_callback(finish)
        return outer

    def healthy(self) -> bool:
        """See `cenote.core.Engine.healthy`."""
        return self._engine.healthy()

    def close(self) -> None:
        """See `cenote.core.Engine.close`."""
        self._engine.close()


def _scaled(progress: Callable[[int], None], whole: int, parts: int) -> Callable[[int], None]:
    """A callback for `parts` blocks that tells `progress` of `whole` sequences in all."""
    done = told = 0

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if (now := done * whole // parts) > told:
            news, told = now - told, now
            progress(news)

    return advance
