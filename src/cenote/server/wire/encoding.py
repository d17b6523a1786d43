"""Vectors on the wire: JSON numbers, base64, or raw bytes, in several dtypes and byte orders.

Bodies are bytes made by orjson straight from NumPy; no object is built per vector.
"""

from __future__ import annotations

import base64
import json
import sys
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import ml_dtypes
import numpy as np
import orjson
from starlette.responses import Response

from cenote.tensors.quantize import quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

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
"""Integer dtypes by their size in bytes, for swapping the bytes of numbers."""


def itemsize(dtype: EmbedDType) -> int:
    """Return the bytes of a number of `dtype`."""
    return _DTYPES[dtype].itemsize


def to_bytes(values: np.ndarray[Any, np.dtype[np.float32]], dtype: EmbedDType, endianness: Endianness) -> bytes:
    """Return the bytes of `values`, rounded to the nearest number of `dtype`, ties to even, as torch rounds.

    Numbers too large for fp8_e4m3, which has no infinity, become its largest number.

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
    """Return `vectors` in each of `types`, as `json_response` takes them: `[N, ...]` arrays, of base64 a list of texts.

    Args:
        vectors: float32 `[D]` each, of one D.
        types: at least one of `VECTOR_TYPES`.
        ranges: of int8 and uint8; `None` is the fixed range of unit vectors.
        param: the request parameter that asks for the types, for errors.

    Raises:
        BadRequest: see `cenote.tensors.quantize.quantize`.
    """
    vectors_ND = np.stack(vectors)
    forms: dict[VectorType, Any] = {}
    for name in dict.fromkeys(types):
        if name == "base64":
            forms[name] = [_base64(to_bytes(row_D, "float32", "little")) for row_D in vectors_ND]
        else:
            forms[name] = quantize(vectors_ND, name, ranges, param=param)
    return forms


def typed_values(
    vectors: Sequence[np.ndarray[Any, np.dtype[np.float32]]],
    types: Sequence[VectorType],
    ranges: Ranges | None = None,
    *,
    as_base64: bool = False,
    param: str | None = None,
) -> list[Any]:
    """Return the value of each of `vectors` in an answer of one entry per vector.

    One type gives that form itself, several an object by type. With `as_base64`, numbers are base64 of their bytes
    (little-endian float32 for float), as clients of Voyage decode them.

    Args:
        vectors: see `typed`, as for the others.
    """
    forms = typed(vectors, types, ranges, param=param)
    if as_base64:
        forms = {name: [*map(_coded, rows)] for name, rows in forms.items()}
    if len(forms) == 1:
        return list(*forms.values())
    return [dict(zip(forms, entry, strict=True)) for entry in zip(*forms.values(), strict=True)]


def _coded(row: Any) -> str:
    return row if isinstance(row, str) else _base64(row.astype(row.dtype.newbyteorder("<")).tobytes())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def to_json(content: Any, default: Callable[[Any], Any] | None = None, option: int = 0) -> bytes:
    """Return the JSON of all that leaves as JSON; NumPy arrays become numbers.

    A number is the shortest text that reads back as the same float32. Lone surrogates, which a client may send and
    which have no UTF-8, become question marks, in keys too.
    """
    option |= orjson.OPT_SERIALIZE_NUMPY
    try:
        return orjson.dumps(content, default, option)
    except TypeError as error:
        if "surrogates" not in str(error):
            raise
        return orjson.dumps(_valid(content), default, option)


def _valid(value: Any) -> Any:
    """Return a value of JSON whose texts are valid Unicode."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return dict(map(_valid, value.items()))
    if isinstance(value, (list, tuple)):
        return [*map(_valid, value)]
    return value


def json_response(content: Any) -> Response:
    """Return `content` as JSON, see `to_json`."""
    return Response(to_json(content), media_type="application/json")


def foreign_response(content: Any) -> Response:
    """Return `content` of a plugin as JSON: also tensors, pydantic models, sets, and keys that are not strings.

    Raises:
        TypeError: a value in it has no JSON.
    """
    return Response(to_json(content, _plain, orjson.OPT_NON_STR_KEYS), media_type="application/json")


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
    """Return the answer of `/v1/embeddings` and `/pooling` in any encoding.

    Args:
        head: `id`, `object`, `created`, `model`, `usage` of the answer.
        vectors: `[D]` or `[T, D]` per input.
        kind: `object` of each entry.
        field: name of the entry's value.
        beside: further fields of each entry, in the format `float`.
    """
    if encoding_format == "float":
        return json_response(with_data(head, entries(kind, field, map(np.ascontiguousarray, vectors), beside)))
    raw = [to_bytes(vector, embed_dtype, endianness) for vector in vectors]
    if encoding_format == "base64":
        return json_response(with_data(head, entries(kind, field, [*map(_base64, raw)])))
    response = Response(b"".join(raw), media_type="application/octet-stream")
    if encoding_format == "bytes":
        sizes = map(len, raw)
        parts = byte_parts(sizes, [vector.shape for vector in vectors], embed_dtype, endianness)
        metadata = {key: head[key] for key in ("id", "created", "model")}
        metadata |= {"data": parts, "usage": short_usage(head)}
        response.headers["metadata"] = json.dumps(metadata, separators=(",", ":"))  # a header takes no UTF-8
    return response


def byte_parts(
    sizes: Iterable[int], shapes: Iterable[tuple[int, ...]], embed_dtype: EmbedDType, endianness: Endianness
) -> list[dict[str, object]]:
    """Return the entries of the metadata of raw bytes, one for each vector or matrix.

    Args:
        sizes: bytes of each.
        shapes: shape of each.
        embed_dtype: of all.
        endianness: of all.
    """
    form = {"embed_dtype": embed_dtype, "endianness": endianness}
    places = pairwise(accumulate(sizes, initial=0))
    return [
        {"index": i, **form, "start": start, "end": end, "shape": list(shape)}
        for i, ((start, end), shape) in enumerate(zip(places, shapes, strict=True))
    ]


def short_usage(head: dict[str, Any]) -> dict[str, int]:
    """Return the two counts of an answer's usage that short forms of it have."""
    return {key: head["usage"][key] for key in ("prompt_tokens", "total_tokens")}


def entries(
    kind: str, field: str, values: Iterable[Any], beside: Sequence[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return the entries of an answer.

    Args:
        kind: `object` of each.
        field: name of the value.
        values: one for each entry.
        beside: further fields of each entry.
    """
    data = [{"index": i, "object": kind, field: value} for i, value in enumerate(values)]
    if beside:
        for entry, more in zip(data, beside, strict=True):
            entry |= more
    return data


def with_data(head: dict[str, Any], data: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an answer with `data` before `usage`, where clients print it."""
    answer = {**head, "data": data}
    answer["usage"] = answer.pop("usage")
    return answer


def _plain(value: Any) -> Any:
    """Return a value that orjson cannot encode in terms that it can."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if hasattr(value, "detach"):
        return _array(value)
    if isinstance(value, np.ndarray):
        return value.tolist() if value.flags.c_contiguous else np.ascontiguousarray(value)
    if isinstance(value, (tuple, set, frozenset)):
        return list(value)
    raise TypeError


def _array(tensor: Any) -> Any:
    """Return a tensor as an array; NumPy has no bfloat16 and no fp8."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.itemsize < 4:
        tensor = tensor.float()
    return tensor.numpy()
