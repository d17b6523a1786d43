"""Where a sequence that comes alone runs: on all cores, or on the part of one stream. Pure: it is told of times.

On an idle machine all cores are faster. Where something else uses one of them, the threads of a forward wait for each
other at every layer, and a short text can take ten times as long. So both ways are tried, for each length by itself,
and the one with the better median of late is taken. The other one is tried again now and then, the more seldom the
worse it was.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

KEPT = 9
"""Times of each way that are remembered."""
SOONEST, LATEST = 32, 512
"""Sequences after which the slower way is tried again: at first, and if it goes on being much slower."""
MUCH = 1.5
"""A way that takes so many times as long is much slower."""


@dataclass
class _Length:
    """Sequences of about one length.

    Attributes:
        seconds: late times on all cores (True) and on a part of them.
        since: sequences since the slower way was tried.
        pause: sequences until it is tried again.
    """

    seconds: dict[bool, deque[float]] = field(
        default_factory=lambda: {True: deque(maxlen=KEPT), False: deque(maxlen=KEPT)}
    )
    since: int = 0
    pause: int = SOONEST

    def is_wide_faster(self) -> bool:
        """Return whether all cores have been faster; true until both ways are known."""
        wide, narrow = self.seconds[True], self.seconds[False]
        return not wide or not narrow or median(wide) <= median(narrow)


class Lone:
    """Chooses for each lone sequence. Between two calls of `note` the choice for a length stays the same."""

    def __init__(self) -> None:
        self._lengths: dict[int, _Length] = {}

    def is_wide(self, tokens: int) -> bool:
        """Return whether a sequence of `tokens` tokens runs on all cores."""
        length = self._of(tokens)
        if not length.seconds[True]:
            return True
        if not length.seconds[False]:
            return False
        is_trial = length.since >= length.pause
        return length.is_wide_faster() != is_trial

    def note(self, tokens: int, *, is_wide: bool, seconds: float) -> None:
        """Remember how long a lone sequence took."""
        length = self._of(tokens)
        was_wide_faster = length.is_wide_faster()
        length.seconds[is_wide].append(seconds)
        if is_wide == was_wide_faster:
            length.since += 1
            return
        length.since = 0
        other = length.seconds[not is_wide]
        is_much_slower = bool(other) and seconds > MUCH * median(other)
        length.pause = min(LATEST, 2 * length.pause) if is_much_slower else SOONEST
        if not is_much_slower:
            self._believe(length, is_wide, seconds)

    def _of(self, tokens: int) -> _Length:
        return self._lengths.setdefault(tokens.bit_length(), _Length())

    @staticmethod
    def _believe(length: _Length, is_wide: bool, seconds: float) -> None:
        """Forget older times of a way that a trial finds no longer slow: they are of another hour."""
        times = length.seconds[is_wide]
        if seconds < median(times):
            times.clear()
            times.append(seconds)
