"""Clients that leave while their request is under way: the work for them is given up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from types import TracebackType

    from starlette.requests import Request

CLIENT_CLOSED = 499
NOTICE = 1.0
"""Seconds after which it is noticed that a client has left."""


class Left(HTTPException):
    """The client closed the connection, so that nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__(CLIENT_CLOSED, "the client closed the connection")


class Awaited:
    """A block of a task that a client waits for.

    It costs a timer, and a task only where the block takes longer than `NOTICE`.

    Args:
        request: of the client.

    Raises:
        Left: at the end of the block, whose await was cancelled as the client left.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._watching: asyncio.Task[None] | None = None
        self._is_left = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(NOTICE, self._watch)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
        if self._watching is not None:
            self._watching.cancel()
        if self._is_left and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise Left from None

    def _watch(self) -> None:
        self._watching = asyncio.ensure_future(self._leave())

    async def _leave(self) -> None:
        """Cancel the block when the client leaves."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._is_left = True
        self._task.cancel()
