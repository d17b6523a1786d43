"""Python's garbage collector in a server: what is loaded is left alone, and all else is looked through once a minute.

A collection of all objects stops the interpreter for a tenth of a second while a thousand requests wait. By Python's
own rule, which counts objects, it comes every five seconds of a flood, and not for hours where there is little to do.
Almost everything is freed without it, or in the collections of young objects, which stay as they are.
"""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MINUTE = 60.0
NEVER = 1 << 30


@contextmanager
def no_full_collections() -> Iterator[None]:
    """Collect young objects only, and leave the objects of the block out of all collections for good.

    Little of what is imported and loaded is garbage, and looking through all of it takes a fifth of a second.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], NEVER)
    try:
        yield
        gc.freeze()
    finally:
        gc.set_threshold(*before)


@contextmanager
def collections_by_the_clock(seconds: float = MINUTE) -> Iterator[None]:
    """Collect all objects every so many seconds of the block, and by no other rule."""
    before = gc.get_threshold()
    ended = threading.Event()

    def collect() -> None:
        while not ended.wait(seconds):
            gc.collect()

    thread = threading.Thread(target=collect, name="garbage", daemon=True)
    gc.set_threshold(*before[:2], NEVER)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        gc.set_threshold(*before)
