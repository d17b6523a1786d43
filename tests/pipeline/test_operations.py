"""Operations stand behind both faces: the same bad input is refused in the same words by `LLM` and over HTTP."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote import LLM, PoolingParams
from cenote.core import LateChunkingParams, ModelInfo, Output, Sequence
from cenote.engine.cache import CachedEngine
from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest, CenoteError
from cenote.pipeline import operations
from cenote.pipeline.job import Job
from cenote.pipeline.options import PLAIN
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from tests.conftest import CLASSIFIER, CROSS_ENCODER, ENCODER, INFO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

TEXTS = ["one", "two"]
LONG = "word " * 100
CHUNKED = PoolingParams(late_chunking_params=LateChunkingParams(2))


@pytest.fixture
def face(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LLM]]:
    """Makes an `LLM` over a fake engine."""

    def make(info: ModelInfo = INFO, engine: FakeEngine | None = None) -> LLM:
        service = Service(engine or FakeEngine(info), Renderer(tokenizer, info), ("fake",))
        monkeypatch.setattr(Service, "open", lambda *_, **__: service)
        return LLM()

    yield make


BAD: dict[str, tuple[ModelInfo, Callable[[LLM], Any], str, dict[str, Any]]] = {
    "a text too long": (INFO, lambda m: m.embed(LONG), "/v1/embeddings", {"input": LONG}),
    "an id out of the vocabulary": (INFO, lambda m: m.embed([40_000]), "/v1/embeddings", {"input": [40_000]}),
    "no text": (INFO, lambda m: m.embed([]), "/v1/embeddings", {"input": []}),
    "an unknown prompt": (
        INFO,
        lambda m: m.embed("a", prompt_name="x"),
        "/v1/embeddings",
        {"input": "a", "prompt_name": "x"},
    ),
    "dimensions": (
        INFO,
        lambda m: m.embed("a", pooling_params=PoolingParams(dimensions=3)),
        "/v1/embeddings",
        {"input": "a", "dimensions": 3},
    ),
    "a task that is not offered": (
        INFO,
        lambda m: m.encode("a", pooling_task="classify"),
        "/pooling",
        {"input": "a", "task": "classify"},
    ),
    "a task that was removed": (
        INFO,
        lambda m: m.encode("a", pooling_task="reward"),
        "/pooling",
        {"input": "a", "task": "reward"},
    ),
    "a second task that is not offered": (
        INFO,
        lambda m: m.encode("a", pooling_task=["embed", "sparse"]),
        "/v1/embeddings",
        {"input": "a", "embedding_types": ["dense", "sparse"]},
    ),
    "no classifier": (INFO, lambda m: m.classify("a"), "/classify", {"input": "a"}),
    "a step tag": (
        CLASSIFIER,
        lambda m: m.encode("a", PoolingParams(step_tag_id=5), pooling_task="token_classify"),
        "/pooling",
        {"input": "a", "task": "token_classify", "step_tag_id": 5},
    ),
    "no entities": (INFO, lambda m: m.token_classify("a"), "/v1/token_classify", {"input": "a"}),
    "an unknown aggregation": (
        CLASSIFIER,
        lambda m: m.token_classify("a", aggregation_strategy="x"),
        "/v1/token_classify",
        {"input": "a", "aggregation_strategy": "x"},
    ),
    "no score": (CLASSIFIER, lambda m: m.score("a", "b"), "/score", {"queries": "a", "documents": "b"}),
    "lists that do not pair": (
        ENCODER,
        lambda m: m.score(TEXTS, ["a"] * 3),
        "/score",
        {"queries": TEXTS, "documents": ["a"] * 3},
    ),
    "an unknown way to score": (
        ENCODER,
        lambda m: m.score("a", "b", score_type="x"),
        "/score",
        {"queries": "a", "documents": "b", "score_type": "x"},
    ),
    "a way to score that is not offered": (
        ENCODER,
        lambda m: m.score("a", "b", score_type="sparse"),
        "/score",
        {"queries": "a", "documents": "b", "score_type": "sparse"},
    ),
    "an instruction without a template": (
        CROSS_ENCODER,
        lambda m: m.rerank("a", TEXTS, instruction="x"),
        "/rerank",
        {"query": "a", "documents": TEXTS, "instruction": "x"},
    ),
    "an instruction that renders no pairs": (
        ENCODER,
        lambda m: m.rerank("a", TEXTS, instruction="x"),
        "/rerank",
        {"query": "a", "documents": TEXTS, "instruction": "x"},
    ),
    "a reserved variable": (
        CROSS_ENCODER,
        lambda m: m.score("a", "b", chat_template_kwargs={"tokenize": True}),
        "/score",
        {"queries": "a", "documents": "b", "chat_template_kwargs": {"tokenize": True}},
    ),
    "a limit of a side": (
        CROSS_ENCODER,
        lambda m: m.score("a", TEXTS, max_tokens_per_doc=64),
        "/score",
        {"queries": "a", "documents": TEXTS, "max_tokens_per_doc": 64},
    ),
    "no documents": (ENCODER, lambda m: m.rerank("a", []), "/rerank", {"query": "a", "documents": []}),
    "late chunking of ids": (
        INFO,
        lambda m: m.embed([5, 6], pooling_params=CHUNKED),
        "/v1/embeddings",
        {"input": [5, 6], "late_chunking_params": {"chunk_size": 2}},
    ),
    "late chunking of one vector": (
        INFO,
        lambda m: m.encode("a", CHUNKED, pooling_task="embed"),
        "/pooling",
        {"input": "a", "task": "embed", "late_chunking_params": {"chunk_size": 2}},
    ),
    "late chunking of a text too long": (
        INFO,
        lambda m: m.embed(LONG, pooling_params=CHUNKED),
        "/v1/embeddings",
        {"input": LONG, "late_chunking_params": {"chunk_size": 2}},
    ),
    "a reward of an input too long": (
        CROSS_ENCODER,
        lambda m: m.reward([5] * 100),
        "/v1/reward",
        {"prompt_token_ids": [5] * 100},
    ),
    "a reward of no token": (
        CROSS_ENCODER,
        lambda m: m.reward([40_000]),
        "/v1/reward",
        {"prompt_token_ids": [40_000]},
    ),
    "no reward": (ENCODER, lambda m: m.reward([5]), "/v1/reward", {"prompt_token_ids": [5]}),
    "no plugin": (INFO, lambda m: m.encode({"data": 1}), "/pooling", {"data": 1}),
    "a plugin's data for another task": (
        INFO,
        lambda m: m.encode({"data": 1}, pooling_task="embed"),
        "/pooling",
        {"data": 1, "task": "embed"},
    ),
}


@pytest.mark.parametrize(("info", "offline", "path", "body"), BAD.values(), ids=BAD)
def test_both_faces_refuse_in_the_same_words(
    face: Callable[..., LLM],
    serve: Serve,
    info: ModelInfo,
    offline: Callable[[LLM], Any],
    path: str,
    body: dict[str, Any],
) -> None:
    engine = FakeEngine(info)
    with pytest.raises(CenoteError) as refused:
        offline(face(info, engine))
    answer = serve(engine, info=info).post(path, json=body)
    error = answer.json()["error"]
    assert (error["message"], error["param"], error["code"]) == (
        refused.value.message,
        refused.value.param,
        refused.value.status,
    )
    assert not engine.submitted


class Interrupted(Future[list[Output]]):
    """A future that is interrupted while somebody waits for it."""

    was_cancelled = False

    def done(self) -> bool:
        raise KeyboardInterrupt

    def cancel(self) -> bool:
        self.was_cancelled = True
        return True


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.embed(TEXTS),
        lambda m: m.classify(TEXTS),
        lambda m: m.score("a", TEXTS),
        lambda m: m.rerank("a", TEXTS),
        lambda m: m.token_classify(TEXTS),
        lambda m: m.reward(TEXTS),
    ],
    ids=["embed", "classify", "score", "rerank", "token_classify", "reward"],
)
def test_an_interrupted_request_is_cancelled(
    face: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, ask: Callable[[LLM], Any]
) -> None:
    future = Interrupted()
    engine = FakeEngine(CROSS_ENCODER)
    monkeypatch.setattr(engine, "submit", lambda *_, **__: future)
    with pytest.raises(KeyboardInterrupt):
        ask(face(CROSS_ENCODER, engine))
    assert future.was_cancelled


def test_a_job_is_finished_step_by_step() -> None:
    job = Job([Sequence([5, 6]), Sequence([7])], lambda outputs: [o.data.sum() for o in outputs], is_slow=True)
    longer = job.then(sum).then(str)
    assert (longer.tokens, longer.sequences, longer.is_slow) == (3, job.sequences, True)
    assert longer.finish([Output(np.array([1, 2], np.float32)), Output(np.array([4], np.float32))]) == "7.0"


def test_prompts_may_have_parameters_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    info = replace(INFO, matryoshka=())
    service = Service(FakeEngine(info), Renderer(tokenizer, info), ("fake",))
    params = [PoolingParams(dimensions=2), PoolingParams()]
    job = operations.encode(service, ["a", "b"], "embed", params, PLAIN)
    outputs = service.engine.submit(job.sequences).result()
    assert [output.data.shape for output in job.finish(outputs)] == [(2,), (8,)]
    with pytest.raises(BadRequest, match="dimensions"):
        operations.encode(service, ["a"], "embed", [PoolingParams(dimensions=9)], PLAIN)


def test_results_of_different_salts_are_kept_apart(serve: Serve) -> None:
    engine = FakeEngine(INFO)
    client = serve(CachedEngine(engine, 1 << 20))
    for body in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"}, {}):
        assert client.post("/v1/embeddings", json={"input": [5], **body}).status_code == 200
    assert [sequence.salt for sequence in engine.submitted] == [None, "a", "b"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/embeddings", {"input": "a"}), ("/v2/embed", {"texts": ["a"]}), ("/pooling", {"input": "a"})],
)
def test_a_request_s_priority_reaches_the_engine(serve: Serve, path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine(INFO)
    client = serve(CachedEngine(engine, 1 << 20))
    assert client.post(path, json={**body, "priority": -7}).status_code == 200
    assert [sequence.priority for sequence in engine.submitted] == [-7]
    assert client.post(path, json={**body, "priority": 7}).status_code == 200
    assert len(engine.submitted) == 1, "a priority is not part of what is kept"
