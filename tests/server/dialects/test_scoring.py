"""`/score` and `/rerank`: every spelling and every way to rate a pair; values equal the model's own outputs."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cenote import LLM
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.conventions import PairTemplate
from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from cenote.server.wire import pairs as wire_pairs
from tests import checkpoints
from tests.conftest import CLASSIFIER, CROSS_ENCODER, ENCODER, INFO, classes, error, expected, floats, usage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

SCORE, RERANK = ("/score", "/v1/score"), ("/rerank", "/v1/rerank", "/v2/rerank")
SPELLINGS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
CLS, SEP, ONE, TWO, THREE = 101, 102, 2028, 2048, 2093
QUERY = "one two"
DOCUMENTS = ["three", "the cenote is deep", "one", "water"]


@pytest.fixture
def cross(serve: Serve) -> TestClient:
    return serve(info=CROSS_ENCODER)


@pytest.fixture
def bi(serve: Serve) -> TestClient:
    return serve(info=ENCODER)


@pytest.mark.parametrize("limit", [9, 8])
def test_both_sides_of_a_request_are_one_request(serve: Serve, limit: int) -> None:
    """Queries and documents are rendered apart: `[CLS] one two [SEP]` and `[CLS] one two three [SEP]`."""
    client = serve(info=ENCODER, max_request_tokens=limit)
    answer = client.post("/score", json={"queries": QUERY, "documents": f"{QUERY} three"})
    assert answer.status_code == (200 if limit == 9 else 400)
    if limit == 8:
        assert answer.json()["error"]["message"].startswith("the request has at least 9 tokens to run")


class Pairs:
    """What the fake models say of texts that the tokenizer joins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def ids(self, *texts: str, **options: Any) -> list[int]:
        found: list[int] = self.tokenizer(*([text] for text in texts), **options)["input_ids"][0]
        return found

    def cross(self, query: str, document: str, **params: Any) -> float:
        return classes(self.ids(query, document), CROSS_ENCODER, **params)[0]

    def bi(self, query: str, document: str) -> float:
        return float(np.dot(*(np.asarray(expected(self.ids(text)), np.float64) for text in (query, document))))

    def late(self, query: str, document: str, **params: Any) -> float:
        rows = [np.asarray([expected([i], **params) for i in self.ids(text)]) for text in (query, document)]
        return float((rows[0] @ rows[1].T).max(axis=1).sum())


@pytest.fixture(scope="module")
def pairs(tokenizer: PreTrainedTokenizerBase) -> Pairs:
    return Pairs(tokenizer)


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def scores(client: TestClient, queries: Any, documents: Any, **fields: Any) -> list[float]:
    answer = post(client, "/score", {"queries": queries, "documents": documents, **fields})
    assert [entry["index"] for entry in answer["data"]] == [*range(len(answer["data"]))]
    return [entry["score"] for entry in answer["data"]]


# --- score -------------------------------------------------------------------------------------------------------


UNKNOWN_WAY = "score_type must be one of cross-encoder, bi-encoder, late-interaction, sparse, hybrid, listwise"


@pytest.mark.parametrize("path", SCORE)
@pytest.mark.parametrize("names", SPELLINGS, ids=" and ".join)
def test_spellings_of_the_two_sides(cross: TestClient, pairs: Pairs, names: tuple[str, str], path: str) -> None:
    answer = post(cross, path, dict(zip(names, (QUERY, DOCUMENTS), strict=True)))
    tokens = sum(len(pairs.ids(QUERY, document)) for document in DOCUMENTS)
    assert answer["id"].startswith("score-")
    assert isinstance(answer["created"], int)
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert (answer["object"], answer["model"]) == ("list", "fake")
    assert [floats(entry.pop("score")) for entry in answer["data"]] == [pairs.cross(QUERY, d) for d in DOCUMENTS]
    assert answer["data"] == [{"index": i, "object": "score"} for i in range(4)]
    assert answer["usage"] == usage(tokens)


