"""Memory and threads of the process, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import RawIOBase

WEIGHTS = re.compile(r"\S+ r[-w][-x]p .*\.safetensors$")
"""Lines of /proc/self/maps of weights."""
LIBRARIES = re.compile(r"\S+ r-[-x]p .*\.so[.\d]*$")
"""Lines of /proc/self/maps of the read-only parts of libraries."""
ENTRY = 8
"""Bytes of /proc/self/pagemap for a page, a number of 64 bits."""
IN_MEMORY, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61
"""Bits of it."""
SOFT = 1
"""`omp_pause_soft`: variables of threads are kept."""


def release_threads() -> None:
    """End the OpenMP threads that wait for more to do from the calling thread; new ones are made when there is more.

    Each thread that has run something in parallel keeps its own. While there are more of them in all than cores,
    libgomp's no longer spin between the parallel parts of a forward: they sleep, and are woken a dozen times a layer.
    Without effect with other OpenMPs, where the call would be for all threads, without OpenMP, and in a process that
    has not imported torch.
    """
    if "torch" not in sys.modules:
        return
    library = _libgomp()
    if library is not None:
        library.omp_pause_resource_all(SOFT)


@functools.cache
def _libgomp() -> ctypes.CDLL | None:
    """Return the OpenMP that torch runs on, if it is GNU's."""
    import torch

    library = ctypes.CDLL(torch._C.__file__)
    is_other = hasattr(library, "__kmpc_fork_call")  # LLVM's and Intel's
    return library if hasattr(library, "omp_pause_resource_all") and not is_other else None


@functools.cache
def _libc() -> ctypes.CDLL:
    """Return the C library; each further object of it would be a class that only the garbage collector frees."""
    return ctypes.CDLL(None)


def release_freed_memory() -> None:
    """Give freed memory of replaced weights back to the system. Without effect on allocators other than glibc's."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def keep_freed_memory(largest: int) -> None:
    """Keep glibc from giving activations back to the system after every layer, and faulting them in again.

    Freeing one large mapped block raises malloc's mmap threshold to its size and the trim threshold to twice that
    (ceilings: 32 and 64 MiB). Without effect on other allocators.

    Args:
        largest: bytes of the largest activation; at least 8 MiB and at most 31 MiB are kept.
    """
    import torch

    torch.empty(min(max(largest, 8 << 20), 31 << 20), dtype=torch.uint8)


def leave_unused_memory() -> None:
    """Give back memory that loading has left behind: freed memory that glibc keeps, and pages of mapped files.

    The files are weights, of which a packed matrix is a copy, and libraries, of which importing runs more than all that
    follows; those once a process, for pages that have come back are in use. Pages that are read again come back. A
    mapping in which something was written, which only this process has, is left alone. Does nothing where there is no
    /proc.
    """
    release_freed_memory()
    _leave(WEIGHTS)
    _leave_libraries()


@functools.cache
def _leave_libraries() -> None:
    _leave(LIBRARIES)


def _leave(kind: re.Pattern[str]) -> None:
    """Give the pages of mappings back to the system, if nothing was written in them."""
    try:
        mappings = [line for line in Path("/proc/self/maps").read_text().splitlines() if kind.match(line)]
        if not mappings:
            return
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
            for mapping in mappings:
                begin, end = (int(x, 16) for x in mapping.split()[0].split("-"))
                if not _is_written(pages, begin, end):
                    _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
    except OSError:
        return


def _is_written(pages: RawIOBase, begin: int, end: int) -> bool:
    """Return whether a page of a private mapping of a file has become this process's own.

    /proc/self/smaps says so, too, but the kernel goes through all pages of the process for it.

    Args:
        pages: /proc/self/pagemap, 8 bytes a page.
        begin: first address of the mapping.
        end: first address behind it.
    """
    import numpy as np

    size = (end - begin) // mmap.PAGESIZE * ENTRY
    pages.seek(begin // mmap.PAGESIZE * ENTRY)
    read = pages.read(size) or b""
    if len(read) < size:
        return True  # it may be
    entries = np.frombuffer(read, np.uint64)
    exists = (entries & np.uint64(IN_MEMORY | SWAPPED)) != 0
    return bool((exists & ((entries & np.uint64(OF_FILE)) == 0)).any())
