"""Results lie apart from activations: copies that stay as they are, packed closely, freed with the last of them."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch

from cenote.tensors.results import LINE, SLAB, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4), (1, 1), (700, 384)])
def test_a_copy_has_shape_dtype_and_values_and_no_memory_of_the_original(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = (torch.randn(shape) * 100).to(dtype)
    wanted = x.numpy().copy()
    copy = kept(x)
    x += 1
    assert (copy.shape, copy.dtype) == (wanted.shape, wanted.dtype)
    assert np.array_equal(copy, wanted)


def test_a_view_at_a_stride_is_copied_as_it_looks() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert kept(x.T).tolist() == x.T.tolist()
    assert kept(x[:, 1:3]).tolist() == x[:, 1:3].tolist()


def test_results_do_not_overlap() -> None:
    sizes = [1, 100, SLAB // 8, 17, SLAB // 2, SLAB, 3, SLAB // 4] * 3
    copies = [kept(torch.full((size,), float(i))) for i, size in enumerate(sizes)]
    for i, (size, copy) in enumerate(zip(sizes, copies, strict=True)):
        assert len(copy) == size
        assert (copy == i).all()
        assert copy.ctypes.data % LINE == 0


def test_a_slab_goes_with_the_last_result_in_it() -> None:
    def base(x: np.ndarray) -> object:
        while isinstance(x.base, np.ndarray):
            x = x.base
        return x

    kept(torch.zeros(SLAB // 4))  # one slab by itself, so that the next begins another
    first, second = kept(torch.zeros(100)), kept(torch.zeros(100))
    slab = weakref.ref(base(first))
    assert slab() is base(second)
    kept(torch.zeros(SLAB // 4))
    del first
    gc.collect()
    assert slab() is not None
    del second
    gc.collect()
    assert slab() is None


def test_every_thread_fills_its_own() -> None:
    found: list[np.ndarray] = []

    def work(number: int) -> None:
        for _ in range(200):
            found.append(kept(torch.full((50,), float(number))))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((copy == copy[0]).all() for copy in found)
    assert sorted({float(copy[0]) for copy in found}) == [0, 1, 2, 3]