@pytest.mark.parametrize(
    ("body", "sides"),
    [
        ({"queries": "one", "data_1": "two", "data_2": "three"}, ("two", "three")),
        ({"queries": "one", "documents": "two", "data_1": "three", "data_2": "one"}, ("one", "two")),
        ({"queries": "one", "documents": None, "items": "two"}, ("one", "two")),
        ({"text_1": "one", "text_2": "two", "documents": "three"}, ("one", "two")),
        ({"data_1": "one", "text_1": "three", "text_2": "two"}, ("three", "two")),
    ],
    ids=str,
)
def test_the_first_complete_pair_of_names_counts(
    cross: TestClient, pairs: Pairs, body: dict[str, Any], sides: tuple[str, str]
) -> None:
    (entry,) = post(cross, "/score", body)["data"]
    assert floats(entry["score"]) == pairs.cross(*sides)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": "one"},
        {"documents": "one"},
        {"queries": "one", "data_2": "two"},
        {"text_1": "one", "documents": "two"},
        {"data_1": "one", "items": "two", "text_2": "three"},
        {"queries": None, "documents": ["one"]},
    ],
    ids=str,
)
def test_a_missing_side(cross: TestClient, body: dict[str, Any]) -> None:
    assert error(cross, body, "/score") == {
        "message": "Two sides must be given: `queries` and `documents`, or `queries` and `items`, or `data_1` and "
        "`data_2`, or `text_1` and `text_2`.",
        "type": "Bad Request",
        "param": "queries",
        "code": 400,
    }


