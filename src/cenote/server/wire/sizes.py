"""Sizes of answers, known before anything is computed for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cenote.core import coalesce
from cenote.errors import BadRequest
from cenote.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.core import ModelInfo, Sequence

JSON_NUMBER = 12
"""Bytes of a float32 in JSON, with its comma, on average."""
BASE64 = 4 / 3
"""Bytes of base64 for a byte."""
FORMS = {"float": JSON_NUMBER, "base64": 4 * BASE64, "int8": 4, "uint8": 4, "binary": 0.5, "ubinary": 0.5}
"""Bytes of a number of a vector in each of its small forms; eight numbers of a vector are one of binary forms."""
LARGEST_HEADER = 60_000
"""Bytes of a header: clients of Python's refuse a line of 65,536."""
LONGEST_ECHO = 256
"""Characters of a name that a client gives to a request and gets back."""


def echo(text: str | None) -> str:
    """Return a name that the client gave as an answer repeats it: cut, and valid Unicode."""
    return (text or "")[:LONGEST_ECHO].encode(errors="replace").decode()


def numbers(info: ModelInfo, sequences: Seq[Sequence]) -> int:
    """Return how many numbers the outputs of `sequences` have; of sparse weights a guess, one for each token."""
    return sum(_numbers(info, sequence, task) for sequence in sequences for task in (sequence.task, *sequence.also))


def _numbers(info: ModelInfo, sequence: Sequence, task: str) -> int:
    if task == "sparse":
        return 2 * coalesce(sequence.params.top_k, len(sequence))
    widths = {
        "embed": coalesce(sequence.params.dimensions, info.dimension),
        "token_embed": coalesce(sequence.params.dimensions, info.report.token_dimension or info.dimension),
    }
    rows = _rows(sequence) if TASKS[task].granularity == "token" else 1
    return rows * widths.get(task, info.num_labels)


def _rows(sequence: Sequence) -> int:
    """Return the rows of a task of tokens."""
    count = len(coalesce(sequence.keep, sequence.ids))
    chunks = sequence.params.late_chunking_params
    return count if chunks is None else -(-count // chunks.chunk_size)


def check(limit: int, info: ModelInfo, sequences: Seq[Sequence], number: float) -> None:
    """Refuse a request whose answer would be too large.

    Args:
        limit: maximum bytes of an answer.
        info: of the model.
        sequences: of the request.
        number: bytes of a number in the answer.

    Raises:
        BadRequest: it would have more bytes than an answer may have.
    """
    size = round(numbers(info, sequences) * number)
    if size > limit:
        raise BadRequest(
            f"the answer would have some {size} bytes, and at most {limit} are allowed (--max-response-bytes); send "
            "fewer or shorter inputs, or ask for a denser encoding: encoding_format 'base64' or 'bytes_only', "
            "embed_dtype 'float16'",
            param="input",
        )


def check_header(parts: Seq[dict[str, object]]) -> None:
    """Refuse metadata that would not fit into a header.

    Args:
        parts: entries of the metadata, one for each input, of the largest numbers.

    Raises:
        BadRequest: clients would not take it.
    """
    size = len(json.dumps([*parts], separators=(",", ":")))
    if size > LARGEST_HEADER:
        raise BadRequest(
            f"the metadata of {len(parts)} inputs would take {size} bytes of a header, and clients take at most "
            f"{LARGEST_HEADER}; ask for the encoding_format 'bytes_only', whose vectors follow each other in order, or "
            "send fewer inputs",
            param="encoding_format",
        )
