"""A request's trip inside the server: on which thread it is rendered, and how answers come back to the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote.config import ServerConfig
from cenote.conventions import MessageTemplate, Pictures
from cenote.core import Output, Sequence
from cenote.engine.fake import FakeEngine
from cenote.errors import EngineFailed, Overloaded
from cenote.pipeline.pipeline import Service
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.rendering import Renderer
from cenote.server import desk, serving
from cenote.server.admission import RenderLine
from cenote.server.desk import QUIET, Desk
from cenote.server.serving import SHORT, Serving, new_id
from tests import pictured
from tests.conftest import CLASSIFIER, INFO, JSON, expected, floats

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Serve

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def following(desk: Desk, future: Future[int]) -> asyncio.Future[int]:
    """A future of the loop that ends as `future` does."""
    answer: asyncio.Future[int] = desk.loop.create_future()
    desk._follow(future, answer)
    return answer


def test_every_answer_reaches_the_one_who_waits_for_it() -> None:
    async def ask() -> list[Any]:
        desk = Desk(asyncio.get_running_loop())
        futures: list[Future[int]] = [Future() for _ in range(400)]
        waiting = [following(desk, future) for future in futures]

        def settle(start: int) -> None:
            for i in range(start, len(futures), 4):
                futures[i].set_exception(EngineFailed(str(i))) if i % 7 == 0 else futures[i].set_result(i)

        with ThreadPoolExecutor(4) as threads:
            for start in range(4):
                threads.submit(settle, start)
            return await asyncio.gather(*waiting, return_exceptions=True)

    found = asyncio.run(ask())
    assert [x for i, x in enumerate(found) if i % 7] == [i for i in range(400) if i % 7]
    assert [str(x) for x in found[::7]] == [str(i) for i in range(0, 400, 7)]
    assert all(isinstance(x, EngineFailed) for x in found[::7])


@pytest.mark.parametrize("fails", [False, True])
def test_a_render_thread_keeps_no_threads_of_torch_s(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[str, int]] = []
    monkeypatch.setattr(serving, "release_threads", lambda: happened.append(("released", threading.get_ident())))

    def work() -> int:
        happened.append(("worked", threading.get_ident()))
        if fails:
            raise Overloaded("for now")
        return 7

    own = Serving([], ServerConfig())
    try:
        if fails:
            with pytest.raises(Overloaded, match="for now"):
                asyncio.run(own.in_pool("encode", work))
        else:
            assert asyncio.run(own.in_pool("encode", work)) == 7
    finally:
        own.close()
    (first, thread), (then, same) = happened
    assert (first, then) == ("worked", "released")
    assert thread == same != threading.get_ident()


def test_the_loop_is_woken_once_for_all_that_are_done() -> None:
    async def ask() -> tuple[int, list[int]]:
        loop = asyncio.get_running_loop()
        desk, wake, woken = Desk(loop), loop.call_soon_threadsafe, []
        loop.call_soon_threadsafe = lambda *args: (woken.append(args), wake(*args))[1]  # type: ignore[method-assign,assignment,misc]
        futures: list[Future[int]] = [Future() for _ in range(8)]
        waiting = [following(desk, future) for future in futures]
        for i, future in enumerate(futures):
            future.set_result(i)
        first = await asyncio.gather(*waiting)
        again: Future[int] = Future()
        last = following(desk, again)
        again.set_result(8)
        return len(woken), [*first, await last]

    assert asyncio.run(ask()) == (2, [*range(9)])


def test_those_who_gave_up_do_not_keep_others_from_their_answers() -> None:
    async def ask() -> tuple[bool, bool, int]:
        desk = Desk(asyncio.get_running_loop())
        left: Future[int] = Future()
        cancelled: Future[int] = Future()
        kept: Future[int] = Future()
        gone, dropped, waiting = following(desk, left), following(desk, cancelled), following(desk, kept)
        gone.cancel()
        left.set_result(1)
        cancelled.cancel()
        kept.set_result(2)
        found = await waiting
        return gone.cancelled(), dropped.cancelled(), found

    assert asyncio.run(ask()) == (True, True, 2)


class Counting(FakeEngine):
    """Notes how many turns of the event loop have passed at each submission."""

    def __init__(self) -> None:
        super().__init__(held=True)
        self.turns = 0
        self.at: list[int] = []
        self.futures: list[Future[list[Output]]] = []

    def submit(self, sequences: Any, *, progress: Any = None) -> Future[list[Output]]:
        self.at.append(self.turns)
        self.futures.append(super().submit(sequences))
        return self.futures[-1]

    async def turn(self, times: int = 1) -> None:
        for _ in range(times):
            await asyncio.sleep(0)
            self.turns += 1


async def five(desk: Desk, engine: Counting) -> None:
    """A request in each of five turns."""
    for number in range(5):
        desk.submit(engine, [Sequence([number])])
        await engine.turn()


def test_requests_that_come_together_reach_the_engine_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "MOST_HELD", 10.0)

    async def ask() -> list[int]:
        engine = Counting()
        desk = Desk(asyncio.get_running_loop())
        await five(desk, engine)
        assert engine.at == []
        await engine.turn(10)
        assert [s.ids for s in engine.submitted] == [[number] for number in range(5)]
        desk.submit(engine, [Sequence([9])])
        await engine.turn(10)
        return engine.at

    *first, last = asyncio.run(ask())
    assert len(first) == 5
    assert len(set(first)) == 1, "in one turn of the loop"
    assert first[0] <= 4 + QUIET + 1
    assert last - 15 <= QUIET + 1


def test_nothing_is_held_for_long_because_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "MOST_HELD", 0.0)

    async def ask() -> list[int]:
        engine = Counting()
        desk = Desk(asyncio.get_running_loop())
        await five(desk, engine)
        await engine.turn(3)
        return engine.at

    assert asyncio.run(ask()) == [0, 1, 2, 3, 4]


def test_whoever_gives_up_takes_the_work_along() -> None:
    async def ask() -> None:
        engine = Counting()
        desk = Desk(asyncio.get_running_loop())
        early, late, kept = (desk.submit(engine, [Sequence([number])]) for number in (1, 2, 3))
        early.cancel()
        await engine.turn(10)
        assert [s.ids for s in engine.submitted] == [[2], [3]], "what was given up before never reaches the engine"
        late.cancel()
        await engine.turn()
        assert [future.cancelled() for future in engine.futures] == [True, False]
        engine.release()
        assert len(await kept) == 1

    asyncio.run(ask())


def test_what_the_engine_refuses_is_the_answer_of_that_request_alone() -> None:
    class Full(FakeEngine):
        def submit(self, sequences: Any, *, progress: Any = None) -> Future[list[Output]]:
            if sequences[0].ids == [13]:
                raise Overloaded("the queue is full", retry_after=3)
            return super().submit(sequences)

    async def ask() -> list[Any]:
        desk, engine = Desk(asyncio.get_running_loop()), Full()
        waiting = [desk.submit(engine, [Sequence([number])]) for number in (12, 13, 14)]
        return await asyncio.gather(*waiting, return_exceptions=True)

    first, second, third = asyncio.run(ask())
    assert isinstance(second, Overloaded)
    assert [len(first), len(third)] == [1, 1]


def rendering_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that will have the names of the threads that render."""
    names: list[str] = []
    render = Renderer.render

    def watched(*args: Any, **kwargs: Any) -> Any:
        names.append(threading.current_thread().name)
        return render(*args, **kwargs)

    monkeypatch.setattr(Renderer, "render", watched)
    return names