@pytest.mark.parametrize(
    ("queries", "documents", "rated"),
    [
        ("one", "two", [("one", "two")]),
        (["one"], "two", [("one", "two")]),
        ("one", ["two", "three"], [("one", "two"), ("one", "three")]),
        (["one"], ["two", "three"], [("one", "two"), ("one", "three")]),
        (["one", "two"], ["two", "one"], [("one", "two"), ("two", "one")]),
        (["one", "one"], ["two", "two"], [("one", "two"), ("one", "two")]),
        ("", [""], [("", "")]),
    ],
    ids=["1:1", "1:1 in a list", "1:N", "1:N in lists", "N:N", "N:N of the same", "empty texts"],
)
@pytest.mark.parametrize("kind", ["cross", "bi", "late"])
def test_which_texts_are_rated_together(
    serve: Serve, pairs: Pairs, kind: str, queries: Any, documents: Any, rated: list[tuple[str, str]]
) -> None:
    got = scores(serve(info=CROSS_ENCODER), queries, documents, score_type=kind)
    np.testing.assert_allclose(got, [getattr(pairs, kind)(*pair) for pair in rated], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", [SCORE[0], RERANK[0]])
@pytest.mark.parametrize(
    "document",
    [
        "one two",
        {"text": "one two"},
        {"type": "text", "text": "one two"},
        {"content": "one two"},
        {"content": [{"type": "text", "text": "one two"}]},
        {"content": [{"text": "one"}, {"type": "text", "text": "two"}]},
    ],
    ids=str,
)
def test_forms_of_a_text(cross: TestClient, pairs: Pairs, path: str, document: Any) -> None:
    """Parts are joined by line breaks, which this tokenizer takes for blanks."""
    query = "query" if path == "/rerank" else "queries"
    for one, several in ((document, [document]), ({"content": [{"type": "text", "text": "one two"}]}, [document] * 2)):
        answer = post(cross, path, {query: one, "documents": several})
        values = [entry.get("score", entry.get("relevance_score")) for entry in answer["data"]]
        assert floats(values) == [pairs.cross("one two", "one two")] * len(several)


MEDIA = "MultiModalParam is not supported for FakeModel: only parts of type 'text' are"
NO_TEXT = "got an object with the keys {}; expected a text, or an object with one under `text`"


@pytest.mark.parametrize("path", [SCORE[0], RERANK[0]])
@pytest.mark.parametrize(
    "item",
    [
        {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
        {"content": [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]},
        {"content": []},
        {"content": None},
        {"content": 5},
        {"content": [5]},
        {"content": [{"type": "text", "text": 5}]},
        {"text": None},
        {},
        {"image": "x"},
    ],
    ids=str,
)
def test_what_is_no_text_is_refused(cross: TestClient, path: str, item: Any) -> None:
    query = "query" if path == "/rerank" else "queries"
    for side, body in (
        (query, {query: item, "documents": "one"}),
        ("documents", {query: "one", "documents": ["two", item]}),
    ):
        found = error(cross, body, path)
        assert found["message"].startswith(
            MEDIA if item.keys() & {"content", "image"} else NO_TEXT.format(sorted(item))
        )
        assert (found["type"], found["code"]) == ("BadRequestError", 400)
        assert found["param"] == ("content" if "content" in item else side)


UNEQUAL = ("Input lengths must be either 1:1, 1:N or N:N", "documents")
NO_QUERY = ("At least one text element must be given", "queries")
NO_DOCUMENT = ("At least one text_pair element must be given", "documents")
NO_TEMPLATE = "fake joins query and document without a template, so {} would have no effect; start with --chat-template"


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"queries": ["one", "two"]}, *UNEQUAL),
        ({"queries": ["one"] * 4}, *UNEQUAL),
        ({"queries": ["one", "two"], "documents": "three"}, *UNEQUAL),
        ({"queries": []}, *NO_QUERY),
        ({"queries": [], "documents": []}, *NO_QUERY),
        ({"documents": []}, *NO_DOCUMENT),
        ({"max_tokens_per_query": -1}, "max_tokens_per_query must be a non-negative integer", "max_tokens_per_query"),
        ({"max_tokens_per_doc": -7}, "max_tokens_per_doc must be a non-negative integer", "max_tokens_per_doc"),
        (
            {"max_tokens_per_query": 64},
            "max_tokens_per_query (64) must be less than max_model_len (64).",
            "max_tokens_per_query",
        ),
        (
            {"max_tokens_per_doc": 1000},
            "max_tokens_per_doc (1000) must be less than max_model_len (64).",
            "max_tokens_per_doc",
        ),
        (
            {"score_type": "dot"},
            f"{UNKNOWN_WAY}, got 'dot'",
            "score_type",
        ),
        (
            {"score_type": ""},
            f"{UNKNOWN_WAY}, got ''",
            "score_type",
        ),
        ({"instruction": "find"}, NO_TEMPLATE.format("instruction"), "instruction"),
        ({"instruct": "find"}, NO_TEMPLATE.format("instruction"), "instruct"),
        ({"chat_template_kwargs": {"b": 1, "a": 2}}, NO_TEMPLATE.format("a, b"), "a"),
        (
            {"chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs may not set 'chat_template'",
            "chat_template_kwargs",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs may not set 'tools'", "chat_template_kwargs"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs may not set 'tokenize'",
            "chat_template_kwargs",
        ),
        (
            {"mm_processor_kwargs": {"a": 1}},
            "`mm_processor_kwargs` is not accepted from requests",
            "mm_processor_kwargs",
        ),
        (
            {"truncate_prompt_tokens": 65},
            "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
            "truncate_prompt_tokens",
        ),
        (
            {"documents": "three " * 60},
            "This model's maximum context length is 64 tokens. However, your prompt contains 65 input tokens, which "
            "exceeds this limit even without any output tokens.",
            "input_tokens",
        ),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_refused_by_meaning(cross: TestClient, fields: dict[str, Any], message: str, param: str) -> None:
    found = error(cross, {"queries": QUERY, "documents": ["one", "two", "three"], **fields}, "/score")
    assert found["message"].startswith(message)
    assert (found["type"], found["param"], found["code"]) == ("BadRequestError", param, 400)


@pytest.mark.parametrize(
    ("path", "fields", "kind", "param"),
    [
        ("/score", {"documents": [5]}, "string_type", "body.documents.0"),
        ("/score", {"documents": 5}, "string_type", "body.documents"),
        ("/score", {"max_tokens_per_query": []}, "int_type", "body.max_tokens_per_query"),
        ("/score", {"max_tokens_per_doc": "x"}, "int_parsing", "body.max_tokens_per_doc"),
        ("/score", {"use_activation": "maybe"}, "bool_parsing", "body.use_activation"),
        ("/score", {"chat_template_kwargs": []}, "dict_type", "body.chat_template_kwargs"),
        ("/score", {"truncate_prompt_tokens": -2}, "greater_than_equal", "body.truncate_prompt_tokens"),
        ("/rerank", {"query": ["one"]}, "string_type", "body.query"),
        ("/rerank", {"query": None}, "missing", "body.query"),
        ("/rerank", {"documents": None}, "missing", "body.documents"),
        ("/rerank", {"top_n": -1}, "greater_than_equal", "body.top_n"),
        ("/rerank", {"top_n": 1.5}, "int_from_float", "body.top_n"),
        ("/rerank", {"top_n": "all"}, "int_parsing", "body.top_n"),
    ],
    ids=str,
)
def test_refused_by_type(cross: TestClient, path: str, fields: dict[str, Any], kind: str, param: str) -> None:
    query = "query" if path == "/rerank" else "queries"
    found = error(cross, {query: "one", "documents": ["two"], **fields}, path)
    assert f"'type': '{kind}'" in found["message"]
    assert (found["type"], found["param"], found["code"]) == ("Bad Request", param, 400)


@pytest.mark.parametrize("missing", ["query", "documents"])
def test_rerank_needs_both_sides(cross: TestClient, missing: str) -> None:
    body = {"query": "one", "documents": ["two"]}
    del body[missing]  # type: ignore[arg-type]
    found = error(cross, body, "/rerank")
    assert "'type': 'missing'" in found["message"]
    assert (found["param"], found["code"]) == (f"body.{missing}", 400)


@pytest.mark.parametrize("old", ["normalize", "softmax", "activation"])
@pytest.mark.parametrize("path", [SCORE[0], RERANK[0]])
def test_older_names_of_use_activation(cross: TestClient, path: str, old: str) -> None:
    found = error(cross, {"queries": "one", "query": "one", "documents": "two", old: True}, path)
    assert found["message"] == f"Parameter `{old}` was removed; use `use_activation` instead."
    assert found["param"] == old


def test_too_many_pairs(serve: Serve) -> None:
    engine = FakeEngine(CROSS_ENCODER)
    client = serve(engine, max_client_batch_size=3)
    for path, query in (("/score", "queries"), ("/rerank", "query")):
        for document in ("two", {"text": "two"}):
            found = error(client, {query: "one", "documents": [document] * 4}, path)
            assert found["message"] == "the request has 4 inputs; at most 3 are allowed"
            assert found["param"] == "documents"
    assert not engine.submitted
    assert len(scores(client, "one", ["two"] * 3)) == 3


def test_objects_are_read_on_the_render_threads_once_they_are_counted(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    read = wire_pairs._content

    def watched(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*args, **options)

    monkeypatch.setattr(wire_pairs, "_content", watched)
    client = serve(info=CROSS_ENCODER, max_client_batch_size=2)
    for path, query in (("/score", "queries"), ("/rerank", "query")):
        assert error(client, {query: "one", "documents": [{"text": "two"}] * 3}, path)["param"] == "documents"
        assert threads == []
        assert post(client, path, {query: "one", "documents": [{"text": "two"}] * 2})
        assert {name.rpartition("_")[0] for name in threads} == {"cenote-render"}
        assert len(threads) == 3
        threads.clear()


# --- what is run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "ids", "second"),
    [
        ({}, [CLS, ONE, TWO, SEP, THREE, THREE, THREE, SEP], 4),
        ({"max_tokens_per_query": 1}, [CLS, ONE, SEP, THREE, THREE, THREE, SEP], 3),
        ({"max_tokens_per_doc": 1}, [CLS, ONE, TWO, SEP, THREE, SEP], 4),
        ({"max_tokens_per_query": 1, "max_tokens_per_doc": 2}, [CLS, ONE, SEP, THREE, THREE, SEP], 3),
        ({"max_tokens_per_query": 63, "max_tokens_per_doc": 0}, [CLS, ONE, TWO, SEP, THREE, THREE, THREE, SEP], 4),
        ({"truncate_prompt_tokens": 7}, [CLS, ONE, TWO, SEP, THREE, THREE, SEP], 4),
        ({"truncate_prompt_tokens": 5}, [CLS, ONE, SEP, THREE, SEP], 3),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, [THREE, THREE, SEP], 0),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, [CLS, ONE, TWO, SEP, THREE], 4),
    ],
    ids=str,
)
def test_pairs_are_joined_and_cut(serve: Serve, fields: dict[str, Any], ids: list[int], second: int) -> None:
    """The document's tokens, its separator included, are of type 1."""
    engine = FakeEngine(CROSS_ENCODER)
    client = serve(engine)
    (got,) = scores(client, QUERY, "three three three", **fields)
    assert floats(got) == classes(ids, CROSS_ENCODER)[0]
    (sequence,) = engine.submitted
    assert list(sequence.ids) == ids
    assert list(sequence.type_ids or []) == [0] * second + [1] * (len(ids) - second)
    assert sequence.task == "classify"
    assert post(client, "/score", {"data_1": QUERY, "data_2": "three three three", **fields})["usage"][
        "prompt_tokens"
    ] == len(ids)


