"""The process that an engine belongs to. A forked child inherits the engine's memory, but none of its threads."""

from __future__ import annotations

import os

from cenote.errors import EngineFailed


class Owner:
    """The process that an engine was made in."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is the process."""
        return self._pid == os.getpid()

    def check(self) -> None:
        """Refuse an engine of another process, before one of its locks is taken: its holder may not exist here.

        Raises:
            EngineFailed: this is a forked child.
        """
        if not self.is_here:
            raise EngineFailed(
                f"the engine was started in process {self._pid}, and this is its forked child {os.getpid()}, where its "
                "threads do not exist; load the model after the fork (gunicorn without --preload, or its post_fork "
                "hook; in the initializer of a pool), or let processes be spawned (multiprocessing's "
                "get_context('spawn'))"
            )
