"""Small vectors: float32 rows as half floats, as one byte per dimension, or as one bit per dimension.

A vector's code depends on that vector, the precision and fixed ranges only, never on the vectors beside it: the same
text has the same code in every batch. sentence-transformers, which otherwise is followed here, takes the ranges of
int8 from the batch where it is given none.

| precision | dtype | values per vector | one value |
|---|---|---|---|
| float | float32 | D | the value itself |
| float16 | float16 | D | the nearest half (IEEE 754) |
| uint8 | uint8 | D | floor((value - low) / step) kept within 0..255, step = (high - low) / 255 |
| int8 | int8 | D | uint8's - 128 |
| ubinary | uint8 | D / 8 | eight signs, the first dimension in the highest bit; set where value >= 0 |
| binary | int8 | D / 8 | ubinary's - 128 |
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from cenote.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from os import PathLike

    Array = np.ndarray[Any, np.dtype[np.float32]]
    Codes = np.ndarray[Any, np.dtype[Any]]

Precision = Literal["float", "float16", "int8", "uint8", "binary", "ubinary"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

UNIT_RANGE = 6.0
"""Half the width of the range for unit vectors, in units of 1/sqrt(D), their root mean square value in a dimension.

Measured with all-MiniLM-L6-v2 (D = 384) on docstrings of the standard library and on names that they document, 3,416
vectors: |value| * sqrt(D) has the quantiles 0.67 (50 %), 2.6 (99 %), 3.4 (99.9 %), 4.3 (99.99 %) and the largest value
6.15; shortened to 256, 128 and 64 dimensions and scaled to unit length again, 6.0, 6.0 and 4.3. Of the ten docstrings
among 1,000 that are nearest to each of 862 names, int8 on both sides finds

| half width | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 10 | 19.6 (-1..1) |
|---|---|---|---|---|---|---|---|---|---|
| of 10 | 9.11 | 9.72 | 9.88 | 9.91 | 9.91 | 9.89 | 9.89 | 9.85 | 9.73 |