@pytest.mark.parametrize(("kind", "task"), [("bi", "embed"), ("late", "token_embed")])
@pytest.mark.parametrize(
    ("fields", "query", "document"),
    [
        ({}, [CLS, ONE, TWO, SEP], [CLS, THREE, THREE, THREE, SEP]),
        ({"max_tokens_per_query": 1, "max_tokens_per_doc": 2}, [CLS, ONE, SEP], [CLS, THREE, THREE, SEP]),
        ({"truncate_prompt_tokens": 4}, [CLS, ONE, TWO, SEP], [CLS, THREE, THREE, SEP]),
    ],
    ids=str,
)
def test_a_query_is_encoded_and_counted_once(
    serve: Serve, kind: str, task: str, fields: dict[str, Any], query: list[int], document: list[int]
) -> None:
    engine = FakeEngine(ENCODER)
    client = serve(engine)
    body = {"queries": QUERY, "documents": ["three three three"] * 3, "score_type": kind, **fields}
    usage = post(client, "/score", body)["usage"]
    assert [list(sequence.ids) for sequence in engine.submitted] == [query, document, document, document]
    assert {sequence.task for sequence in engine.submitted} == {task}
    assert usage["prompt_tokens"] == usage["total_tokens"] == len(query) + 3 * len(document)


