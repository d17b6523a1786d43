"""A plugin that cuts a text into chunks where its subject changes.

Sentences are embedded one by one. Two neighbours stay together if the cosine of their vectors reaches a threshold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from cenote import IOProcessor, PoolingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cenote.outputs import PoolingOutput, PoolingRequestOutput

THRESHOLD = 0.3
FIELDS = ("text", "threshold", "max_chunks")
GAP = re.compile(
    r"""(?: (?<=[.!?…]) | (?<=[.!?…]["'”’)\]]) ) \s+   # space after the end of a sentence, which may be quoted
      | \n\s*\n                                        # an empty line
      | (?<=[。！？]) (?![。！？」』”’]) \s*            # scripts that put no space between sentences
    """,  # noqa: RUF001
    re.VERBOSE,
)


@dataclass(frozen=True)
class Job:
    """A request that was understood.

    Attributes:
        spans: start and end of each sentence; each begins where the one before ends.
        threshold: cosine from which on two neighbours stay together.
        max_chunks: the most chunks wanted; `None` = any number.
    """

    text: str
    spans: list[tuple[int, int]]
    threshold: float
    max_chunks: int | None


@dataclass(frozen=True)
class Chunk:
    """A part of the text. `text[start:end]` of all chunks, one after the other, is the whole text."""

    start: int
    end: int
    text: str
    sentences: int
    vector: torch.Tensor


@dataclass(frozen=True)
class Chunks:
    """The answer.

    Attributes:
        cosines: of each sentence and the next, to choose a threshold by.
        tokens: how many the model has read.
    """

    chunks: list[Chunk]
    cosines: torch.Tensor
    tokens: int


class SemanticChunks(IOProcessor[Job, Chunks]):
    """`{"text": ..., "threshold": 0.3, "max_chunks": null}` to `Chunks`."""

    def parse_data(self, data: Any) -> Job:
        """What is raised here is told to the client."""
        if not isinstance(data, dict) or not isinstance(data.get("text"), str) or not data["text"].strip():
            raise ValueError("`data` must be an object with a `text` that is not empty")
        if unknown := sorted(set(data) - set(FIELDS)):
            raise ValueError(f"`data` has unknown fields {unknown}; known are {list(FIELDS)}")
        threshold, most = data.get("threshold", THRESHOLD), data.get("max_chunks")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not -1 <= threshold <= 1:
            raise ValueError(f"`threshold` is a cosine, a number from -1 to 1, got {threshold!r}")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise ValueError(f"`max_chunks` must be a positive integer, got {most!r}")
        return Job(data["text"], sentences(data["text"]), threshold, most)

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """Vectors, whatever the model's default task is."""
        return PoolingParams(task="embed")

    def pre_process(self, prompt: Job, request_id: str | None = None, **kwargs: Any) -> list[str]:
        """A prompt per sentence."""
        return [prompt.text[start:end].strip() for start, end in prompt.spans]

    def post_process(
        self,
        outputs: Sequence[PoolingRequestOutput[PoolingOutput]],
        request_id: str | None = None,
        *,
        data: Job,
        **kwargs: Any,
    ) -> Chunks:
        """Chunks of neighbours, each with the mean of its sentences' vectors."""
        vectors_SD = normalize(torch.stack([output.outputs.data for output in outputs]), dim=-1)
        cosines = (vectors_SD[:-1] * vectors_SD[1:]).sum(-1)
        edges = [0, *cuts(cosines.tolist(), data.threshold, data.max_chunks), len(data.spans)]
        chunks = []
        for first, end in pairwise(edges):
            start, stop = data.spans[first][0], data.spans[end - 1][1]
            vector = normalize(vectors_SD[first:end].mean(0), dim=-1)
            chunks.append(Chunk(start, stop, data.text[start:stop], end - first, vector))
        return Chunks(chunks, cosines, sum(len(output.prompt_token_ids) for output in outputs))


def sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence with the space behind it: together the whole text."""
    begin = len(text) - len(text.lstrip())
    ends = [match.end() for match in GAP.finditer(text) if match.start() > begin and match.end() < len(text)]
    return list(zip([0, *ends], [*ends, len(text)], strict=True))


def cuts(cosines: list[float], threshold: float, max_chunks: int | None) -> list[int]:
    """Numbers of the sentences that begin a new chunk: behind the weakest links, if there may not be that many."""
    weak = [i for i, cosine in enumerate(cosines, 1) if cosine < threshold]
    if max_chunks is not None:
        weak = sorted(weak, key=lambda i: cosines[i - 1])[: max_chunks - 1]
    return sorted(weak)
