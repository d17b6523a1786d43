"""Sizes of answers, known before anything is computed for them, but for sparse weights without `top_k`."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING

from cenote.errors import BadRequest
from cenote.functions import coalesce
from cenote.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from cenote.core import ModelInfo, Output, Sequence

JSON_NUMBER = 12
"""Bytes of a float32 in JSON, with its comma, on average."""
BASE64 = 4 / 3
"""Bytes of base64 for a byte."""
FORMS = {"float": JSON_NUMBER, "base64": 4 * BASE64, "int8": 4, "uint8": 4, "binary": 0.5, "ubinary": 0.5}
"""Bytes of a number of a vector in each of its small forms; eight numbers of a vector are one of binary forms."""
LARGEST_NUMBER = sum(FORMS.values())
"""Bytes of a number in all of its forms at once."""
LARGEST_HEADER = 60_000
"""Bytes of a header: clients of Python's refuse a line of 65,536."""
LONGEST_ECHO = 256
"""Characters of a name that a client gives to a request and gets back."""


def echo(text: str | None) -> str:
    """Return a name that the client gave as an answer repeats it: cut, and valid Unicode."""
    return (text or "")[:LONGEST_ECHO].encode(errors="replace").decode()


def numbers(info: ModelInfo, sequences: Seq[Sequence]) -> int:
    """Return how many numbers the outputs of `sequences` have, which share tasks and parameters.

    Sparse weights without `top_k` do not count: how many there are, the model decides, see `check_weights`.
    """
    first = sequences[0]
    count = _numbers(info, sequences, first.task)
    for task in first.also:
        count += _numbers(info, sequences, task)
    return count


def _numbers(info: ModelInfo, sequences: Seq[Sequence], task: str) -> int:
    params = sequences[0].params
    if task == "sparse":
        return 2 * min(params.top_k or 0, info.vocab_size) * len(sequences)
    rows = sum(map(_rows, sequences)) if TASKS[task].granularity == "token" else len(sequences)
    if "classify" in task:
        return rows * info.num_labels
    dimension = info.report.token_dimension if task == "token_embed" else 0
    return rows * coalesce(params.dimensions, dimension or info.dimension)


def _rows(sequence: Sequence) -> int:
    """Return the rows of a task of tokens."""
    count = len(coalesce(sequence.keep, sequence.ids))
    chunks = sequence.params.late_chunking_params
    if chunks is None:
        return count
    return len(chunks.ends) or -(-count // chunks.chunk_size)


def check(limit: int, count: int, number: float) -> None:
    """Refuse a request whose answer would be too large.

    Args:
        limit: maximum bytes of an answer.
        count: numbers in it.
        number: bytes of each.

    Raises:
        BadRequest: it would have more bytes than an answer may have.
    """
    size = round(count * number)
    if size > limit:
        raise BadRequest(
            f"the answer would have some {size} bytes, and at most {limit} are allowed (--max-response-bytes); send "
            "fewer or shorter inputs, or ask for a denser encoding: encoding_format 'base64' or 'bytes_only', "
            "embed_dtype 'float16'",
            param="input",
        )


def check_weights(limit: int, outputs: Iterable[Output]) -> None:
    """Refuse a request whose sparse weights, which are computed and not yet encoded, are too many.

    Args:
        limit: maximum bytes of an answer.
        outputs: of the request; those without weights do not count.

    Raises:
        BadRequest: it would have more bytes than an answer may have.
    """
    weights = sum(map(_weights, outputs))
    size = 2 * JSON_NUMBER * weights
    if size > limit:
        raise BadRequest(
            f"the answer would have {weights} sparse weights, some {size} bytes, and at most {limit} are allowed "
            "(--max-response-bytes); send fewer or shorter inputs, or ask for the largest weights alone by `top_k`",
            param="input",
        )


def _weights(output: Output) -> int:
    """Return the sparse weights of a sequence, those of further tasks included."""
    parts = chain([output], output.others.values())
    return sum(part.indices.size for part in parts if part.indices is not None)


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