def test_several_queries_are_all_counted(bi: TestClient) -> None:
    usage = post(bi, "/score", {"queries": ["one", "one two"], "documents": ["one", "one"]})["usage"]
    assert usage["prompt_tokens"] == 3 + 4 + 3 + 3


TYPES = ("cross-encoder", "bi-encoder", "late-interaction")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        *((kind, kind) for kind in TYPES),
        *((kind.partition("-")[0], kind) for kind in TYPES),
        ("Cross_Encoder", TYPES[0]),
        ("LATE", TYPES[2]),
        (None, TYPES[0]),
    ],
)
def test_ways_to_score(cross: TestClient, pairs: Pairs, asked: str | None, meant: str) -> None:
    rate = getattr(pairs, meant.partition("-")[0])
    got = scores(cross, QUERY, DOCUMENTS, score_type=asked)
    np.testing.assert_allclose(got, [rate(QUERY, document) for document in DOCUMENTS], rtol=0, atol=1e-6)


def test_the_ways_differ(pairs: Pairs) -> None:
    """So that no test above passes by scoring in another way."""
    rated = [[rate(QUERY, d) for d in DOCUMENTS] for rate in (pairs.cross, pairs.bi, pairs.late)]
    assert all(np.abs(np.subtract(a, b)).min() > 1e-3 for a, b in itertools.combinations(rated, 2))


def test_the_default_of_an_encoder_is_its_first_way(serve: Serve, bi: TestClient, pairs: Pairs) -> None:
    np.testing.assert_allclose(scores(bi, QUERY, "one"), [pairs.bi(QUERY, "one")], rtol=0, atol=1e-6)
    late = serve(info=replace(ENCODER, score_types=("late-interaction",)))
    np.testing.assert_allclose(scores(late, QUERY, "one"), [pairs.late(QUERY, "one")], rtol=0, atol=1e-6)


def test_a_way_that_the_model_has_not(bi: TestClient) -> None:
    assert error(bi, {"queries": "one", "documents": "two", "score_type": "cross"}, "/score") == {
        "message": "fake cannot score as a cross-encoder; it offers bi-encoder, late-interaction",
        "type": "BadRequestError",
        "param": "score_type",
        "code": 400,
    }


@pytest.mark.parametrize("kind", TYPES)
def test_limits_are_checked_for_every_way(cross: TestClient, kind: str) -> None:
    for limit, message in (
        (-1, "max_tokens_per_doc must be a non-negative integer"),
        (64, "max_tokens_per_doc (64) must be less than max_model_len (64)."),
    ):
        body = {"queries": "one", "documents": "two", "score_type": kind, "max_tokens_per_doc": limit}
        assert error(cross, body, "/score")["message"] == message


@pytest.mark.parametrize("asked", [None, True, False])
def test_use_activation(cross: TestClient, pairs: Pairs, asked: bool | None) -> None:
    got = scores(cross, QUERY, DOCUMENTS, use_activation=asked)
    logits = [pairs.cross(QUERY, document, use_activation=False) for document in DOCUMENTS]
    wanted = logits if asked is False else [1 / (1 + np.exp(-logit)) for logit in logits]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
    assert min(logits) < 0 < max(logits)


