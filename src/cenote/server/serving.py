"""The part of a request's trip that all dialects share: find the model, render, submit, wait, encode.

A client that leaves cancels its work. Rendering and large encodings run in a small pool of threads. Only a short
request without a template is rendered on the event loop: a query's tokens take some hundredths of a millisecond, and
every step of the way to a thread and back waits for the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.exceptions import HTTPException

from cenote import metrics
from cenote.errors import BadRequest, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from starlette.requests import Request

    from cenote.config import ServerConfig
    from cenote.service import Service
    from cenote.types import Output, Sequence

RENDER_THREADS = 2
CLIENT_CLOSED = 499
SHORT = 4096
"""Bytes of a body up to which text is rendered on the event loop."""
T = TypeVar("T")
_ids = random.Random()


class Serving:
    """The models of one server and what requests need to reach them."""

    def __init__(self, services: list[Service], config: ServerConfig) -> None:
        self.services = services
        self.config = config
        self.started = int(time.time())
        self.running = 0
        self._by_name = {name: service for service in services for name in service.names}
        self._pool = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="cenote-render")
        self._answers: Answers | None = None

    def find(self, model: str | None, *, any_name: bool = False) -> Service:
        """The service called `model`; the first one if the request names none.

        Args:
            model: name in the request.
            any_name: a server of one model answers to every name, as FastDeploy's do.

        Raises:
            ModelNotFound: there is none of that name.
        """
        if not model or (any_name and len(self.services) == 1):
            return self.services[0]
        if model not in self._by_name:
            raise ModelNotFound(f"The model `{model}` does not exist.")
        return self._by_name[model]

    def name(self, model: str | None) -> str:
        """What the answer calls the model: as the request did, else its first name."""
        return model or self.services[0].names[0]

    def check_count(self, count: int) -> None:
        """Refuse requests with too many inputs."""
        if count > self.config.max_client_batch_size:
            raise BadRequest(
                f"the request has {count} inputs; at most {self.config.max_client_batch_size} are allowed",
                param="input",
            )

    async def in_pool(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work` on a render thread and time it as `stage`."""
        began = time.monotonic()
        result = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        metrics.stage(stage).observe(time.monotonic() - began)
        return result

    async def compute(
        self, request: Request, service: Service, render: Callable[[], list[Sequence]], *, is_plain: bool = False
    ) -> tuple[list[Sequence], list[Output]]:
        """Render, submit and wait: the sequences of a request, and their outputs.

        Args:
            request: whose client may leave.
            service: what computes.
            render: makes the sequences.
            is_plain: it only tokenises what the body holds.

        Raises:
            CenoteError: what rendering or the engine refuse.
            HTTPException: the client left.
        """
        self.running += 1
        try:
            if is_plain and request.state.body_bytes <= SHORT and service.renderer.is_fast:
                began = time.monotonic()
                sequences = render()
                metrics.stage("render").observe(time.monotonic() - began)
            else:
                sequences = await self.in_pool("render", render)
            future = service.engine.submit(sequences)
            loop = asyncio.get_running_loop()
            if self._answers is None or self._answers.loop is not loop:
                self._answers = Answers(loop)
            answer = self._answers.of(future)
            gone = asyncio.ensure_future(_gone(request))
            gone.add_done_callback(lambda _: answer.cancel())
            try:
                return sequences, await answer
            except asyncio.CancelledError:
                if not gone.done() or gone.cancelled():
                    raise
                raise HTTPException(CLIENT_CLOSED, "the client closed the connection") from None
            finally:
                future.cancel()
                gone.cancel()
        finally:
            self.running -= 1

    def close(self) -> None:
        """Finish what was accepted and stop."""
        for service in self.services:
            service.engine.close()
        self._pool.shutdown()


class Answers:
    """Futures of other threads as futures of `loop`, which is woken once for all that are done by then."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._done: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._woken = False

    def of(self, future: Future[T]) -> asyncio.Future[T]:
        """A future of the loop that ends as `future` does."""
        answer: asyncio.Future[T] = self.loop.create_future()

        def done(future: Future[T]) -> None:
            self._done.append((answer, future))
            if not self._woken:  # else `_settle` has not begun yet and will find it
                self._woken = True
                self.loop.call_soon_threadsafe(self._settle)

        future.add_done_callback(done)
        return answer

    def _settle(self) -> None:
        self._woken = False
        while self._done:
            answer, future = self._done.popleft()
            if answer.done():
                continue
            if future.cancelled():
                answer.cancel()
            elif (error := future.exception()) is not None:
                answer.set_exception(error)
            else:
                answer.set_result(future.result())


async def _gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def request_id(request: Request, given: str | None) -> str:
    """The header `X-Request-Id`, else the body's `request_id`, else a new one."""
    header: Any = request.state.request_id
    return header or (given or "").encode(errors="replace").decode() or new_id()


def new_id() -> str:
    """32 random hexadecimal digits. They name a request and guard nothing, so they need not wait for the kernel's."""
    return f"{_ids.getrandbits(128):032x}"