@pytest.mark.parametrize(
    ("body", "on_the_loop"),
    [
        ({"input": "a short text"}, True),
        ({"input": [[5, 6], [7]]}, True),
        ({"input": "long " * SHORT}, False),
        ({"messages": [{"role": "user", "content": "a template may take its time"}]}, False),
        ({"input": [{"role": "user", "content": "so does this one"}]}, False),
    ],
)
def test_only_short_plain_requests_are_rendered_on_the_event_loop(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], on_the_loop: bool
) -> None:
    ran = rendering_threads(monkeypatch)
    client = serve(chat_template=TEMPLATE, auto_truncate=True)
    assert client.post("/v1/embeddings", json=body).status_code == 200
    assert [name.startswith("cenote-render") for name in ran] == [not on_the_loop]


LONG_PROMPT = {"prompts": Prompts({"long": "long " * 100})}
LONG_DEFAULT = {"prompts": Prompts({"long": "long " * 100}, default="long")}
TEMPLATED = {"messages": MessageTemplate(TEMPLATE)}


@pytest.mark.parametrize(
    ("path", "options", "body", "on_the_loop"),
    [
        ("/v1/embeddings", {}, {"input": ["a", "b"], "padding": "do_not_pad"}, True),
        ("/v1/embeddings", {}, {"input": ["a", "b"], "padding": "max_length"}, False),
        ("/v1/embeddings", TEMPLATED, {"input": ["hello", "world"]}, False),
        ("/embed", TEMPLATED, {"inputs": ["hello", "world"]}, False),
        ("/v1/embeddings", LONG_PROMPT, {"input": ["a"] * 10}, True),
        ("/v1/embeddings", LONG_PROMPT, {"input": ["a"] * 5, "prompt_name": "long"}, True),
        ("/v1/embeddings", LONG_PROMPT, {"input": ["a"] * 10, "prompt_name": "long"}, False),
        ("/v1/embeddings", LONG_DEFAULT, {"input": ["a"] * 10}, False),
        ("/embed", LONG_PROMPT, {"inputs": ["a"] * 5, "prompt_name": "long"}, True),
        ("/embed", LONG_PROMPT, {"inputs": ["a"] * 10, "prompt_name": "long"}, False),
        ("/embed", LONG_DEFAULT, {"inputs": ["a"] * 10}, False),
        ("/classify", LONG_DEFAULT, {"input": ["a"]}, True),
        ("/classify", LONG_DEFAULT, {"input": ["a"] * 10}, False),
        ("/classify", {}, {"input": ["a"], "padding": "max_length"}, False),
    ],
)
def test_short_is_said_of_the_work_and_not_of_the_body(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    options: dict[str, Any],
    body: dict[str, Any],
    on_the_loop: bool,
) -> None:
    ran = rendering_threads(monkeypatch)
    renderer = Renderer(serve.tokenizer, CLASSIFIER, auto_truncate=True, **options)
    client = serve.of(Service(FakeEngine(CLASSIFIER), renderer, ("fake",)))
    assert client.post(path, json=body).status_code == 200
    assert [name.startswith("cenote-render") for name in ran] == [not on_the_loop]