Clipping costs more than coarse steps do, so 6, the wide end of the plateau, leaves room for models with longer tails.
"""

DTYPES = {
    "float": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "uint8": np.uint8,
    "binary": np.int8,
    "ubinary": np.uint8,
}


@dataclass(frozen=True, eq=False)
class Ranges:
    """The range of each dimension over which int8 and uint8 spread their 256 codes. Values outside get the nearest one.

    `Ranges.unit(D)` is one range for all dimensions, and the default. Its int8 codes may be compared as they are, by
    dot product, as clients of int8 vectors do. `Ranges.calibrated` fits each dimension to a model, unit length or not,
    with finer steps; but then each dimension has a step and an origin of its own, and codes compare well only once they
    are turned back (`dequantize`). So do uint8 codes of any range, whose zero is at 127.5.
    In the measurement at `UNIT_RANGE`, int8 codes as they are find 9.90 of 10 with the unit range and 7.91 with
    calibrated ones, uint8 codes 5.16 with the unit range; turned back, it is 9.91 and 9.86.

    Attributes:
        low_D: value at which code 0 begins, `[D]` float32, read-only.
        high_D: value at which code 255 begins, `[D]` float32, read-only. Where it equals `low_D`, the step is 1, as in
            sentence-transformers.

    Raises:
        ConfigError: the two are no vectors of one length, a value is no finite float32, or `low_D` is above `high_D`.
    """

    low_D: Array
    high_D: Array

    def __post_init__(self) -> None:
        for name in ("low_D", "high_D"):
            values_D = np.asarray(getattr(self, name))
            if values_D.dtype.kind not in "iuf":
                raise ConfigError(f"ranges must be numbers, got {values_D.dtype} values")
            with np.errstate(over="ignore"):
                copy_D = values_D.astype(np.float32)
            copy_D.flags.writeable = False
            object.__setattr__(self, name, copy_D)
        low_D, high_D = self.low_D, self.high_D
        if low_D.ndim != 1 or low_D.shape != high_D.shape or not low_D.size:
            raise ConfigError(f"ranges must be two vectors of one length, got the shapes {low_D.shape}, {high_D.shape}")
        _refuse("finite", ~(np.isfinite(low_D) & np.isfinite(high_D)), low_D, high_D)
        _refuse("low <= high", low_D > high_D, low_D, high_D)

    @classmethod
    def unit(cls, dimension: int) -> Ranges:
        """Return the range for vectors of length 1: `UNIT_RANGE / sqrt(dimension)` to either side of 0, at most 1.

        It depends on nothing but the dimension, so that shortened vectors (Matryoshka) have theirs too. Vectors that
        are much longer would be clipped and much shorter ones would share a few codes: calibrate for them.
        """
        high_D = np.full(dimension, min(1.0, UNIT_RANGE / math.sqrt(dimension)), np.float32)
        return cls(-high_D, high_D)

    @classmethod
    def calibrated(cls, vectors_ND: Array) -> Ranges:
        """Take the smallest and largest value of each dimension in a calibration set, as sentence-transformers does.

        Args:
            vectors_ND: `[N, D]` float32, at least 2, made as those that will be quantised. Few of them make narrow
                ranges: with 100 vectors of all-MiniLM-L6-v2, 3 % of the values of others lie outside, with 1,000 0.2 %.

        Raises:
            ConfigError: the set has another shape, fewer than 2 vectors, or values that are not finite.
        """
        shape = np.shape(vectors_ND)
        if len(shape) != 2 or shape[0] < 2:
            raise ConfigError(f"a calibration set must be a matrix of at least 2 vectors, got the shape {shape}")
        return cls(np.min(vectors_ND, axis=0), np.max(vectors_ND, axis=0))

    @classmethod
    def load(cls, path: str | PathLike[str], dimension: int | None = None) -> Ranges:
        """Read a file of `save`, or a `.npy` file of the `ranges` that sentence-transformers takes.

        Args:
            path: a `.json` file `{"low": [...], "high": [...]}`, or a `.npy` file `[2, D]` of low and high values.
            dimension: length of the vectors that will be quantised, if that is known.

        Raises:
            ConfigError: the file cannot be read, has another form, wrong values, or ranges for another dimension.
        """
        path = Path(path)
        try:
            low_D, high_D = _READERS[_suffix(path)](path)
            ranges = cls(low_D, high_D)
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise ConfigError(f"cannot take the ranges of int8 from {path}: {error}") from None
        if dimension not in (None, ranges.dimension):
            raise ConfigError(f"{path} has ranges for {ranges.dimension} dimensions, but the vectors have {dimension}")
        return ranges

    def save(self, path: str | PathLike[str]) -> None:
        """Write the ranges to a `.json` or `.npy` file, without loss.

        Raises:
            ConfigError: the name ends in neither.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if _suffix(path) == ".json":
            content = json.dumps({"low": self.low_D.tolist(), "high": self.high_D.tolist()})
            path.write_text(content + "\n", encoding="utf-8")
        else:
            with path.open("wb") as file:
                np.save(file, np.stack([self.low_D, self.high_D]))

    @property
    def dimension(self) -> int:
        """D."""
        return len(self.low_D)


def quantize(
    vectors_ND: Array, precision: Precision, ranges: Ranges | None = None, *, param: str | None = None
) -> Codes:
    """Return vectors in a smaller form; see the table at the top of this file.

    int8 and uint8 equal `sentence_transformers.util.quantize_embeddings(..., ranges=np.stack([low_D, high_D]))`. binary
    and ubinary follow vLLM's rule, value >= 0, where that function has value > 0: they differ in the bit of a value
    that is exactly zero, 0.0 or -0.0, and in nothing else. vLLM compares in float64: the same, for float32 values.

    Args:
        vectors_ND: `[N, D]` or `[D]` float32, finite.
        precision: one of `PRECISIONS`.
        ranges: of int8 and uint8; `None` is `Ranges.unit(D)`. The other precisions have no use for them.
        param: the request parameter that asks for the precision, for the error.

    Returns:
        `[N, D]` or `[D]`, for binary and ubinary `[N, D / 8]` or `[D / 8]`; of the table's dtype. float gives
        `vectors_ND` itself.

    Raises:
        BadRequest: the precision is unknown, `ranges` are for another dimension (as when vectors are shortened after
            calibration), or D is not a multiple of 8 for binary and ubinary.
    """
    if precision not in PRECISIONS:
        raise BadRequest(f"unknown precision {precision!r}; known are: {', '.join(PRECISIONS)}", param=param)
    dimension, dtype = vectors_ND.shape[-1], DTYPES[precision]
    if precision in ("int8", "uint8"):
        return _shifted(_steps(vectors_ND, _fitting(ranges, dimension, param)).astype(np.uint8), dtype)
    if precision in ("binary", "ubinary"):
        if dimension % 8:
            raise BadRequest(
                f"Embedding dimension must be a multiple of 8 for binary embedding types, but got {dimension}.",
                param=param,
            )
        return _shifted(np.packbits(vectors_ND >= 0, axis=-1), dtype)
    return vectors_ND.astype(dtype, copy=False)


