"""Vectors out of answers in base64 and bytes, for clients; `cenote.server.wire.encoding` writes them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EMBED_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Dtypes by their names in requests."""
EMBED_DTYPE_TO_TORCH_DTYPE = EMBED_DTYPES
ENDIANNESS = ("native", "big", "little")


@dataclass
class MetadataItem:
    """One vector in a body of bytes, as the header `metadata` tells it.

    Attributes:
        index: its place among the inputs.
        embed_dtype: one of `EMBED_DTYPES`.
        endianness: one of `ENDIANNESS`.
        start: first of its bytes.
        end: byte after its last one.
        shape: `[D]`, or `[T, D]` of a matrix.
    """

    index: int
    embed_dtype: str
    endianness: str
    start: int
    end: int
    shape: Sequence[int]


def binary2tensor(tensor: bytes, shape: Sequence[int], embed_dtype: str, endianness: str) -> torch.Tensor:
    """Return the tensor in bytes, of the dtype in which they were sent; a size of -1 follows from the others."""
    dtype = EMBED_DTYPES[embed_dtype]
    octets = torch.frombuffer(bytearray(tensor), dtype=torch.uint8)
    if endianness not in ("native", sys.byteorder):
        octets = octets.view(-1, dtype.itemsize).flip(-1).contiguous().view(-1)
    return octets.view(dtype).view(*shape)


def build_metadata_items(embed_dtype: str, endianness: str, shape: Sequence[int], n_request: int) -> list[MetadataItem]:
    """Return the places of vectors of one shape in a body that comes without a header."""
    size = EMBED_DTYPES[embed_dtype].itemsize * math.prod(shape)
    return [
        MetadataItem(index, embed_dtype, endianness, index * size, (index + 1) * size, shape)
        for index in range(n_request)
    ]


def decode_pooling_output(items: Iterable[MetadataItem], body: bytes) -> list[torch.Tensor]:
    """Return the tensors in the body of an answer, in the order of the inputs."""
    ordered = sorted(items, key=lambda item: item.index)
    return [
        binary2tensor(body[item.start : item.end], item.shape, item.embed_dtype, item.endianness) for item in ordered
    ]
