"""Vectors on the wire: JSON numbers, base64, or raw bytes, in several dtypes and byte orders.

Bodies are bytes made by orjson straight from NumPy; no object is built per vector.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import TYPE_CHECKING, Any, Literal, get_args

import ml_dtypes
import numpy as np
import orjson
from starlette.responses import Response

from cenote.tensors.quantize import quantize

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cenote.tensors.quantize import Ranges

EmbedDType = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "big", "little"]
EncodingFormat = Literal["float", "base64", "bytes", "bytes_only"]
VectorType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]

VECTOR_TYPES: tuple[VectorType, ...] = get_args(VectorType)
"""Forms of a dense vector that requests may ask for: `quantize`'s, and base64 of little-endian float32."""

_DTYPES: dict[EmbedDType, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
LARGEST_E4M3 = 448.0
_BITS = {4: np.uint32, 2: np.uint16, 1: np.uint8}
"""Integers by their bytes, as which the bits of numbers are swapped."""


def to_bytes(values: np.ndarray[Any, np.dtype[np.float32]], dtype: EmbedDType, endianness: Endianness) -> bytes:
    """Raw bytes of `values`, rounded to the nearest number of `dtype`, ties to even, as torch rounds.

    What is too large for fp8_e4m3, which has no infinity, becomes its largest number.

    Args:
        values: finite, of any shape.
    """
    if dtype == "fp8_e4m3":
        values = values.clip(-LARGEST_E4M3, LARGEST_E4M3)
    bits = values.astype(_DTYPES[dtype], copy=False).view(_BITS[_DTYPES[dtype].itemsize])
    if endianness not in ("native", sys.byteorder):
        bits = bits.byteswap()
    return bits.tobytes()


def typed(
    vectors: Sequence[np.ndarray[Any, np.dtype[np.float32]]],
    types: Iterable[VectorType],
    ranges: Ranges | None = None,
    *,
    param: str | None = None,
) -> dict[VectorType, Any]:
    """`vectors` in each of `types`, as `json_response` takes them: `[N, ...]` arrays, of base64 a list of texts.

    Args:
        vectors: float32 `[D]` each, of one D.
        types: at least one of `VECTOR_TYPES`.
        ranges: of int8 and uint8; `None` is the fixed range of unit vectors.
        param: the request parameter that asks for the types, for errors.

    Raises:
        BadRequest: see `cenote.tensors.quantize.quantize`.
    """
    vectors_ND = np.stack(vectors)
    return {
        name: [base64.b64encode(to_bytes(row_D, "float32", "little")).decode() for row_D in vectors_ND]
        if name == "base64"
        else quantize(vectors_ND, name, ranges, param=param)
        for name in dict.fromkeys(types)
    }


def typed_values(
    vectors: Sequence[np.ndarray[Any, np.dtype[np.float32]]],
    types: Sequence[VectorType],
    ranges: Ranges | None = None,
    *,
    as_base64: bool = False,
    param: str | None = None,
) -> list[Any]:
    """What stands for each of `vectors` in an answer of one entry per vector.

    One type gives that form itself, several an object by type. With `as_base64`, numbers are base64 of their bytes
    (little-endian float32 for float), as clients of Voyage decode them.

    Args:
        vectors: see `typed`, as for the others.
    """
    forms = typed(vectors, types, ranges, param=param)
    if as_base64:
        forms = {name: [_coded(row) for row in rows] for name, rows in forms.items()}
    if len(forms) == 1:
        return list(*forms.values())
    return [dict(zip(forms, entry, strict=True)) for entry in zip(*forms.values(), strict=True)]


def _coded(row: Any) -> str:
    return row if isinstance(row, str) else base64.b64encode(row.astype(row.dtype.newbyteorder("<")).tobytes()).decode()


def json_response(content: Any) -> Response:
    """`content` as JSON; NumPy arrays become numbers (the shortest text that reads back as the same float32)."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def foreign_response(content: Any) -> Response:
    """`content` of a plugin's making as JSON: also tensors, pydantic models, sets, and keys that are no text.

    Raises:
        TypeError: something in it has no JSON.
    """
    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    return Response(orjson.dumps(content, _plain, option), media_type="application/json")


def vectors_response(
    head: dict[str, Any],
    vectors: Sequence[np.ndarray[Any, np.dtype[np.float32]]],
    *,
    kind: str,
    field: str,
    encoding_format: EncodingFormat,
    embed_dtype: EmbedDType,
    endianness: Endianness,
    beside: Sequence[dict[str, Any]] | None = None,
) -> Response:
    """The answer of `/v1/embeddings` and `/pooling` in any encoding.

    Args:
        head: `id`, `object`, `created`, `model`, `usage` of the answer.
        vectors: `[D]` or `[T, D]` per input.
        kind: `object` of each entry.
        field: name of the entry's value.
        beside: further fields of each entry, in the format `float`.
    """
    if encoding_format == "float":
        data = [{"index": i, "object": kind, field: np.ascontiguousarray(v)} for i, v in enumerate(vectors)]
        data = [entry | more for entry, more in zip(data, beside, strict=True)] if beside else data
        return json_response(with_data(head, data))
    raw = [to_bytes(v, embed_dtype, endianness) for v in vectors]
    if encoding_format == "base64":
        coded = [{"index": i, "object": kind, field: base64.b64encode(b).decode()} for i, b in enumerate(raw)]
        return json_response(with_data(head, coded))
    headers = {}
    if encoding_format == "bytes":
        ends = np.cumsum([len(b) for b in raw]).tolist()
        entries = [
            {
                "index": i,
                "embed_dtype": embed_dtype,
                "endianness": endianness,
                "start": end - len(b),
                "end": end,
                "shape": list(v.shape),
            }
            for i, (b, v, end) in enumerate(zip(raw, vectors, ends, strict=True))
        ]
        usage = {key: head["usage"][key] for key in ("prompt_tokens", "total_tokens")}
        described = {key: head[key] for key in ("id", "created", "model")} | {"data": entries, "usage": usage}
        headers["metadata"] = json.dumps(described, separators=(",", ":"))  # a header takes no UTF-8
    return Response(b"".join(raw), headers=headers, media_type="application/octet-stream")


def with_data(head: dict[str, Any], data: list[dict[str, Any]]) -> dict[str, Any]:
    """`data` put before `usage`, where clients print it."""
    usage = head["usage"]
    return {**{key: value for key, value in head.items() if key != "usage"}, "data": data, "usage": usage}


def _plain(value: Any) -> Any:
    """What orjson does not know, made of what it knows."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if hasattr(value, "detach"):  # a tensor; NumPy has no bfloat16 and no fp8
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() and value.itemsize < 4 else value).numpy()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.flags.c_contiguous else np.ascontiguousarray(value)
    if isinstance(value, (tuple, set, frozenset)):
        return list(value)
    raise TypeError
