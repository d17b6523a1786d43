"""All that leaves is valid JSON of a bounded size, whatever came in; an element at fault is named by its place."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote.core import LateChunkingParams, Output, PoolingParams, Sequence
from cenote.engine.fake import FakeEngine
from cenote.server.wire import sizes
from tests.conftest import CLASSIFIER, CROSS_ENCODER, ENCODER, INFO, JSON

if TYPE_CHECKING:
    import httpx
    from starlette.testclient import TestClient

    from tests.conftest import Serve

LONE = "\ud800"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
SAID = [{"role": "user", "content": "hello"}]


def send(client: TestClient, body: Any, path: str = "/v1/embeddings") -> httpx.Response:
    """Send `body` with escapes for lone surrogates, as any client can."""
    return client.post(path, content=json.dumps(body), headers=JSON)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a", "model": LONE}),
        ("/v1/embeddings", {"input": "a", "chat_template_kwargs": {LONE: 1}, "messages": SAID}),
        ("/v1/embeddings", {"messages": SAID, "chat_template_kwargs": {LONE: LONE}}),
        ("/v1/embeddings", {"messages": SAID, "media_io_kwargs": {LONE: 1}}),
        ("/v1/embeddings", {"input": [{LONE: 1}, 5]}),
        ("/v1/embeddings", {"input": "a", "dimensions": LONE}),
        ("/v1/embeddings", {"input": "a", "input_type": LONE}),
        ("/v1/embeddings", {"input": "a", "request_id": LONE, "user": LONE}),
        ("/v1/embeddings", {"input": "a", "request_id": LONE, "encoding_format": "bytes"}),
        ("/v1/chat/reward", {"messages": SAID, "user": LONE, "model": LONE}),
        ("/v1/chat/reward", {"messages": [5], "user": LONE, "model": LONE}),
        ("/rerank", {"query": "a", "documents": ["b"], "chat_template_kwargs": {LONE: 1}}),
        ("/rerank", {"query": "a", "documents": ["b", LONE]}),
        ("/v2/embed", {"texts": ["a", LONE]}),
        ("/v2/embed", {"texts": ["a"], "input_type": LONE}),
        ("/tokenize", {"prompt": LONE}),
        ("/pooling", {"input": "a", "task": LONE}),
    ],
    ids=str,
)
def test_lone_surrogates_leave_as_question_marks(serve: Serve, path: str, body: Any) -> None:
    answer = send(serve(info=CROSS_ENCODER, chat_template=TEMPLATE), body, path)
    assert answer.status_code in (200, 400, 404), answer.text
    assert LONE not in json.dumps(answer.headers.get("metadata", ""))
    if "json" in answer.headers["content-type"]:
        assert LONE not in json.dumps(json.loads(answer.content.decode()), ensure_ascii=False)


def test_a_surrogate_in_a_key_is_named_in_the_parameter(serve: Serve) -> None:
    body = {"query": "a", "documents": ["b"], "chat_template_kwargs": {f"a{LONE}": 1}}
    answer = send(serve(info=CROSS_ENCODER), body, "/rerank")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "a?")


@pytest.mark.parametrize("levels", [150, 250, 900])
@pytest.mark.parametrize("text", ["a", LONE], ids=["valid", "lone"])
def test_deep_values_are_refused_and_not_walked(serve: Serve, levels: int, text: str) -> None:
    value: Any = text
    for _ in range(levels):
        value = {"a": value}
    answer = send(serve(info=INFO, chat_template=TEMPLATE), {"messages": SAID, "chat_template_kwargs": value})
    if levels > 200:
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == (
            "JSON decode error: lists and objects are nested more than 200 levels deep"
        )
    else:
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": ["a", None]}, "body.input.1"),
        ("/v1/embeddings", {"input": ["a", "b", 5]}, "body.input.2"),
        ("/v1/embeddings", {"input": [1, 2, None]}, "body.input.2"),
        ("/v1/embeddings", {"input": [[1], [2, "x"]]}, "body.input.1.1"),
        ("/v1/embeddings", {"input": [[1], None]}, "body.input.1"),
        ("/v1/embeddings", {"input": [None, "a"]}, "body.input.0"),
        ("/v1/embeddings", {"messages": [*SAID, 4]}, "body.messages.1"),
        ("/v1/embeddings", {"input": 5}, "body.input"),
        ("/classify", {"input": ["a", {}]}, "body.input.1"),
        ("/pooling", {"input": ["a", {}]}, "body.input.1"),
        ("/v1/token_classify", {"input": ["a", None]}, "body.input.1"),
        ("/rerank", {"query": "a", "documents": ["a", None]}, "body.documents.1"),
        ("/score", {"text_1": "a", "text_2": ["a", None]}, "body.text_2.1"),
        ("/v2/embed", {"texts": ["a", None]}, "body.texts.1"),
        ("/v2/embed", {"inputs": [{"content": [{"type": "text", "text": "a"}, 5]}]}, "body.inputs.0.content.1"),
    ],
    ids=str,
)
def test_an_element_at_fault_is_named_by_its_place(serve: Serve, path: str, body: Any, param: str) -> None:
    answer = send(serve(info=CROSS_ENCODER), body, path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    message = answer.json()["error"]["message"]
    places = re.findall(r"'loc': \((.*?)\), 'msg'", message)
    assert {tuple(re.findall(r", (\d+)", place)) for place in places} == {tuple(re.findall(r"\.(\d+)", param))}


def test_names_of_requests_are_repeated_in_part(serve: Serve) -> None:
    long = "x" * 100_000
    client = serve(info=CROSS_ENCODER)
    answer = send(client, {"messages": [5], "user": long, "request_id": long, "model": long}, "/v1/chat/reward")
    assert answer.status_code == 200
    assert len(answer.content) < 3000
    answer = client.post("/v1/embeddings", json={"input": "a"}, headers={"X-Request-Id": "y" * 5000})
    assert answer.json()["id"] == f"embd-{'y' * sizes.LONGEST_ECHO}"
    assert answer.headers["X-Request-Id"] == "y" * sizes.LONGEST_ECHO
    answer = send(client, {"input": "a", "model": long})
    assert (answer.status_code, len(answer.content) < 50_000) == (404, True)


ROWS = {"input": ["one two three"] * 4, "task": "token_embed"}
"""Four matrices of 5 tokens by 8 dimensions: 160 numbers."""


@pytest.mark.parametrize(
    ("path", "fields", "size"),
    [
        ("/pooling", ROWS, 160 * 12),
        ("/pooling", {**ROWS, "encoding_format": "base64"}, 853),
        ("/pooling", {**ROWS, "encoding_format": "bytes_only", "embed_dtype": "float16"}, 320),
        ("/v1/embeddings", {"input": ["a"] * 4}, 4 * 8 * 12),
        ("/v1/embeddings", {"input": ["a"] * 4, "embedding_type": ["int8", "float"]}, 4 * 8 * 16),
        ("/v2/embed", {"texts": ["a"] * 4, "embedding_types": ["float", "ubinary"]}, 4 * 8 * 12.5),
    ],
    ids=str,
)
def test_an_answer_that_is_too_large_is_refused_before_anything_runs(
    serve: Serve, path: str, fields: dict[str, Any], size: float
) -> None:
    client = serve(engine := FakeEngine(ENCODER), max_response_bytes=int(size))
    assert send(client, fields, path).status_code == 200
    count = len(engine.submitted)
    client = serve(engine := FakeEngine(ENCODER), max_response_bytes=int(size) - 1)
    answer = send(client, fields, path)
    assert answer.status_code == 400
    message = answer.json().get("message") or answer.json()["error"]["message"]
    assert f"the answer would have some {size:.0f} bytes, and at most {size - 1:.0f} are allowed" in message
    assert "encoding_format 'base64' or 'bytes_only'" in message
    assert count == 4
    assert not engine.submitted


def test_every_task_of_a_sequence_counts() -> None:
    several = Sequence([1, 2, 3], "embed", also=("token_embed", "sparse"))
    assert sizes.numbers(INFO, [several]) == 8 + 3 * 8, "of weights, the model decides"
    assert sizes.numbers(INFO, [Sequence([1, 2, 3], "sparse", PoolingParams(top_k=5))] * 2) == 2 * 2 * 5
    assert sizes.numbers(INFO, [Sequence([1, 2, 3], "sparse", PoolingParams(top_k=1 << 40))]) == 2 * INFO.vocab_size
    assert sizes.numbers(INFO, [replace(several, also=(), params=PoolingParams(dimensions=4))]) == 4
    chunks = PoolingParams(late_chunking_params=LateChunkingParams(2))
    assert sizes.numbers(INFO, [Sequence([1, 2, 3], "token_embed", chunks)]) == 2 * 8
    assert sizes.numbers(INFO, [Sequence([1, 2, 3], "token_embed", keep=(1,))]) == 8
    assert sizes.numbers(INFO.reported(token_dimension=5), [Sequence([1, 2], "token_embed")]) == 10


class Expanding(FakeEngine):
    """Gives each text seven weights more than it has tokens, as SPLADE does."""

    def _output(self, sequence: Sequence) -> Output:
        count = len(sequence) + 7
        return Output(np.ones(count, np.float32), np.arange(count))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/embed_sparse", {"inputs": ["one two"] * 4}),
        ("/pooling", {"input": ["one two"] * 4, "task": "sparse"}),
    ],
)
def test_sparse_weights_are_counted_when_they_are_there(serve: Serve, path: str, fields: dict[str, Any]) -> None:
    engine = Expanding(replace(INFO, tasks=("sparse",), default_task="sparse", vector_task="sparse"))
    tokens = len(serve(engine).post("/tokenize", json={"prompt": "one two"}).json()["tokens"])
    size = 4 * (tokens + 7) * 2 * 12
    assert send(serve(engine, max_response_bytes=size), fields, path).status_code == 200
    answer = send(serve(engine, max_response_bytes=size - 1), fields, path)
    assert answer.status_code == 400
    assert f"the answer would have {4 * (tokens + 7)} sparse weights, some {size} bytes" in answer.text
    assert "`top_k`" in answer.text
    assert len(engine.submitted) == 8


def test_rows_of_classes_count_too(serve: Serve) -> None:
    info = replace(CLASSIFIER, score_types=())
    fields = {"input": ["one two"] * 2, "task": "token_classify"}
    assert send(serve(info=info, max_response_bytes=2 * 4 * 3 * 12), fields, "/pooling").status_code == 200
    assert send(serve(info=info, max_response_bytes=2 * 4 * 3 * 12 - 1), fields, "/pooling").status_code == 400


def test_scores_are_small_however_many_rows_they_need(serve: Serve) -> None:
    client = serve(info=ENCODER, max_response_bytes=100)
    body = {"query": "a", "documents": ["one two three"] * 50, "score_type": "late-interaction"}
    assert send(client, body, "/rerank").status_code == 200


def test_metadata_that_no_header_takes_is_refused(serve: Serve) -> None:
    client = serve(engine := FakeEngine(ENCODER))
    fields = {"input": ["a"] * 700, "encoding_format": "bytes"}
    answer = send(client, fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "encoding_format"
    assert "ask for the encoding_format 'bytes_only'" in answer.json()["error"]["message"]
    assert not engine.submitted
    assert send(client, {**fields, "encoding_format": "bytes_only"}).status_code == 200
    answer = send(client, {**fields, "input": ["a"] * 500})
    assert answer.status_code == 200
    assert len(answer.headers["metadata"]) < 65_000
