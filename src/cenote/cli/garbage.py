"""Python's garbage collector in a server: what is loaded is left alone, and all else is looked through once a minute.

A collection of all objects stops the interpreter for a tenth of a second while a thousand requests wait. By Python's
own rule, which counts objects, it comes every five seconds of a flood, and not for hours where there is little to do.
Almost everything is freed without it, or in the collections of young objects, which stay as they are. A server with
many requests under way puts it off, for some minutes at most.
"""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MINUTE = 60.0
MOST_PUT_OFF = 4
"""Collections that may be left out, one after the other."""
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
def collections_by_the_clock(seconds: float = MINUTE, is_busy: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Collect all objects every so many seconds of the block, and by no other rule.

    Args:
        seconds: between two collections.
        is_busy: whether this is a bad time; called before each.
    """
    before = gc.get_threshold()
    ended = threading.Event()

    def collect() -> None:
        put_off = 0
        while not ended.wait(seconds):
            put_off = put_off + 1 if is_busy() and put_off < MOST_PUT_OFF else 0
            if not put_off:
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
