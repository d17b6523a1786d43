"""`LLM` while it waits: interruptions cancel the rest, and a progress bar may do as it likes. The memory of results."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import signal
import threading
import tracemalloc
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import tqdm

from cenote import LLM, metrics
from cenote.engine.engine import LocalEngine
from cenote.engine.waiting import UnderWay
from cenote.errors import EngineFailed
from cenote.outputs import EmbeddingOutput, SparseEmbedding
from tests import PATIENCE
from tests.checkpoints import bert, classifier
from tests.engine.test_engine import Model, check, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

MANY = [f"one two three {i}" for i in range(3000)]


def bar_that(does: Callable[[], object]) -> type:
    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            if n and not self.disable:
                does()
            return super().update(n)

    return Bar


def done() -> float:
    return metrics.REGISTRY.get_sample_value("cenote_sequences_total", {"outcome": "done"}) or 0.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("waiting")
    return {
        "embed": bert(root / "embed"),
        "rank": classifier(root / "rank", num_labels=1),
        "label": classifier(root / "label", head="ForTokenClassification", num_labels=2),
    }


CALLS: list[tuple[str, Callable[[LLM], Any]]] = [
    ("embed", lambda llm: llm.embed(MANY)),
    ("embed", lambda llm: llm.encode(MANY, pooling_task="token_embed")),
    ("rank", lambda llm: llm.rerank("one", MANY)),
    ("rank", lambda llm: llm.score("one", MANY)),
    ("rank", lambda llm: llm.classify(MANY)),
    ("label", lambda llm: llm.token_classify(MANY)),
]


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Send the process one SIGINT, as Ctrl-C does: the caller finds it, whichever thread sends it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    left = [signal.SIGINT]
    yield lambda: signal.raise_signal(left.pop()) if left else None
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("kind", "call"), CALLS, ids=["embed", "encode", "rerank", "score", "classify", "token_classify"]
)
def test_an_interrupted_call_is_cancelled(
    folders: dict[str, Path],
    kind: str,
    call: Callable[[LLM], Any],
    interrupt: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with LLM(str(folders[kind])) as llm:
        monkeypatch.setattr(tqdm, "tqdm", bar_that(interrupt))
        before = done()
        with pytest.raises(KeyboardInterrupt):
            call(llm)
    assert done() - before < len(MANY) / 2, "closing finishes what was not cancelled"


def test_a_bar_that_raises_leaves_the_engine_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        raise SystemExit("a bar wants to end the process")

    with LLM(str(folders["embed"])) as llm:
        with monkeypatch.context() as patched:
            patched.setattr(tqdm, "tqdm", bar_that(leave))
            with pytest.raises(SystemExit):
                llm.embed(["one"])
        assert len(llm.embed(["one"], use_tqdm=False)) == 1
        assert llm._service.engine.healthy()


def test_a_bar_may_use_the_model(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(folders["embed"])) as llm:
        inside: list[Any] = []
        monkeypatch.setattr(tqdm, "tqdm", bar_that(lambda: inside.append(llm.embed(["two"], use_tqdm=False)[0])))
        (output,) = llm.embed(["one"])
    assert inside
    assert len(inside[0].outputs.embedding) == len(output.outputs.embedding)


def test_progress_is_told_in_full() -> None:
    engine = LocalEngine(Model(), max_batch_tokens=20)
    told: list[int] = []
    with UnderWay() as under_way:
        for _ in range(5):
            under_way.submit(engine, texts(*range(1, 15)))
        results = under_way.results(told.append)
    assert sum(told) == 5 * 14
    assert [len(outputs) for outputs in results] == [14] * 5
    engine.close()


def test_a_progress_callback_may_raise_anything_and_may_not_ask_for_more() -> None:
    engine = LocalEngine(Model())
    refused: list[str] = []

    def progress(_: int) -> None:
        try:
            engine.submit(texts(3))
        except EngineFailed as error:
            refused.append(str(error))
        raise SystemExit

    check(engine.submit(texts(2), progress=progress), texts(2))
    assert "progress callback" in refused[0]
    check(engine.submit(texts(4)), texts(4))
    assert engine.healthy()
    engine.close()


def hold(event: threading.Event) -> None:
    """Wait for it."""
    assert event.wait(PATIENCE)


@pytest.mark.parametrize("waits", ["result", "exception", "LLM"])
def test_a_done_callback_may_ask_for_more_and_may_not_wait(waits: str) -> None:
    """It runs in the engine's thread. One that is added to a future that is done runs in its caller's."""
    added = threading.Event()
    engine = LocalEngine(Model(lambda _: hold(added)))
    later: Queue[tuple[Future[Any], str]] = Queue()

    def ask(future: Future[Any]) -> None:
        assert future.result() is not None, "it is done"
        with UnderWay() as under_way:
            following = engine.submit(texts(3))
            try:
                if waits == "LLM":
                    under_way.submit(engine, texts(4))
                    under_way.results()
                else:
                    getattr(following, waits)(PATIENCE)
            except EngineFailed as error:
                later.put((following, str(error)))
            else:
                later.put((following, ""))

    future = engine.submit(texts(2))
    future.add_done_callback(ask)
    added.set()
    following, refusal = later.get(timeout=PATIENCE)
    assert refusal.startswith("a callback waits for an engine's work")
    check(following, texts(3))
    future.add_done_callback(ask)
    assert later.get(timeout=PATIENCE)[1] == ""
    engine.close()


def test_a_vector_is_read_as_a_list() -> None:
    values = [0.5, -1.25, 3.0]
    output = EmbeddingOutput(np.array(values, np.float32))  # type: ignore[arg-type]
    assert output.embedding == values
    assert type(output.embedding) is list
    assert output.embedding[1:] == values[1:]
    assert json.dumps(output.embedding) == json.dumps(values)
    assert orjson.dumps(output.embedding) == orjson.dumps(values)
    assert dataclasses.asdict(output) == {"embedding": values}
    for twin in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output), dataclasses.replace(output)):
        assert twin == output
        assert twin.embedding == values
    assert output != EmbeddingOutput([0.5, -1.25])
    assert EmbeddingOutput(embedding=[0.1, 0.2]).embedding == [0.1, 0.2], "numbers of a caller's stay as they are"
    assert (output.hidden_size, output.array.dtype) == (3, np.float32)
    assert repr(output) == "EmbeddingOutput(hidden_size=3)"
    with pytest.raises(TypeError, match="embedding"):
        EmbeddingOutput()  # type: ignore[call-arg]


def test_a_sparse_vector_is_read_as_lists() -> None:
    output = SparseEmbedding(np.array([3, 9]), np.array([0.5, 2.0], np.float32), ["a", "b"])  # type: ignore[arg-type]
    assert (output.indices, output.values, output.tokens) == ([3, 9], [0.5, 2.0], ["a", "b"])
    assert pickle.loads(pickle.dumps(output)) == output
    assert json.dumps(dataclasses.asdict(output)) == '{"indices": [3, 9], "values": [0.5, 2.0], "tokens": ["a", "b"]}'


@pytest.mark.full
def test_results_take_little_more_than_their_numbers() -> None:
    with LLM() as llm:
        llm.embed(["a text"], use_tqdm=False)
        tracemalloc.start()
        outputs = llm.embed([f"text {i}" for i in range(100)], use_tqdm=False)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(outputs) == 100
    assert held / 100 < 4 * 384 + 1500, f"{held / 100:.0f} bytes a text"


def test_a_result_does_not_hold_the_batch_it_came_from(folders: dict[str, Path]) -> None:
    with LLM(str(folders["embed"])) as llm:
        outputs: Any = llm.embed(["one", "two", "three"], use_tqdm=False)
    assert all(output.outputs.array.base is None for output in outputs)


def test_what_was_interrupted_before_it_was_told_is_cancelled() -> None:
    engine = LocalEngine(Model(), max_batch_tokens=10)
    with pytest.raises(ZeroDivisionError), UnderWay() as under_way:
        under_way.submit(engine, texts(*[5] * 1000))
        raise ZeroDivisionError
    assert under_way._futures[0].done()
    engine.submit(texts(2)).result(PATIENCE)
    engine.close()