def test_late_interaction_without_normalisation(bi: TestClient, pairs: Pairs) -> None:
    got = scores(bi, QUERY, DOCUMENTS, score_type="late", use_activation=False)
    wanted = [pairs.late(QUERY, document, use_activation=False) for document in DOCUMENTS]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


# --- templates ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ instruction or 'judge' }}{{ tone }} {% for m in messages %}{% if m.role == 'query' %}"
    "{{ m.content }}{% else %} is {{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "judge one two is three"),
        ({"instruction": "find"}, "find one two is three"),
        ({"instruct": "find"}, "find one two is three"),
        ({"chat_template_kwargs": {"tone": "!"}}, "judge! one two is three"),
        ({"instruction": "find", "chat_template_kwargs": {"tone": "!"}}, "find! one two is three"),
        ({"instruction": "find", "chat_template_kwargs": {"instruction": "rate"}}, "rate one two is three"),
        ({"max_tokens_per_query": 1}, "judge one is three"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [SCORE[0], RERANK[0]])
def test_the_pair_template_and_its_variables(
    serve: Serve, pairs: Pairs, path: str, fields: dict[str, Any], text: str
) -> None:
    client = serve(info=CROSS_ENCODER, pair_template=PairTemplate(TEMPLATE))
    query = "query" if path == "/rerank" else "queries"
    answer = post(client, path, {query: QUERY, "documents": "three", **fields})
    value = answer["data"][0]["score"] if path == "/score" else answer["results"][0]["relevance_score"]
    assert floats(value) == classes(pairs.ids(text), CROSS_ENCODER)[0]
    assert answer["usage"]["prompt_tokens"] == len(pairs.ids(text))


def test_a_template_has_its_own_variables_and_special_tokens(serve: Serve, pairs: Pairs) -> None:
    own = PairTemplate(TEMPLATE, {"instruction": "own"}, add_special_tokens=False)
    client = serve(info=CROSS_ENCODER, pair_template=own)
    for fields, text in (({}, "own one is two"), ({"instruction": "find"}, "find one is two")):
        ids = pairs.ids(text, add_special_tokens=False)
        assert floats(scores(client, "one", "two", **fields)) == classes(ids, CROSS_ENCODER)


def test_a_document_is_cut_where_a_rendered_pair_is_too_long(serve: Serve, pairs: Pairs) -> None:
    client = serve(info=CROSS_ENCODER, pair_template=PairTemplate(TEMPLATE + " end"))
    (got,) = scores(client, QUERY, "three " * 90, truncate_prompt_tokens=12)
    ids = pairs.ids("judge one two is three three three three three end")
    assert len(ids) == 12
    assert floats(got) == classes(ids, CROSS_ENCODER)[0]


def test_a_template_that_refuses(serve: Serve) -> None:
    client = serve(info=CROSS_ENCODER, pair_template=PairTemplate("{{ raise_exception('no') }}"))
    found = error(client, {"queries": "one", "documents": "two"}, "/score")
    assert found["message"] == "the chat template refuses these messages: no"


@pytest.mark.parametrize(("kind", "name"), [("bi", "bi-encoder"), ("late", "late-interaction")])
def test_a_template_is_for_cross_encoders(serve: Serve, kind: str, name: str) -> None:
    client = serve(info=CROSS_ENCODER, pair_template=PairTemplate(TEMPLATE))
    found = error(client, {"queries": "one", "documents": "two", "score_type": kind, "instruction": "find"}, "/score")
    assert found["message"] == (f"fake scores as a {name}, which renders no pairs: instruction would have no effect")
    assert found["param"] == "instruction"


