"""Admission: what would wait too long is refused before it is read, by estimated time and by bytes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from cenote import metrics
from cenote.config import ServerConfig
from cenote.core import Output
from cenote.engine.fake import FakeEngine
from cenote.engine.promise import Timed
from cenote.errors import Overloaded
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server import app, gate
from cenote.server.admission import KNOWN_AFTER, SHORT_MEMORY, Admission, EngineLine, Held, Line, RenderLine
from tests import PATIENCE
from tests.conftest import INFO, JSON
from tests.engine.test_remote import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client.metrics import MetricWrapperBase
    from starlette.types import Message
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

ROUTE = "/v1/embeddings"


@dataclass
class Clock:
    """A clock that stands until it is moved."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def counted(line: EngineLine) -> int:
    """The tokens of all requests in a line, of each at most those of a bulk request that others wait for."""
    return sum(line._tokens)


def worked(line: Line, clock: Clock, pace: float, seconds: float = 1.0) -> None:
    """Let `line`, which is full, be worked off for some time; it stays as long as it is."""
    line.finish(0)
    clock.now += seconds
    line.finish(int(pace * seconds))


def test_a_line_knows_its_wait_by_the_pace_of_late() -> None:
    clock = Clock()
    line = Line(100, clock)
    line.change(500)
    assert line.seconds == 0, "nothing is known yet"
    worked(line, clock, 50)
    assert line.seconds == pytest.approx(10)
    line.change(-300)
    assert line.seconds == pytest.approx(4)
    for _ in range(100):
        worked(line, clock, 200)
    assert line.seconds == pytest.approx(1, rel=0.01), "what was long ago counts no longer"


def test_a_pace_is_measured_only_while_enough_waits() -> None:
    clock = Clock()
    line = Line(100, clock)
    line.change(99)
    for _ in range(10):
        worked(line, clock, 1)
    line.change(900)
    assert line.seconds == 0, "a line that is not full says nothing of its pace"
    worked(line, clock, 500)
    line.change(-990)
    clock.now += 1000
    line.finish(1)
    line.change(1000)
    worked(line, clock, 500)
    assert line.seconds == pytest.approx(1009 / 500), "the pause in between does not count"
    assert KNOWN_AFTER <= 1


def test_an_engine_that_returns_with_other_batches_has_a_line_for_them(tokenizer: PreTrainedTokenizerBase) -> None:
    engines = [FakeEngine(INFO), FakeEngine(INFO)]
    services = [
        Service(engine, Renderer(tokenizer, INFO), (name,)) for engine, name in zip(engines, ("a", "b"), strict=True)
    ]
    admission = Admission(services, ServerConfig())
    first, second = lines = [*admission.lines]
    engines[0].info = replace(INFO)
    assert [admission.line(service) for service in services] == lines, "the same batches"
    with first.enter(1 << 30) as place:
        place.queue(100)
        engines[0].info = INFO.reported(batch_tokens=2 * first.batch)
        line = admission.line(services[0])
        assert (line.batch, line.most, line.amount) == (2 * first.batch, 2 * first.most, 0)
        assert admission.line(services[0]) is line
        assert admission.lines == [line, second]
    assert (first.amount, counted(first), line.amount, counted(line)) == (0, 0, 0, 0)


def test_a_bulk_request_counts_with_what_others_wait_for() -> None:
    line = EngineLine(INFO)
    with line.enter(1 << 30) as place:
        assert counted(line) == line.most == 8 * INFO.report.batch_tokens
        assert line.amount == 0, "the engine has nothing yet"
        place.queue(7)
        assert counted(line) == line.amount == 7
    assert counted(line) == line.amount == 0


