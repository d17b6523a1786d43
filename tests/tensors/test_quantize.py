"""Quantised vectors against sentence-transformers, and the promise that a code depends on no neighbour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from cenote import LLM
from cenote.errors import BadRequest, ConfigError
from cenote.tensors.quantize import DTYPES, PRECISIONS, Precision, Ranges, dequantize, quantize
from material import corpus

WIDTH = 48
BYTES: tuple[Precision, ...] = ("int8", "uint8")
BITS: tuple[Precision, ...] = ("binary", "ubinary")


def normal(count: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)


def unit(count: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    rows = normal(count, width, seed)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    """Unit vectors of a model, `[50, 384]`."""
    with LLM() as llm:
        outputs = llm.embed(
            list(corpus.docstrings(50)), use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1}
        )
    rows = np.array([output.outputs.embedding for output in outputs], np.float32)
    rows.flags.writeable = False
    return rows


@pytest.fixture(params=["random", pytest.param("real", marks=pytest.mark.full)])
def vectors(request: pytest.FixtureRequest) -> np.ndarray:
    found: np.ndarray = unit(200) if request.param == "random" else request.getfixturevalue("real")
    return found


def theirs(vectors: np.ndarray, precision: Precision, ranges: Ranges) -> np.ndarray:
    codes: np.ndarray = quantize_embeddings(vectors, precision, ranges=np.stack([ranges.low_D, ranges.high_D]))
    return codes


def equal(mine: np.ndarray, expected: np.ndarray) -> None:
    assert mine.dtype == expected.dtype
    np.testing.assert_array_equal(mine, expected)


def ranges_of(kind: str, vectors: np.ndarray) -> Ranges:
    """The fixed range, those of all vectors, or those of a few, which clip the others."""
    if kind == "unit":
        return Ranges.unit(vectors.shape[1])
    return Ranges.calibrated(vectors[:20] if kind == "few" else vectors)


@pytest.mark.parametrize("kind", ["unit", "all", "few"])
@pytest.mark.parametrize("precision", BYTES)
def test_bytes_equal_sentence_transformers(vectors: np.ndarray, precision: Precision, kind: str) -> None:
    ranges = ranges_of(kind, vectors)
    codes = quantize(vectors, precision, ranges)
    equal(codes, theirs(vectors, precision, ranges))
    assert len(np.unique(codes)) > 100
    if kind == "few":
        assert {0, 255} <= set((codes.astype(np.int32) + (128 if precision == "int8" else 0)).ravel().tolist())


@pytest.mark.parametrize("precision", BYTES)
def test_bytes_of_a_dimension_without_width(precision: Precision) -> None:
    vectors = unit(50)
    vectors[:, 3] = 0.25
    ranges = Ranges.calibrated(vectors)
    others = unit(50, seed=1)
    others[:, 3] = 0.25 + np.arange(50) * 0.5
    codes = quantize(others, precision, ranges)
    equal(codes, theirs(others, precision, ranges))
    assert (codes[:, 3] - codes[0, 3]).tolist() == [i // 2 for i in range(50)], "the step is 1"
    assert dequantize(quantize(vectors, precision, ranges), precision, ranges)[:, 3].tolist() == [0.25] * 50


def test_bytes_by_hand() -> None:
    ranges = Ranges(np.array([0, -255, 0], np.float32), np.array([255, 255, 510], np.float32))
    vectors = np.array([[0, 0, 509.9], [0.99, -256, 510], [1, 256, 0], [254.9, 1.9, -7], [300, 2.1, 1e30]], np.float32)
    expected = [[0, 127, 254], [0, 0, 255], [1, 255, 0], [254, 128, 0], [255, 128, 255]]
    assert quantize(vectors, "uint8", ranges).tolist() == expected
    assert quantize(vectors, "int8", ranges).tolist() == (np.array(expected) - 128).tolist()


@pytest.mark.parametrize("precision", BITS)
def test_bits_equal_sentence_transformers(vectors: np.ndarray, precision: Precision) -> None:
    assert (vectors != 0).all()
    codes = quantize(vectors, precision)
    assert codes.shape == (len(vectors), vectors.shape[1] // 8)
    equal(codes, quantize_embeddings(vectors, precision))


def test_bits_by_hand() -> None:
    smallest = np.finfo(np.float32).smallest_subnormal
    row = np.array([1, -1, -1, smallest, -smallest, -1, -1, -1] + [-1] * 8 + [1] * 8, np.float32)
    assert quantize(row, "ubinary").tolist() == [0b10010000, 0, 255]
    assert quantize(row, "binary").tolist() == [0b10010000 - 128, -128, 127]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_bits_differ_from_sentence_transformers_at_zero_only(zero: float) -> None:
    row = np.array([[zero, -1, 1, -1, -1, -1, -1, zero]], np.float32)
    assert quantize(row, "ubinary").tolist() == [[0b10100001]]
    assert quantize_embeddings(row, "ubinary").tolist() == [[0b00100000]]
    assert quantize(row, "binary").tolist() == [[0b10100001 - 128]]


def test_floats() -> None:
    vectors = unit(5)
    assert quantize(vectors, "float") is vectors
    halves = quantize(vectors, "float16")
    assert halves.dtype == np.float16
    assert halves.tobytes() == vectors.astype("<f2").tobytes()
    assert dequantize(halves, "float16") == pytest.approx(vectors, rel=2**-11, abs=2**-25)
    assert np.array_equal(dequantize(vectors, "float"), vectors)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_code_depends_on_no_neighbour(precision: Precision, calibrated: bool) -> None:
    vectors = np.concatenate([unit(20), unit(3) * 50])
    ranges = Ranges.calibrated(unit(100, seed=2)) if calibrated else None
    together = quantize(vectors, precision, ranges)
    assert together.dtype == DTYPES[precision]
    alone = [quantize(row, precision, ranges) for row in vectors]
    assert [code.shape for code in alone] == [together.shape[1:]] * len(vectors)
    equal(np.stack(alone), together)
    equal(quantize(vectors[::-2], precision, ranges), together[::-2])
    assert quantize(vectors[:0], precision, ranges).shape == (0, *together.shape[1:])
    back = dequantize(together, precision, ranges)
    assert back.shape == vectors.shape
    equal(np.stack([dequantize(code, precision, ranges) for code in alone]), back)


@pytest.mark.parametrize("kind", ["unit", "all"])
@pytest.mark.parametrize("precision", BYTES)
def test_a_round_trip_errs_by_half_a_step(vectors: np.ndarray, precision: Precision, kind: str) -> None:
    ranges = ranges_of(kind, vectors)
    steps_D = (ranges.high_D - ranges.low_D) / 255
    inside = np.clip(vectors, ranges.low_D, ranges.high_D)
    back = dequantize(quantize(vectors, precision, ranges), precision, ranges)
    assert back.dtype == np.float32
    errors = np.abs(back - inside) / steps_D
    assert errors.max() <= 0.5 + 1e-3
    assert errors.mean() == pytest.approx(0.25, abs=0.01), "steps are met evenly, so that half of half a step is usual"


@pytest.mark.parametrize("precision", BITS)
def test_a_round_trip_keeps_signs(precision: Precision) -> None:
    vectors = unit(50)
    equal(dequantize(quantize(vectors, precision), precision), np.where(vectors >= 0, 1, -1).astype(np.float32))


@pytest.mark.full
def test_the_unit_range_holds_the_vectors_of_a_model(real: np.ndarray) -> None:
    for width in (384, 128):
        vectors = real[:, :width] / np.linalg.norm(real[:, :width], axis=1, keepdims=True)
        ranges = Ranges.unit(width)
        assert np.mean((vectors < ranges.low_D) | (vectors > ranges.high_D)) < 1e-4
        back = dequantize(quantize(vectors, "int8"), "int8")
        back /= np.linalg.norm(back, axis=1, keepdims=True)
        assert (back * vectors).sum(1).min() > 0.9998


def test_the_unit_range_depends_on_the_dimension_alone() -> None:
    for dimension, high in ((10_000, 0.06), (384, 6 / 384**0.5), (36, 1), (16, 1), (1, 1)):
        ranges = Ranges.unit(dimension)
        assert ranges.dimension == dimension
        assert ranges.low_D.dtype == ranges.high_D.dtype == np.float32
        assert ranges.high_D.tolist() == [np.float32(high)] * dimension
        assert ranges.low_D.tolist() == [-np.float32(high)] * dimension
    equal(quantize(unit(3), "int8"), quantize(unit(3), "int8", Ranges.unit(WIDTH)))


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("width", [1, 7, 12, 1001])
def test_bits_of_other_widths_are_refused(width: int, precision: Precision) -> None:
    message = f"Embedding dimension must be a multiple of 8 for binary embedding types, but got {width}."
    for vectors in (np.zeros((2, width), np.float32), np.zeros(width, np.float32)):
        with pytest.raises(BadRequest) as caught:
            quantize(vectors, precision, param="embedding_types")
        assert (caught.value.message, caught.value.param) == (message, "embedding_types")


@pytest.mark.parametrize("precision", BYTES)
def test_ranges_of_another_dimension_are_refused(precision: Precision) -> None:
    with pytest.raises(BadRequest, match="must have the 64 dimensions .* but got 48") as caught:
        quantize(unit(2), precision, Ranges.unit(64), param="output_dtype")
    assert caught.value.param == "output_dtype"
    with pytest.raises(ValueError, match="64 dimensions"):
        dequantize(np.zeros(48, DTYPES[precision]), precision, Ranges.unit(64))


def test_unknown_precisions_are_refused() -> None:
    unknown: Any = "int4"
    with pytest.raises(BadRequest, match=r"unknown precision 'int4'; known are: float, float16, int8, uint8, bin"):
        quantize(unit(1), unknown, param="output_dtype")
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        dequantize(unit(1), unknown)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes_of_another_dtype_are_refused(precision: Precision) -> None:
    with pytest.raises(ValueError, match=f"{precision} codes are .*, got int64"):
        dequantize(np.zeros((2, WIDTH), np.int64), precision)


def test_calibration_takes_the_extremes_of_each_dimension() -> None:
    vectors = normal(30)
    ranges = Ranges.calibrated(vectors)
    assert ranges.low_D.tolist() == [min(column) for column in vectors.T.tolist()]
    assert ranges.high_D.tolist() == [max(column) for column in vectors.T.tolist()]
    before = ranges.low_D.copy()
    vectors[:] = 0
    assert np.array_equal(ranges.low_D, before)
    with pytest.raises(ValueError, match="read-only"):
        ranges.low_D[0] = 0


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (normal(1), r"at least 2 vectors, got the shape \(1, 48\)"),
        (normal(0), r"at least 2 vectors, got the shape \(0, 48\)"),
        (normal(3)[0], r"at least 2 vectors, got the shape \(48,\)"),
        (normal(4).reshape(2, 2, WIDTH), r"got the shape \(2, 2, 48\)"),
        (normal(3)[:, :0], r"got the shapes \(0,\), \(0,\)"),
        (np.array([[1, np.nan], [1, 2]], np.float32), "finite, got nan to nan in dimension 1"),
        (np.array([[1, 2], [np.inf, 2]], np.float32), "finite, got 1.0 to inf in dimension 0"),
        (np.array([["a"], ["b"]], object), "must be numbers, got object"),
    ],
)
def test_calibration_refuses(vectors: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ranges.calibrated(vectors)


def test_ranges_refuse_low_above_high() -> None:
    with pytest.raises(ConfigError, match=r"low <= high, got 2.0 to 1.0 in dimension 1"):
        Ranges(np.array([0, 2], np.float32), np.array([1, 1], np.float32))


@pytest.mark.parametrize("name", ["ranges.json", "ranges.npy"])
def test_a_file_gives_back_the_very_ranges(tmp_path: Path, name: str) -> None:
    ranges = Ranges.calibrated(normal(30) * np.float32(1e-3))
    ranges.save(tmp_path / name)
    for read in (Ranges.load(tmp_path / name), Ranges.load(str(tmp_path / name), WIDTH)):
        equal(read.low_D, ranges.low_D)
        equal(read.high_D, ranges.high_D)
    with pytest.raises(ConfigError, match=rf"{name} has ranges for 48 dimensions, but the vectors have 384"):
        Ranges.load(tmp_path / name, 384)


def test_a_file_of_the_ranges_that_sentence_transformers_takes(tmp_path: Path) -> None:
    vectors = unit(200)
    ranges = np.vstack((vectors.min(axis=0), vectors.max(axis=0)))
    np.save(tmp_path / "ranges.npy", ranges)
    codes = quantize(vectors, "int8", Ranges.load(tmp_path / "ranges.npy", WIDTH))
    equal(codes, quantize_embeddings(vectors, "int8", ranges=ranges))
    Ranges.calibrated(vectors).save(tmp_path / "saved.npy")
    equal(np.load(tmp_path / "saved.npy"), ranges)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", None, "No such file"),
        ("a.json", b"{", "cannot take the ranges of int8 from .*a.json: Expecting property name"),
        ("a.json", b"\xff\xfe", "codec can't decode"),
        ("a.json", [[0], [1]], 'expected an object of "low" and "high", got list'),
        ("a.json", {"low": [0]}, r'expected an object of "low" and "high", got \[.low.\]'),
        ("a.json", {"low": [0], "high": [1], "mean": [0]}, r"got \['high', 'low', 'mean'\]"),
        ("a.json", {"low": [0, 0], "high": [1]}, r"got the shapes \(2,\), \(1,\)"),
        ("a.json", {"low": 0, "high": 1}, r"got the shapes \(\), \(\)"),
        ("a.json", {"low": [[0]], "high": [[1]]}, r"got the shapes \(1, 1\), \(1, 1\)"),
        ("a.json", {"low": [], "high": []}, r"got the shapes \(0,\), \(0,\)"),
        ("a.json", {"low": [0, [0]], "high": [1, 1]}, "inhomogeneous"),
        ("a.json", {"low": ["0"], "high": ["1"]}, "must be numbers, got <U1"),
        ("a.json", {"low": [None], "high": [1]}, "must be numbers, got object"),
        ("a.json", b'{"low": [0, NaN], "high": [1, 1]}', "finite, got nan to 1.0 in dimension 1"),
        ("a.json", {"low": [0], "high": [1e300]}, "finite, got 0.0 to inf in dimension 0"),
        ("a.json", {"low": [1], "high": [0]}, "low <= high, got 1.0 to 0.0 in dimension 0"),
        ("a.npy", b"", "cannot take the ranges of int8 from .*a.npy: .*magic string"),
        ("a.npy", b"PK\x03\x04" + bytes(30), "magic string"),
        ("a.npy", np.zeros((3, 4), np.float32), r"shape \(2, dimensions\), got \(3, 4\)"),
        ("a.npy", np.zeros(2, np.float32), r"shape \(2, dimensions\), got \(2,\)"),
        ("a.npy", np.zeros((2, 4), complex), "must be numbers, got complex128"),
        ("a.npy", np.array([[0], [None]]), "[Oo]bject arrays cannot be loaded"),
        ("a.txt", b"", r"must end in .json or .npy, got 'a.txt'"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ConfigError, match=message):
        Ranges.load(path)


def test_save_refuses_other_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in .json or .npy, got 'ranges.bin'"):
        Ranges.unit(8).save(tmp_path / "ranges.bin")
    assert not list(tmp_path.iterdir())