# --- rerank ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RERANK[:2])
def test_rerank(cross: TestClient, pairs: Pairs, path: str) -> None:
    answer = post(cross, path, {"query": QUERY, "documents": DOCUMENTS})
    rated = sorted(((pairs.cross(QUERY, d), i) for i, d in enumerate(DOCUMENTS)), reverse=True)
    tokens = sum(len(pairs.ids(QUERY, document)) for document in DOCUMENTS)
    assert answer["id"].startswith("score-")
    assert list(answer) == ["id", "object", "model", "usage", "meta", "results", "data"]
    assert answer["data"] == answer["results"], "for clients of Voyage and Pinecone"
    assert answer["meta"]["tokens"] == {"input_tokens": tokens, "output_tokens": 0}
    assert answer["meta"]["billed_units"] == {"search_units": 1}
    assert answer["model"] == "fake"
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [entry["index"] for entry in answer["results"]] == [i for _, i in rated] != [0, 1, 2, 3]
    assert [floats(entry["relevance_score"]) for entry in answer["results"]] == [score for score, _ in rated]
    assert [{k: v for k, v in entry.items() if k != "relevance_score"} for entry in answer["results"]] == [
        {"index": i, "document": {"text": DOCUMENTS[i], "multi_modal": None}} for _, i in rated
    ]


def order(client: TestClient, **fields: Any) -> list[int]:
    results = post(client, "/rerank", {"query": QUERY, "documents": DOCUMENTS, **fields})["results"]
    return [entry["index"] for entry in results]


@pytest.mark.parametrize(("top_n", "kept"), [(0, 4), (None, 4), (1, 1), (3, 3), (4, 4), (5, 4), (10**9, 4)], ids=str)
def test_top_n(cross: TestClient, top_n: int | None, kept: int) -> None:
    assert order(cross, top_n=top_n) == order(cross)[:kept]


def test_equal_scores_keep_their_order(cross: TestClient, pairs: Pairs) -> None:
    documents = ["one", "water"] * 30
    best = 0 if pairs.cross(QUERY, "one") > pairs.cross(QUERY, "water") else 1
    ranked = [*range(best, 60, 2), *range(1 - best, 60, 2)]
    assert order(cross, documents=documents) == ranked
    assert order(cross, documents=documents, top_n=32) == ranked[:32]


@pytest.mark.parametrize(("asked", "shown"), [(None, True), (True, True), (False, False)])
def test_return_documents(cross: TestClient, asked: bool | None, shown: bool) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS, "return_documents": asked}
    for entry in post(cross, "/rerank", body)["results"]:
        assert list(entry) == (["index", "document", "relevance_score"] if shown else ["index", "relevance_score"])


@pytest.mark.parametrize(
    "document", [{"text": "one"}, {"content": [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]}], ids=str
)
def test_documents_are_echoed_as_text(cross: TestClient, document: dict[str, Any]) -> None:
    (entry,) = post(cross, "/rerank", {"query": QUERY, "documents": document})["results"]
    assert entry["document"] == {"text": document.get("text", "on\ne"), "multi_modal": None}


@pytest.mark.parametrize("kind", TYPES)
def test_rerank_is_score_sorted(cross: TestClient, kind: str) -> None:
    fields = {"score_type": kind, "max_tokens_per_doc": 3}
    plain = scores(cross, QUERY, DOCUMENTS, **fields)
    answer = post(cross, "/rerank", {"query": QUERY, "documents": DOCUMENTS, **fields})
    assert order(cross, **fields) == sorted(range(4), key=lambda i: -plain[i])
    assert [entry["relevance_score"] for entry in answer["results"]] == sorted(plain, reverse=True)
    usage = post(cross, "/score", {"queries": QUERY, "documents": DOCUMENTS, **fields})["usage"]
    assert answer["usage"]["prompt_tokens"] == usage["prompt_tokens"]


def test_rerank_without_documents(cross: TestClient) -> None:
    found = error(cross, {"query": "one", "documents": []}, "/rerank")
    assert (found["message"], found["param"]) == NO_DOCUMENT


@pytest.mark.parametrize(("header", "field", "want"), [("h", "b", "h"), (None, "b", "b")])
@pytest.mark.parametrize("path", [SCORE[0], RERANK[0]])
def test_request_id_and_model_are_echoed(serve: Serve, path: str, header: str | None, field: str, want: str) -> None:
    client = serve(info=CROSS_ENCODER, names=("first", "second"))
    body = {
        "queries": "a",
        "query": "a",
        "documents": "b",
        "request_id": field,
        "model": "second",
        "user": "u",
        "new": 1,
    }
    answer = client.post(path, json=body, headers={"X-Request-Id": header} if header else {}).json()
    assert (answer["id"], answer["model"]) == (f"score-{want}", "second")


