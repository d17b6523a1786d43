"""Vectors in the dtypes of the wire, against torch's own rounding."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from cenote.server.wire.encoding import EmbedDType, to_bytes

TORCH: dict[EmbedDType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
LOWER_HALVES = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
"""Lower halves of a float32: on a tie of bfloat16, beside it, at both ends. Narrower dtypes have their ties at 0."""


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Every finite upper half of a float32 with each of `LOWER_HALVES`."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    found = np.concatenate([upper | lower for lower in LOWER_HALVES]).view(np.float32)
    return found[np.isfinite(found)]


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_numbers_are_rounded_as_torch_rounds(values: np.ndarray, dtype: EmbedDType) -> None:
    expected = torch.from_numpy(values).to(TORCH[dtype]).view(torch.uint8).numpy().tobytes()
    assert to_bytes(values, dtype, "native") == expected
    assert len(expected) == len(values) * TORCH[dtype].itemsize


@pytest.mark.parametrize("dtype", TORCH)
def test_the_other_byte_order_reverses_each_number(dtype: EmbedDType) -> None:
    rows = np.linspace(-3, 3, 22, dtype=np.float32).reshape(2, 11)[:, ::2]
    size = TORCH[dtype].itemsize
    numbers = np.frombuffer(to_bytes(rows, dtype, "native"), np.uint8).reshape(-1, size)
    other = "big" if sys.byteorder == "little" else "little"
    assert len(numbers) == rows.size
    assert to_bytes(rows, dtype, other) == numbers[:, ::-1].tobytes()


def test_what_fp8_cannot_hold_is_its_largest_number() -> None:
    rows = np.array([448, 463, 464, 1e30, -1e30], np.float32)
    assert to_bytes(rows, "fp8_e4m3", "native") == bytes([0x7E, 0x7E, 0x7E, 0x7E, 0xFE])