def test_a_request_waits_for_as_much_of_another_as_it_has_itself() -> None:
    clock = Clock()
    line = EngineLine(INFO, clock)
    batch = line.batch
    with ExitStack() as places:
        filled(line, 100 * batch, batch, places)
        worked(line, clock, batch)
        assert line.wait() == pytest.approx(100)
    assert line.wait() == 0
    with line.enter(0) as bulk, line.enter(0) as small:
        bulk.queue(1000 * batch)
        small.queue(batch // 4)
        assert line.wait() == pytest.approx(1.25), "a batch of the bulk request, and the small one"
        assert line.wait(3 * batch) == pytest.approx(3.25)
        assert line.wait(1000 * batch) == pytest.approx(8.25)


def test_of_each_request_a_batch_at_most_comes_before_a_short_one() -> None:
    """Also of two that are counted together, one shorter than a batch and one longer."""
    clock = Clock()
    line = EngineLine(INFO, clock)
    batch = line.batch
    shorter, longer = batch - batch // 8, batch + batch // 8
    assert shorter.bit_length() == longer.bit_length(), "no power of two lies between them"
    with ExitStack() as places:
        filled(line, 100 * batch, batch, places)
        worked(line, clock, batch)
    with line.enter(0) as first, line.enter(0) as second:
        first.queue(shorter)
        second.queue(longer)
        assert line.wait() == pytest.approx((shorter + batch) / batch)


def test_what_is_not_rendered_says_nothing_of_the_engine_s_pace() -> None:
    clock = Clock()
    line = EngineLine(INFO, clock)
    with line.enter(1 << 30):
        for _ in range(10):
            worked(line, clock, 1)
        assert line.wait() == 0, "small requests beside it do not fill the engine"


def filled(line: EngineLine, tokens: int, size: int, places: ExitStack) -> None:
    """Let requests of `size` tokens wait in `line`, as many as make `tokens`."""
    for _ in range(tokens // size):
        places.enter_context(line.enter(0)).queue(size)


def test_of_work_that_took_long_only_what_a_pace_remembers_counts() -> None:
    clock = Clock()
    line = Line(100, clock)
    line.change(1000)
    worked(line, clock, 100)
    line.finish(60_000, took=600)
    assert line.seconds == pytest.approx(1000 / (100 + 60_000 * SHORT_MEMORY / 600))


def test_parts_of_a_batch_count_for_the_time_before_it() -> None:
    """Clients that wait fill a line up to a batch's end, and again after it: such a batch says no time."""
    clock = Clock()
    line = Line(100, clock)
    line.change(600)
    worked(line, clock, 50)
    line.change(80 - 600)
    clock.now += 1
    line.change(50)
    for _ in range(20):
        for _ in range(5):
            line.finish(10)
            line.change(-10)
        line.change(50)
        clock.now += 1
    line.change(1000 - line.amount)
    assert line.seconds == pytest.approx(1000 / 50)


def test_a_pace_that_falls_is_believed_sooner_than_one_that_rises() -> None:
    clock = Clock()
    line = Line(100, clock)
    line.change(1000)
    for pace, seconds, expected in ((100, 20, 10), (50, 3, 16.5), (100, 3, 11.1), (100, 40, 10)):
        for _ in range(10 * seconds):
            worked(line, clock, pace, 0.1)
        assert line.seconds == pytest.approx(expected, rel=0.02), (pace, seconds)


def test_forwards_that_take_longer_than_a_pace_remembers_are_all_of_it() -> None:
    """Of two streams, whose forwards of 8 seconds end by turns; just after each other, then at the same time."""
    clock = Clock()
    line = Line(100, clock)
    line.change(1000)
    line.finish(0)
    for pauses, spread in (((4, 4), 0.05), ((7.9, 0.1), 0.25), ((8, 0), 0.05)):
        seen = []
        for _ in range(10):
            for pause in pauses:
                clock.now += pause
                line.finish(400, took=8)
            seen.append(line.seconds)
        assert seen[4:] == pytest.approx([10] * 6, rel=spread), pauses
    for _ in range(200):
        worked(line, clock, 1000, 0.1)
    assert line.seconds == pytest.approx(1, rel=0.15), "and are forgotten when others are short"


def test_what_is_finished_of_a_request_counts_when_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    """Requests that have their turns end together: before that nothing would be finished, and then all in a moment."""
    clock = Clock(1.0)
    line = EngineLine(INFO, clock)
    batch = line.batch
    with ExitStack() as stack:
        places = [stack.enter_context(line.enter(0)) for _ in range(batch // 100)]
        futures: list[Timed[None]] = [Timed() for _ in places]
        for place, future in zip(places, futures, strict=True):
            place.queue(8 * 100, 8)
            place.begin(future)
        line.finish(0, at=clock.now)
        amounts = []
        for _ in range(7):
            clock.now += 1
            for place, future in zip(places, futures, strict=True):
                future.times.finished = clock.now
                place.advance(1)
            amounts.append(line.amount)
        tokens = 100 * len(places)
        assert amounts == [tokens * left for left in range(7, 0, -1)]
        assert line.wait(800) == pytest.approx(8), "by whole requests, since those that come have their turns as well"
        clock.now += 1
        for future in futures:
            future.times.finished = clock.now
            future.set_result(None)
        assert line.amount == 0, "what was not told before is finished at the end"
        assert line.wait(800) == pytest.approx(8)
    places[0].advance(1)
    assert line.amount == counted(line) == 0, "of a request that has left nothing is taken off twice"


def test_a_request_that_fails_finishes_nothing() -> None:
    clock = Clock(1.0)
    line = EngineLine(INFO, clock)
    line.change(10 * line.batch)
    line.finish(0, at=clock.now)
    clock.now += 1
    for leave in (lambda future: future.set_exception(Overloaded("no")), lambda future: future.cancel()):
        with line.enter(0) as place:
            future: Timed[None] = Timed()
            place.queue(1_000_000)
            place.begin(future)
            leave(future)
    line.finish(line.batch, at=clock.now)
    assert line.seconds == pytest.approx(10)


def test_a_body_in_the_hands_of_one_thread_is_in_nobody_s_way() -> None:
    """What other threads finish beside it is not the pace of its bytes."""
    clock = Clock()
    line = RenderLine(2, clock)
    seen: list[tuple[int, float]] = []

    async def in_pool(work: Callable[[], int]) -> int:
        seen.append((line.amount, line.seconds))
        return work()

    def long() -> int:
        for _ in range(10):
            line.rendered(300, 0.1)
            seen.append((line.amount, line.seconds))
        clock.now += 1
        return 5

    assert asyncio.run(line.run(10_000_000, in_pool, long)) == 5
    assert seen == [(10_000_000, 0), *[(0, 0)] * 10]
    line.change(1_000_000)
    pace = (10_000_000 + 3000) / (0.5 + 0.5)
    assert line.seconds == pytest.approx(1_000_000 / pace), "of two threads: what each has done in its time"


def test_a_body_that_cannot_be_rendered_leaves_the_line() -> None:
    line = RenderLine(2, Clock())

    async def in_pool(work: Callable[[], int]) -> int:
        return work()

    def refuse() -> int:
        raise Overloaded("no")

    with pytest.raises(Overloaded):
        asyncio.run(line.run(1000, in_pool, refuse))
    assert line.amount == 0


def admission(clock: Clock, tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[Admission, list[Service]]:
    services = [Service(FakeEngine(INFO), Renderer(tokenizer, INFO), (name,)) for name in ("a", "b")]
    return Admission(services, ServerConfig(**options), clock), services


def test_a_request_is_refused_when_it_would_wait_too_long(tokenizer: PreTrainedTokenizerBase) -> None:
    clock = Clock()
    own, (first, second) = admission(clock, tokenizer, max_waiting_time=10)
    with ExitStack() as places:
        for service, amount in ((first, 110_000), (second, 40_000)):
            filled(own.line(service), amount, 500, places)
            worked(own.line(service), clock, 10_000)
        own.check()
        own.check_model(second)
        with pytest.raises(Overloaded, match="would wait 11 to 13 s, and at most 10 s are allowed") as refusal:
            own.check_model(first)
        assert refusal.value.retry_after == 6, "then half of the longest wait is left"
        with ExitStack() as more:
            filled(own.line(second), 70_000, 500, more)
            with pytest.raises(Overloaded, match="11 to 13 s"):
                own.check()
        own.check()
        own.rendering.change(1_000_000)
        own.rendering.rendered(50_000, 1)
        with pytest.raises(Overloaded, match="14 to 17 s") as refusal:
            own.check()
        assert refusal.value.retry_after == 9


@pytest.mark.parametrize(("longest", "told"), [(10, 10), (0.2, 1)])
def test_nobody_is_told_to_stay_away_for_longer_than_a_request_may_wait(
    tokenizer: PreTrainedTokenizerBase, longest: float, told: int
) -> None:
    clock = Clock()
    own, services = admission(clock, tokenizer, max_waiting_time=longest)
    with ExitStack() as places:
        for service in services:
            filled(own.line(service), 100_000, 500, places)
            worked(own.line(service), clock, 100)
        with pytest.raises(Overloaded, match="would wait 1000 to 1200 s") as refusal:
            own.check()
    assert refusal.value.retry_after == told


def test_a_large_request_waits_longer_than_a_small_one(tokenizer: PreTrainedTokenizerBase) -> None:
    clock = Clock()
    own, (first, second) = admission(clock, tokenizer, max_waiting_time=5)
    with ExitStack() as places:
        for service in (first, second):
            line = own.line(service)
            filled(line, 2 * line.most, line.most, places)
            worked(line, clock, line.batch)
        own.check(300)
        own.check_model(first, 300)
        for check in (own.check, partial(own.check_model, first)):
            with pytest.raises(Overloaded, match="16 to 19 s"):
                check(1 << 20)


def test_bytes_of_bodies_are_bounded_but_one_alone_and_small_ones_go(tokenizer: PreTrainedTokenizerBase) -> None:
    own, _ = admission(Clock(), tokenizer, max_pending_bytes=200_000)
    large, small, other = Held(own), Held(own), Held(own)
    large.add(300_000)
    small.add(60_000)
    with pytest.raises(Overloaded, match="the bodies of other requests take 360000 bytes"):
        other.add(70_000)
    other.release()
    large.release()
    other.add(70_000)
    for held in (other, other, small):
        held.release()
    assert own.pending == 0


def value(metric: MetricWrapperBase) -> float:
    return float(next(iter(metric.collect())).samples[0].value)


def gauges() -> tuple[float, float]:
    return value(metrics.pending_bytes), value(metrics.running_requests)


def refusals(reason: str) -> float:
    return value(metrics.refusals_of(reason))


@pytest.mark.parametrize("path", [ROUTE, "/v1/rerank", "/v2/embed", "/tokenize", "/pooling"])
def test_an_overloaded_server_refuses_before_it_parses(serve: Serve, path: str) -> None:
    engine = FakeEngine(INFO)
    clock = Clock()
    client = serve(engine, max_waiting_time=2, clock=clock)
    unreadable = b'{"input'
    assert client.post(path, content=unreadable, headers=JSON).status_code == 400
    own = admission_of(client)
    (line,) = own.lines
    places = ExitStack()
    filled(line, 30_000, 500, places)
    worked(line, clock, 10_000)
    before = refusals("waiting")
    for _ in range(3):
        answer = client.post(path, content=unreadable, headers=JSON)
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "2"
        message = answer.json()["error"]["message"]
        assert message.startswith("the server is overloaded: a new request would wait 3 to 4 s, and at most 2 s")
    assert engine.submitted == []
    assert refusals("waiting") == before + 3
    for path in ("/health", "/livez", "/readyz", "/metrics", "/load", "/version", "/v1/models"):
        assert client.get(path).status_code == 200, path
    places.close()
    own.check()
    assert gauges() == (0, 0)


def admission_of(client: TestClient) -> Admission:
    served: app.Application = client.app  # type: ignore[assignment]
    return served.admission


def post(client: TestClient, inputs: Any) -> int:
    return client.post(ROUTE, json={"input": inputs}).status_code


def test_every_request_is_answered_and_the_lines_are_empty_afterwards(serve: Serve) -> None:
    """Of three times as many requests as may wait, with an engine that answers only when it is let."""
    engine = FakeEngine(INFO, held=True)
    clock = Clock(time.monotonic())  # as the engine's
    client = serve(engine, max_waiting_time=1, max_client_batch_size=64, clock=clock)
    (line,) = admission_of(client).lines
    line.change(10_000)
    worked(line, clock, 10_300)
    line.change(-10_000)
    stop = threading.Event()

    def release() -> None:
        while not stop.wait(0.05):
            engine.release()

    releasing = threading.Thread(target=release)
    with ThreadPoolExecutor(32) as pool:
        waiting = [pool.submit(post, client, [[5] * 60] * 64) for _ in range(32)]
        refused = next(as_completed(waiting, PATIENCE))  # the line is full, and the engine answers nothing yet
        releasing.start()
        statuses = [future.result(PATIENCE) for future in waiting]
    assert refused.result() == 429
    stop.set()
    releasing.join()
    assert {*statuses} == {200, 429}
    assert counted(line) == line.amount == 0
    assert gauges() == (0, 0)
    assert client.get("/load").json() == {"server_load": 0}


class Stepping(FakeEngine):
    """Tells of each sequence of a request when it is let."""

    def submit(self, sequences: Any, *, progress: Any = None) -> Future[list[Output]]:
        self.progress = progress
        return super().submit(sequences)


def test_a_server_counts_what_is_finished_of_a_request(serve: Serve) -> None:
    engine = Stepping(INFO, held=True)
    client = serve(engine)
    (line,) = admission_of(client).lines
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, client, [[5] * 10, [6] * 20, [7] * 30])
        until(lambda: bool(engine.submitted))
        amounts = [line.amount]
        for _ in range(2):
            engine.progress(1)
            amounts.append(line.amount)
        assert amounts == [60, 40, 20]
        assert counted(line) == 60
        engine.release()
        assert waiting.result(PATIENCE) == 200
    assert line.amount == counted(line) == 0


def test_a_client_that_still_sends_is_let_finish_before_its_refusal_ends() -> None:
    """The refusal is there at once; the connection is not closed on what the client has under way."""
    sent: list[Message] = []
    coming: list[Message] = [{"type": "http.request", "body": b"x" * 9, "more_body": more} for more in (1, 1, 1, 0)]
    seen: list[int] = []

    async def receive() -> Message:
        seen.append(len(sent))
        return coming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    server = app.build([], ServerConfig(max_body_bytes=10))
    scope = {
        "type": "http", "method": "POST", "path": "/v2/embed", "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }  # fmt: skip
    asyncio.run(server(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 2]
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["message"].startswith("the request body has more than the 10 bytes")
    assert [message["more_body"] for message in sent[1:2]] == [True]
    assert seen == [0, 0, 2, 2]
    assert coming == []


def test_a_client_that_never_finishes_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "LINGER", 0.01)
    sent: list[Message] = []

    async def receive() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    server = app.build([], ServerConfig())
    scope = {"type": "http", "method": "POST", "path": ROUTE, "headers": [(b"content-type", b"text/html")]}
    asyncio.run(server({**scope, "query_string": b""}, receive, send))
    assert sent[0]["status"] == 400
    assert sent[-1] == {"type": "http.response.body", "body": b""}


def test_a_server_that_shuts_down_is_alive_and_not_ready(serve: Serve) -> None:
    client = serve()
    assert [client.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
    client.app.begin_end()  # type: ignore[attr-defined]
    assert [client.get(path).status_code for path in ("/livez", "/readyz", "/health")] == [200, 503, 200]


def test_a_model_that_fails_is_alive_and_not_ready(serve: Serve) -> None:
    client = serve(FakeEngine(INFO, is_healthy=False))
    assert [client.get(path).status_code for path in ("/livez", "/readyz", "/health")] == [200, 503, 503]


def test_the_second_listener_tells_of_the_first_and_nothing_else(serve: Serve) -> None:
    client = serve()
    beside = client.app.operations()  # type: ignore[attr-defined]
    assert {path for _, path in beside.table.routes} == {
        "/health", "/ping", "/livez", "/readyz", "/version", "/load", "/metrics",
    }  # fmt: skip
    client.app.begin_end()  # type: ignore[attr-defined]
    assert TestClient(beside).get("/readyz").status_code == 503
    assert client.post(ROUTE, content=b"{}", headers=JSON).status_code == 400


@pytest.mark.parametrize(("flags", "status"), [({}, 200), ({"api_key_metrics": True}, 401)], ids=str)
def test_the_second_listener_is_outside_the_key_unless_told(serve: Serve, flags: dict[str, Any], status: int) -> None:
    client = serve(api_key=("secret",), **flags)
    beside = TestClient(client.app.operations())  # type: ignore[attr-defined]
    assert [client.get(path).status_code for path in ("/metrics", "/health")] == [401, 200]
    assert [beside.get(path).status_code for path in ("/metrics", "/load", "/health")] == [status, status, 200]
    assert beside.get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200
