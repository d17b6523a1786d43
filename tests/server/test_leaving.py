"""Clients that leave: wherever their request waits, nothing more is done for it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from starlette.requests import Request

from cenote import metrics
from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.pipeline.fetching import Unarrived
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server import leaving
from cenote.server.admission import RENDER_THREADS
from cenote.server.app import LARGE_BODY, Application, build
from cenote.server.leaving import Awaited, Left
from cenote.server.serving import SHORT, Serving
from tests import PATIENCE
from tests.conftest import INFO

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message
    from transformers import PreTrainedTokenizerBase

LONG = "long " * SHORT


class Blocked(Renderer):
    """A renderer that waits in the threads that render, until it may go on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.may_go_on = threading.Event()
        self.rendered: list[int] = []

    def render(self, prompts: Any, *args: Any, **options: Any) -> Any:
        self.rendered.append(len(prompts))
        assert self.may_go_on.wait(PATIENCE)
        return super().render(prompts, *args, **options)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it be noticed at once that a client has left."""
    monkeypatch.setattr(leaving, "NOTICE", 0.01)


def scope_of(path: str) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}


async def ask(app: Application, path: str, coming: list[Message]) -> int:
    """Return the status of a request of these messages, after which its client stays."""
    sent: list[Message] = []

    async def receive() -> Message:
        return coming.pop(0) if coming else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope_of(path), receive, send), PATIENCE)
    return int(sent[0]["status"])


def whole(body: Any) -> list[Message]:
    return [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": LONG}),
        ("/v1/embeddings", {"input": "a", "ignored": "x" * LARGE_BODY}),
        ("/tokenize", {"prompt": "a"}),
        ("/tei/tokenize", {"inputs": "a"}),
        ("/decode", {"ids": [5, 6]}),
    ],
    ids=["renders", "parses", "tokenises", "tokenises for TEI", "decodes"],
)
def test_a_request_whose_client_left_is_not_rendered(
    tokenizer: PreTrainedTokenizerBase, path: str, body: dict[str, Any]
) -> None:
    """It waits for a render thread, all of which have others; when they are done, nothing is left of it."""
    engine, renderer = FakeEngine(INFO), Blocked(tokenizer, INFO, auto_truncate=True)
    app = build([Service(engine, renderer, ("fake",))], ServerConfig())

    async def run() -> tuple[int, list[int]]:
        others = [asyncio.ensure_future(ask(app, "/v1/embeddings", whole({"input": LONG}))) for _ in range(2)]
        await until(lambda: len(renderer.rendered) == RENDER_THREADS)
        status = await ask(app, path, [*whole(body), {"type": "http.disconnect"}])
        assert not any(other.done() for other in others)
        assert app.admission.rendering.amount == 0
        renderer.may_go_on.set()
        return status, await asyncio.gather(*others)

    assert asyncio.run(run()) == (499, [200] * RENDER_THREADS)
    assert renderer.rendered == [1] * RENDER_THREADS
    assert len(engine.submitted) == RENDER_THREADS


def test_a_request_whose_client_left_waits_for_no_picture(tokenizer: PreTrainedTokenizerBase) -> None:
    may_arrive = threading.Event()
    calls: list[str] = []

    def fetch(url: str) -> bytes:
        calls.append(url)
        assert may_arrive.wait(PATIENCE)
        return b""

    def make() -> None:
        raise Unarrived(["https://host/a.png"], fetch)

    async def receive() -> Message:
        await until(lambda: bool(calls))
        return {"type": "http.disconnect"}

    async def run() -> None:
        serving = Serving([Service(FakeEngine(INFO), Renderer(tokenizer, INFO), ("fake",))], ServerConfig())
        request = Request({**scope_of("/"), "state": {"body_bytes": 9}}, receive)
        with pytest.raises(Left):
            await asyncio.wait_for(serving.rendered(request, make), PATIENCE)
        assert not may_arrive.is_set()
        may_arrive.set()

    asyncio.run(run())
    assert calls == ["https://host/a.png"]


@pytest.mark.parametrize("begin", [b'{"input": "a"}', b'{"input": "a'], ids=["valid", "cut"])
def test_a_body_without_its_end_is_no_request(tokenizer: PreTrainedTokenizerBase, begin: bytes) -> None:
    """Also where what came is valid JSON."""
    engine = FakeEngine(INFO)
    app = build([Service(engine, Renderer(tokenizer, INFO), ("fake",))], ServerConfig())
    before = metrics.refusals_of("client_closed")._value.get()
    coming: list[Message] = [
        {"type": "http.request", "body": begin, "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert asyncio.run(ask(app, "/v1/embeddings", coming)) == 499
    assert not engine.submitted
    assert metrics.refusals_of("client_closed")._value.get() == before + 1
    assert app.admission.pending == 0


# --- the block ---------------------------------------------------------------------------------------------------


async def _waiting(receive: Callable[[], Awaitable[Message]]) -> None:
    with Awaited(Request(scope_of("/"), receive)):
        await asyncio.Future()


def test_a_block_that_somebody_else_cancels_is_cancelled() -> None:
    async def stays() -> Message:
        return await asyncio.Future()

    async def run() -> None:
        task = asyncio.ensure_future(_waiting(stays))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_cancellation_counts_more_than_a_client_that_leaves() -> None:
    """As a server that shuts down cancels a request in the turn of the loop in which its client leaves."""

    async def run() -> None:
        async def leaves() -> Message:
            task.cancel()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(_waiting(leaves))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    asyncio.run(run())


def test_a_block_that_ends_is_not_cancelled_later() -> None:
    async def run() -> int:
        left = asyncio.Event()

        async def leaves() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        with Awaited(Request(scope_of("/"), leaves)):
            await asyncio.sleep(0.05)
        left.set()
        await asyncio.sleep(0.05)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert asyncio.run(run()) == 0