def _steps(vectors_ND: Array, ranges: Ranges) -> Array:
    """Return the number of the step in which each value lies, 0 to 255."""
    steps_D = (ranges.high_D - ranges.low_D) / np.float32(255)
    steps_D = np.where(steps_D == 0, np.float32(1), steps_D)
    numbers_ND: Array = np.floor((vectors_ND.astype(np.float32, copy=False) - ranges.low_D) / steps_D).clip(0, 255)
    return numbers_ND


def dequantize(codes_ND: Codes, precision: Precision, ranges: Ranges | None = None) -> Array:
    """Return the vectors of codes, to measure the loss of a precision, or to compare codes of calibrated ranges.

    Args:
        codes_ND: result of `quantize`: `[N, D]` or `[D]`, for binary and ubinary `[N, D / 8]` or `[D / 8]`.
        precision: as in `quantize`.
        ranges: as in `quantize`.

    Returns:
        `[N, D]` or `[D]` float32. int8 and uint8: the middle of the step, at most half a step from any value within the
        range; where the range has no width, its one value. binary and ubinary: 1 where the bit is set, -1 where not.

    Raises:
        ValueError: the codes have not the precision's dtype, the precision is unknown, or `ranges` are for another
            dimension.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known are: {', '.join(PRECISIONS)}")
    if codes_ND.dtype != DTYPES[precision]:
        raise ValueError(f"{precision} codes are {np.dtype(DTYPES[precision])}, got {codes_ND.dtype}")
    if precision in ("int8", "uint8"):
        ranges = _fitting(ranges, codes_ND.shape[-1], None)
        places_ND = _shifted(codes_ND, np.uint8).astype(np.float32) + np.float32(0.5)
        return ranges.low_D + places_ND * ((ranges.high_D - ranges.low_D) / np.float32(255))
    if precision in ("binary", "ubinary"):
        return np.unpackbits(_shifted(codes_ND, np.uint8), axis=-1).astype(np.float32) * 2 - 1
    return codes_ND.astype(np.float32, copy=False)


def _shifted(bytes_NB: Codes, dtype: type[Any]) -> Codes:
    """Return bytes in `dtype`, int8 or uint8; int8 is uint8 - 128, the highest bit flipped."""
    if bytes_NB.dtype == dtype:
        return bytes_NB
    return (bytes_NB.view(np.uint8) ^ np.uint8(128)).view(dtype)


def _refuse(rule: str, fault_D: np.ndarray[Any, np.dtype[np.bool_]], low_D: Array, high_D: Array) -> None:
    if fault_D.any():
        place = int(fault_D.argmax())
        raise ConfigError(f"ranges must be {rule}, got {low_D[place]} to {high_D[place]} in dimension {place}")


def _fitting(ranges: Ranges | None, dimension: int, param: str | None) -> Ranges:
    """Return `ranges`, or the fixed ones, for vectors of `dimension`."""
    if ranges is None:
        return Ranges.unit(dimension)
    if ranges.dimension != dimension:
        raise BadRequest(
            f"int8 and uint8 vectors must have the {ranges.dimension} dimensions that their ranges are for, "
            f"but got {dimension}.",
            param=param,
        )
    return ranges


def _suffix(path: Path) -> str:
    if path.suffix not in _READERS:
        raise ConfigError(f"a file of ranges must end in {' or '.join(_READERS)}, got {path.name!r}")
    return path.suffix


def _read_json(path: Path) -> Any:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.keys() != {"low", "high"}:
        got = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'expected an object of "low" and "high", got {got}')
    return content["low"], content["high"]


def _read_npy(path: Path) -> Any:
    with path.open("rb") as file:
        ranges_2D = np.lib.format.read_array(file, allow_pickle=False)
    if ranges_2D.ndim != 2 or len(ranges_2D) != 2:
        raise ValueError(f"expected an array of the shape (2, dimensions), got {ranges_2D.shape}")
    return ranges_2D


_READERS = {".json": _read_json, ".npy": _read_npy}
