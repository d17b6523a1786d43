"""Forwards that raise: which of them may be run again in parts, and a log that tells of each kind once.

A sequence that fails is answered with the type of its exception. The text of the exception, which may hold shapes,
paths or the content of a neighbour, is for the log, and for callers in the same process as the error's cause.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from cenote.errors import CenoteError, EngineFailed, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

PAUSE = 60.0
"""Seconds between two lines of the log about failures of one kind."""
MOST_KINDS = 256
"""Kinds that are remembered; beyond them all are forgotten, and the next one of each is logged in full."""


def is_fatal(error: BaseException) -> bool:
    """Return whether nothing can run on the device after `error`: CUDA's errors, except that of a full memory."""
    if type(error).__name__ == "OutOfMemoryError":
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def answer(error: BaseException) -> CenoteError:
    """Return the answer to a sequence whose forward raised `error`: an error of Cenote's own is the answer itself."""
    if isinstance(error, CenoteError):
        return error
    failed = EngineFailed(f"the forward pass failed: {type(error).__name__}; the engine's log has the details")
    failed.__cause__ = error
    return failed


class Failures:
    """The log of failed sequences, a line per kind and `PAUSE`.

    A kind is the type of an exception and the line of code that raised it. The first failure of a kind is logged with
    its traceback; the others are counted, and the count is logged with the first of them that comes `PAUSE` later.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._logged: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def note(self, error: BaseException, failed: int) -> None:
        """Note `failed` sequences that `error` was raised for, and release the memory that its traceback holds."""
        if not isinstance(error, CenoteError) or error.status >= 500:
            self._tell(error, failed)
        release(error)

    def _tell(self, error: BaseException, failed: int) -> None:
        kind = _kind(error)
        now = self._clock()
        with self._lock:
            last = self._logged.get(kind)
            if last is not None and now - last < PAUSE:
                self._untold[kind] += failed
                return
            if len(self._logged) >= MOST_KINDS:
                self._logged.clear()
                self._untold.clear()
            self._logged[kind] = now
            untold = self._untold.pop(kind, 0)
        if last is None:
            log.error("sequences failed: %d (%s); further ones are counted", failed, kind, exc_info=error)
            return
        log.error("sequences failed: %d more (%s); the last: %s", untold + failed, kind, first_line(error))


def release(error: BaseException) -> None:
    """Free the tensors of the frames in which `error` was raised: a batch is run again with the memory it had."""
    raised: BaseException | None = error
    while raised is not None and raised.__traceback__ is not None:
        traceback.clear_frames(raised.__traceback__)
        raised.__traceback__ = None
        raised = raised.__cause__ or raised.__context__


def _kind(error: BaseException) -> str:
    """Return the type of `error` and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f" at {Path(frames[0].filename).name}:{frames[0].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
