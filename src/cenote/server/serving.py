"""The part of a request's trip that all dialects share: find the model, render, submit, wait, encode.

A client that leaves cancels its work. Rendering and large encodings run in a small pool of threads, never on the
event loop.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.exceptions import HTTPException

from cenote import metrics
from cenote.errors import BadRequest, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from cenote.config import ServerConfig
    from cenote.service import Service
    from cenote.types import Output, Sequence

RENDER_THREADS = 2
CLIENT_CLOSED = 499
T = TypeVar("T")


class Serving:
    """The models of one server and what requests need to reach them."""

    def __init__(self, services: list[Service], config: ServerConfig) -> None:
        self.services = services
        self.config = config
        self.started = int(time.time())
        self.running = 0
        self._by_name = {name: service for service in services for name in service.names}
        self._pool = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="cenote-render")

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
        metrics.stage_seconds.labels(stage).observe(time.monotonic() - began)
        return result

    async def compute(
        self, request: Request, service: Service, render: Callable[[], list[Sequence]]
    ) -> tuple[list[Sequence], list[Output]]:
        """Render, submit and wait: the sequences of a request, and their outputs.

        Raises:
            CenoteError: what rendering or the engine refuse.
            HTTPException: the client left.
        """
        self.running += 1
        try:
            sequences = await self.in_pool("render", render)
            future = asyncio.wrap_future(service.engine.submit(sequences))
            gone: asyncio.Future[None] = asyncio.ensure_future(_gone(request))
            try:
                waited: set[asyncio.Future[Any]] = {future, gone}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if not future.done():
                    raise HTTPException(CLIENT_CLOSED, "the client closed the connection")
                return sequences, future.result()
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


async def _gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def request_id(request: Request, given: str | None) -> str:
    """The header `X-Request-Id`, else the body's `request_id`, else a new one."""
    header: Any = request.state.request_id
    return header or (given or "").encode(errors="replace").decode() or uuid.uuid4().hex