# --- models that do not score ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*SCORE, *RERANK])
@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            CLASSIFIER,
            "Scoring API is only enabled for num_labels == 1. fake has 3 labels; classify gives the value of each",
        ),
        (INFO, "This model does not support the Scoring API. It offers: embed, token_embed"),
        (
            replace(CLASSIFIER, tasks=("token_classify", "embed")),
            "This model does not support the Scoring API. It offers: token_classify, embed",
        ),
    ],
    ids=["three labels", "nothing to score by", "labels of tokens"],
)
def test_a_model_that_does_not_score_answers_like_a_missing_route(
    serve: Serve, path: str, info: Any, message: str
) -> None:
    answer = serve(info=info).post(path, json={"queries": "a", "query": "a", "documents": ["b"]})
    assert answer.status_code == 404
    assert answer.json()["error"] == {"message": message, "type": "NotFoundError", "param": None, "code": 404}
    assert answer.json()["detail"] == message


@pytest.mark.parametrize("path", [*SCORE, *RERANK])
def test_a_model_that_is_not_there(cross: TestClient, path: str) -> None:
    found = error(cross, {"queries": "a", "query": "a", "documents": ["b"], "model": "other"}, path)
    assert (found["message"], found["code"]) == ("The model `other` does not exist.", 404)


# --- a real model ------------------------------------------------------------------------------------------------

TEXTS = ["natural pits", "the quick brown fox jumps over the lazy dog.", "water", "MIXED case and UPPER CASE", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.classifier(tmp_path_factory.mktemp("reranker"), num_labels=1)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    service = Service.open(ModelConfig(model=str(folder)), EngineConfig())
    with TestClient(build([service], ServerConfig())) as made:
        yield made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """Scores of a query with `TEXTS`, of each kind, by Transformers' model one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = torch.cat([model(**tokenizer(QUERY, t, return_tensors="pt")).logits[0] for t in TEXTS])
        states = [model.bert(**tokenizer(t, return_tensors="pt")).last_hidden_state[0] for t in (QUERY, *TEXTS)]
        query, *rows = (torch.nn.functional.normalize(s, dim=-1) for s in states)
    return {
        "logits": logits.tolist(),
        "cross-encoder": logits.sigmoid().tolist(),
        "bi-encoder": [float(query[0] @ row[0]) for row in rows],
        "late-interaction": [float((query @ row.T).max(dim=1).values.sum()) for row in rows],
    }


@pytest.mark.parametrize("kind", TYPES)
def test_scores_are_those_of_transformers_and_of_llm(
    client: TestClient, llm: LLM, reference: dict[str, list[float]], kind: str
) -> None:
    got = scores(client, QUERY, TEXTS, score_type=kind)
    own = [output.outputs.score for output in llm.score(QUERY, TEXTS, score_type=kind, use_tqdm=False)]
    np.testing.assert_allclose(got, reference[kind], rtol=0, atol=2e-5)
    np.testing.assert_allclose(got, own, rtol=0, atol=1e-6)
    assert np.ptp(got) > 1e-2, "all documents score nearly the same: this proves nothing"


def test_logits(client: TestClient, reference: dict[str, list[float]]) -> None:
    np.testing.assert_allclose(
        scores(client, QUERY, TEXTS, use_activation=False), reference["logits"], rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("kind", TYPES)
def test_ranks_are_those_of_llm(client: TestClient, llm: LLM, reference: dict[str, list[float]], kind: str) -> None:
    answer = post(client, "/v1/rerank", {"query": QUERY, "documents": TEXTS, "top_n": 3, "score_type": kind})
    own = llm.rerank(QUERY, TEXTS, top_n=3, score_type=kind, use_tqdm=False)
    got = [(entry["index"], entry["document"]["text"]) for entry in answer["results"]]
    assert got == [(one.index, one.document) for one in own]
    assert [i for i, _ in got] == sorted(range(5), key=lambda i: -reference[kind][i])[:3]


def test_limits_are_those_of_llm(client: TestClient, llm: LLM) -> None:
    limits = {"max_tokens_per_query": 1, "max_tokens_per_doc": 2}
    own = [output.outputs.score for output in llm.score(QUERY, TEXTS, use_tqdm=False, **limits)]
    got = scores(client, QUERY, TEXTS, **limits)
    np.testing.assert_allclose(got, own, rtol=0, atol=1e-6)
    assert np.abs(np.subtract(got, scores(client, QUERY, TEXTS)))[1] > 1e-4
