"""Work on an event loop: what many requests are to have done does not keep a refusal from its answer."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server import app
from cenote.server.turns import A_CROWDED_TURN, A_TURN, Turns
from tests.conftest import INFO

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Message
    from transformers import PreTrainedTokenizerBase

MANY = 200


async def turns_of(loop: asyncio.AbstractEventLoop, counts: list[int], seen: Callable[[], int]) -> None:
    """Note at the end of each turn of the loop how much is done, until all is."""
    while not counts or counts[-1] < MANY:
        counts.append(seen())
        await asyncio.sleep(0)


@pytest.mark.parametrize(("is_crowded", "most"), [(False, A_TURN), (True, A_CROWDED_TURN)])
def test_so_much_is_done_in_a_turn_and_in_order(*, is_crowded: bool, most: int) -> None:
    done: list[int] = []
    counts: list[int] = []

    async def run() -> None:
        turns = Turns(asyncio.get_running_loop(), lambda: is_crowded)
        for i in range(MANY):
            turns.call(lambda i=i: done.append(i))  # type: ignore[misc]
        assert turns.is_busy
        await turns_of(asyncio.get_running_loop(), counts, lambda: len(done))
        assert not turns.is_busy

    asyncio.run(run())
    assert done == [*range(MANY)]
    steps = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert max(steps) == most
    assert len(counts) <= MANY // most + 2


def test_who_comes_alone_does_not_wait() -> None:
    async def run() -> list[bool]:
        turns = Turns(asyncio.get_running_loop(), lambda: False)
        waits = []
        for _ in range(3):
            began = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(began.set_result, None)
            await turns.wait()
            waits.append(began.done())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return waits

    assert asyncio.run(run()) == [False] * 3


def test_less_is_done_from_the_turn_on_in_which_there_is_a_crowd() -> None:
    counts: list[int] = []
    done: list[int] = []

    async def run() -> None:
        turns = Turns(asyncio.get_running_loop(), lambda: len(done) >= 2 * A_TURN)
        for i in range(MANY):
            turns.call(lambda i=i: done.append(i))  # type: ignore[misc]
        await turns_of(asyncio.get_running_loop(), counts, lambda: len(done))

    asyncio.run(run())
    assert counts[:4] == [A_TURN, 2 * A_TURN, 2 * A_TURN + A_CROWDED_TURN, 2 * (A_TURN + A_CROWDED_TURN)]


def test_a_caller_that_gives_up_keeps_nobody_waiting() -> None:
    async def run() -> list[str]:
        turns = Turns(asyncio.get_running_loop(), lambda: False)
        tasks = [asyncio.ensure_future(turns.wait()) for _ in range(3 * A_TURN)]
        await asyncio.sleep(0)
        for task in tasks[A_TURN:-1]:
            task.cancel()
        return [type(result).__name__ for result in await asyncio.gather(*tasks, return_exceptions=True)]

    assert asyncio.run(run()) == ["NoneType"] * A_TURN + ["CancelledError"] * (2 * A_TURN - 1) + ["NoneType"]


class Counting(Renderer):
    """Counts what it renders."""

    count = 0

    def render(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        return super().render(*args, **options)


@pytest.mark.parametrize("is_settled", [False, True], ids=["rendered", "answered"])
def test_a_refusal_does_not_wait_for_many_that_are_accepted(
    tokenizer: PreTrainedTokenizerBase, *, is_settled: bool
) -> None:
    """By how many of `MANY` requests have a step done between its arrival and its answer."""
    engine = FakeEngine(INFO, held=True)
    renderer = Counting(tokenizer, INFO)
    server = app.build([Service(engine, renderer, ("fake",))], ServerConfig(api_key=("key",)))
    statuses: list[int] = []

    def steps() -> int:
        return len(statuses) if is_settled else renderer.count

    async def ask(key: str) -> int:
        sent: list[Message] = []
        body = json.dumps({"input": "old boat"}).encode()
        coming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return coming.pop() if coming else await asyncio.Future()

        async def send(message: Message) -> None:
            sent.append(message)

        scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())],
        }  # fmt: skip
        await server(scope, receive, send)
        statuses.append(sent[0]["status"])
        return int(sent[0]["status"])

    async def run() -> int:
        tasks = [asyncio.ensure_future(ask("key")) for _ in range(MANY)]
        if is_settled:
            while len(engine.submitted) < MANY:
                await asyncio.sleep(0.001)
            engine.release()
            await asyncio.sleep(0)
        assert await asyncio.ensure_future(ask("other")) == 401
        between = steps()
        engine.held = False
        engine.release()
        await asyncio.gather(*tasks)
        return between

    before_the_crowd = 0 if is_settled else A_TURN  # until it is one, the loop does more in a turn
    assert asyncio.run(run()) <= 3 * A_CROWDED_TURN + before_the_crowd
    assert sorted(statuses) == [200] * MANY + [401]