def test_a_blank_picture_is_not_made_on_the_event_loop(tmp_path: Path) -> None:
    tokenizer = pictured.write_qwen_files(tmp_path, "qwen2_vl")
    assert Renderer(tokenizer, INFO).renders_quickly
    pictures = Pictures(str(tmp_path), "grid", 5, blank=28)
    assert not Renderer(tokenizer, INFO, pictures=pictures).renders_quickly


def test_a_slow_tokenizer_stays_off_the_event_loop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Renderer, "renders_quickly", False)
    ran: list[str] = []
    check = Renderer.check
    monkeypatch.setattr(Renderer, "check", lambda *args: (ran.append(threading.current_thread().name), check(*args))[1])
    answer = serve().post("/v1/embeddings", json={"input": [[5, 6]]})
    assert floats(answer.json()["data"][0]["embedding"]) == expected([5, 6])
    assert ran[0].startswith("cenote-render")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"inputs": ["a", "b"]}),
        ("/tokenize", {"content": "a"}),
        ("/v1/tokenize", {"text": "a"}),
        ("/detokenize", {"tokens": [5, 6]}),
        ("/decode", {"ids": [5, 6]}),
    ],
)
def test_what_tokenises_alone_is_in_the_line_before_the_render_threads(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(RenderLine, "rendered", lambda line, size, seconds: sizes.append(size))
    content = json.dumps(body)
    answer = serve(chat_template=TEMPLATE).post(path, content=content, headers=JSON)
    assert answer.status_code == 200
    assert sizes == [len(content)]


def test_ids_are_of_32_digits_and_differ() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids)


def test_numbers_of_further_tasks_count_for_where_an_answer_is_encoded() -> None:
    vector, matrix = np.zeros(4, np.float32), np.zeros((3, 5), np.float32)
    outputs = [Output(vector, others={"token_embed": Output(matrix)}), Output(vector)]
    assert serving._numbers(outputs) == 4 + 15 + 4
