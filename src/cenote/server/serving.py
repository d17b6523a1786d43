"""The part of a request's trip that all dialects share: find the model, render, submit, wait, encode.

A client that leaves cancels its work, wherever it waits (`cenote.server.leaving`). Rendering and large encodings run in
a small pool of threads. Only a short request without a template is rendered on the event loop: a query's tokens take
some hundredths of a millisecond, and every step of the way to a thread and back waits for the interpreter's lock.
Requests that arrive together reach the engine together, so that the first of many is not a batch of one. Of these, and
of answers that come together, the loop does some in each of its turns (`cenote.server.turns`), so that refusals do not
wait for them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cenote import metrics
from cenote.errors import BadRequest
from cenote.functions import optional
from cenote.pipeline import token_ids
from cenote.pipeline.fetching import Hosts, Unarrived, with_arrived
from cenote.pipeline.media import Access
from cenote.pipeline.options import Bounds
from cenote.server import arrivals
from cenote.server.admission import RENDER_THREADS, Admission
from cenote.server.asked import Models
from cenote.server.desk import Desk
from cenote.server.health import Probe
from cenote.server.leaving import Awaited
from cenote.server.wire.sizes import echo
from cenote.tensors.process import release_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.config import ServerConfig
    from cenote.core import Output
    from cenote.pipeline.job import Job
    from cenote.pipeline.pipeline import Service
    from cenote.pipeline.prompts import Applied
    from cenote.server.admission import EnginePlace
    from cenote.server.wire.fields import Queued

log = logging.getLogger(__name__)

SHORT = 4096
"""Bytes of a body, and of the prompt before each of its inputs, up to which text is rendered on the event loop."""
LARGE_ANSWER = 65_536
"""Answers of more numbers than this are encoded off the event loop."""
CROWD = 128
"""Requests being computed from which on the loop does less for them in a turn."""
LAST_RENDERS = 2.0
"""Seconds that a server which ends waits for a render thread, whose request was answered 503 long ago."""
T = TypeVar("T")
_ids = random.Random()


class Serving:
    """The models of one server, and the way to them.

    Args:
        services: the models.
        config: of the server.
        clock: see `Admission`.

    Attributes:
        models: the models by their names.
        probes: of the health of each model.
        running: requests being computed.
        is_ending: whether the server is shutting down.
        admission: decides which requests may wait.
        paths: of the routes, by the names of their dialects, for people.
    """

    def __init__(
        self, services: list[Service], config: ServerConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.models = Models(services, any_name=config.any_model_name)
        self.services = services
        self.probes = [Probe(service.engine) for service in services]
        self.config = config
        self.started = int(time.time())
        self.running = 0
        self.is_ending = False
        self.admission = Admission(services, config, clock)
        hosts = Hosts(frozenset(map(str.lower, config.allowed_media_domains)), config.allow_private_media)
        access = Access(
            optional(Path, config.allowed_local_media_path), hosts=hosts, trusts_kwargs=config.trust_request_mm_kwargs
        )
        read_ids = token_ids.reader(config)
        bounds = Bounds(
            config.max_request_tokens,
            config.max_text_characters,
            config.max_template_steps,
            config.max_template_seconds,
            config.max_picture_bytes,
        )
        for view in self.models.views:
            view.renderer.restrict(bounds, access, config.default_chat_template_kwargs, read_ids(view.renderer))
        self.paths: dict[str, list[str]] = {}
        self._pool = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="cenote-render")
        self._desk: Desk | None = None
        self._in_pool: set[Future[Any]] = set()
        self._fault = ""

    @property
    def fault(self) -> str:
        """The fault of the first engine that has one, or of the render threads at the end."""
        return next(filter(None, (service.engine.fault for service in self.services)), self._fault)

    def find(self, model: str | None, *, any_name: bool = False) -> Service:
        """See `Models.find`."""
        return self.models.find(model, any_name=any_name)

    def name(self, model: str | None) -> str:
        """Return the model's name in an answer: that of the request, else the first."""
        return echo(model) or self.services[0].names[0]

    def check_count(self, count: int, param: str = "input") -> None:
        """Refuse requests with too many inputs in `param`."""
        if count > self.config.max_client_batch_size:
            raise BadRequest(
                f"the request has {count} inputs; at most {self.config.max_client_batch_size} are allowed",
                param=param,
            )

    def check_size(self, text: str, param: str) -> None:
        """Refuse to tokenise a text that is too long.

        Raises:
            BadRequest: it is.
        """
        size, limit = len(text.encode(errors="replace")), self.config.max_tokenize_bytes
        if size > limit:
            raise BadRequest(
                f"the text has {size} bytes; at most {limit} are tokenised. "
                "Send it in parts, or start the server with a larger --max-tokenize-bytes",
                param=param,
            )

    def is_short(self, request: Request, service: Service, count: int, prompt: Applied | None, *, pads: bool) -> bool:
        """Return whether the inputs of a request are tokenised in a moment, so that they may be on the event loop.

        Args:
            request: with its size in bytes.
            service: the model.
            count: number of inputs.
            prompt: before each of them; `None` = the model's default.
            pads: they are filled up to a length, which makes much of a short text.
        """
        prompt = prompt or service.renderer.prompts.choose()
        size = request.scope["state"]["body_bytes"] + count * len(prompt.text)
        return size <= SHORT and not pads and service.renderer.renders_quickly

    async def in_pool(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work` on a render thread, which keeps no threads of torch's afterwards, and time it as `stage`."""

        def run() -> T:
            try:
                return work()
            finally:
                release_threads()

        with metrics.timed(stage):
            working = self._pool.submit(run)
            self._in_pool.add(working)
            working.add_done_callback(self._in_pool.discard)
            return await asyncio.wrap_future(working)

    async def answer(
        self,
        request: Request,
        service: Service,
        body: Queued,
        make: Callable[[], Job[Response]],
        *,
        is_short: bool = False,
    ) -> Response:
        """Make the job of a request, compute its outputs, and finish it.

        Args:
            request: of a client that may leave.
            service: the model.
            body: of the request: its priority, and the salt of its cached results.
            make: makes the job, whose answer is the response.
            is_short: `make` only tokenises text, as `is_short` says.

        Raises:
            CenoteError: the operation or the engine refuses the request, or fails.
            Left: the client left.
        """
        began = time.monotonic()
        state = request.scope["state"]
        size = state["body_bytes"]
        self.admission.check_model(service, size)
        line = self.admission.line(service)
        self.running += 1
        try:
            with Awaited(request), line.enter(size) as place:
                if is_short:
                    await self._desk_here().renders.wait()
                    with metrics.timed("render"):
                        job = make()
                else:
                    job = await self._rendered(make, size)
                service.renderer.bounds.check(job.sequences)
                job = job.queued(priority=body.priority, salt=body.cache_salt)
                job = job.adapted([service.adapter] * len(job.sequences))
                tokens = job.tokens
                place.queue(tokens, len(job.sequences))
                state.update(render_seconds=time.monotonic() - began, tokens=tokens)
                outputs = await self._outputs(service, job, place)
        finally:
            self.running -= 1
        if job.is_slow or _numbers(outputs) > LARGE_ANSWER:
            return await self.in_pool("encode", lambda: job.finish(outputs))
        with metrics.timed("encode"):
            return job.finish(outputs)

    async def rendered(self, request: Request, make: Callable[[], T]) -> T:
        """Call `make` on a render thread, for a request that no engine runs.

        Raises:
            Left: the client left.
        """
        with Awaited(request):
            return await self._rendered(make, request.state.body_bytes)

    async def _rendered(self, make: Callable[[], T], size: int) -> T:
        """Call `make` on a render thread, for a body of `size` bytes.

        It is called again when the pictures behind URLs have arrived that it asks for, so that no render thread waits
        for a host.
        """
        files: dict[str, bytes] = {}

        def make_of_files() -> T | Unarrived:
            with with_arrived(files):
                try:
                    return make()
                except Unarrived as order:
                    return order

        while True:
            result: T | Unarrived = await self.admission.rendering.run(
                size, partial(self.in_pool, "render"), make_of_files
            )
            if not isinstance(result, Unarrived):
                return result
            await arrivals.fetch(result, files)

    async def _outputs(self, service: Service, job: Job[Response], place: EnginePlace) -> list[Output]:
        """Wait for the outputs of `job`."""
        desk = self._desk_here()
        count = len(job.sequences)
        followed = metrics.trip.get()
        if followed is not None:
            followed.model = service.names[0]
            followed.sequences += count  # of Vertex' instances, each comes here
            followed.tokens += job.tokens
        return await desk.submit(service.engine, job.sequences, place.advance if count > 1 else None, place.begin)

    def _desk_here(self) -> Desk:
        """Return the desk of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._desk is None or self._desk.loop is not loop:
            self._desk = Desk(loop, lambda: self.running > CROWD)
        return self._desk

    def close(self) -> None:
        """Finish the accepted work and stop. A render thread that hangs is left, and is the `fault`."""
        for probe in self.probes:
            probe.close()
        for service in self.services:
            service.engine.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if wait([*self._in_pool], LAST_RENDERS).not_done:
            self._fault = "a render thread hangs"
            log.critical("%s; the process ends with an error", self._fault)


def _numbers(outputs: Iterable[Output]) -> int:
    """Return how many numbers outputs have, those of further tasks included."""
    return sum(output.data.size + _numbers(output.others.values()) for output in outputs)


def request_id(request: Request, of_body: str | None) -> str:
    """Return the header `X-Request-Id`, else the body's `request_id`, else the one that the answer's header has."""
    state = request.scope["state"]
    return echo(state["request_id"] or of_body) or str(state["new_id"])


def new_id() -> str:
    """Return 32 random hexadecimal digits, which name a request and guard nothing, so the kernel's are not needed."""
    return f"{_ids.getrandbits(128):032x}"
