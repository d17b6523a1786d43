"""Probes of an engine that hangs: they do not heap up, and hold up neither each other nor the end of the server."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.app import Application, build
from cenote.server.health import Probe
from tests import PATIENCE
from tests.conftest import INFO

if TYPE_CHECKING:
    from starlette.types import Message
    from transformers import PreTrainedTokenizerBase

MANY = 4 * ((os.cpu_count() or 1) + 4)
"""More than asyncio has threads."""


@dataclass
class Hanging(FakeEngine):
    """An engine whose probes end when they may."""

    probes: int = 0
    may_end: threading.Event = field(default_factory=threading.Event)

    def healthy(self) -> bool:
        self.probes += 1
        assert self.may_end.wait(PATIENCE)
        return super().healthy()


async def status(app: Application, path: str = "/health") -> int:
    sent: list[Message] = []

    async def receive() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
    await app(scope, receive, send)
    return int(sent[0]["status"])


async def closed(app: Application) -> list[str]:
    """Start an application and shut it down, as uvicorn does; return the messages."""
    coming: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return coming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "lifespan", "state": {}}, receive, send)
    return [message["type"] for message in sent]


@pytest.mark.parametrize("is_healthy", [True, False])
def test_all_that_ask_wait_for_one_probe(tokenizer: PreTrainedTokenizerBase, is_healthy: bool) -> None:
    """The server ends meanwhile, and a later probe is a new one."""
    engine = Hanging(INFO, is_healthy=is_healthy)
    app = build([Service(engine, Renderer(tokenizer, INFO), ("fake",))], ServerConfig())
    expected = 200 if is_healthy else 503

    async def run() -> list[int]:
        asking = [asyncio.ensure_future(status(app)) for _ in range(MANY)]
        gives_up = asyncio.ensure_future(status(app))
        await asyncio.sleep(0.05)
        gives_up.cancel()
        ends = await asyncio.wait_for(closed(app), PATIENCE)
        assert ends == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert engine.closed
        assert not any(task.done() for task in asking)
        engine.may_end.set()
        return await asyncio.gather(*asking)

    assert asyncio.run(run()) == [expected] * MANY
    assert engine.probes == 1
    assert asyncio.run(status(app)) == expected
    assert engine.probes == 2


def test_loops_of_several_threads_share_a_probe() -> None:
    engine = Hanging(INFO)
    probe = Probe(engine)
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(lambda: asyncio.run(probe.healthy())) for _ in range(4)]
        assert not any(future.done() for future in asking)
        threading.Timer(0.2, engine.may_end.set).start()
        assert [future.result(PATIENCE) for future in asking] == [True] * 4
    assert engine.probes == 1


def test_a_probe_that_fails_is_the_failure_of_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(engine: Any) -> bool:
        raise RuntimeError("boom")

    monkeypatch.setattr(FakeEngine, "healthy", fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"):
            asyncio.run(Probe(FakeEngine(INFO)).healthy())


def test_a_process_without_memory_for_a_thread_is_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first probe fails, and no later one waits for it; once there is a thread, none has to be started."""
    probe = Probe(FakeEngine(INFO))

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            asyncio.run(probe.healthy())
    assert asyncio.run(probe.healthy())
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", start)
        assert asyncio.run(probe.healthy())
    probe.close()
