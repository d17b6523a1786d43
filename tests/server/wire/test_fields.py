"""Fields on paths that several dialects share are honoured or refused, and those without effect are told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cenote.server.app import DIALECTS
from cenote.server.table import IDLE, Table, collisions
from cenote.server.unread import BEGIN, END, REFUSED, UNREAD, Unread, section
from tests.conftest import CROSS_ENCODER

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from cenote.server.unread import Refused
    from tests.conftest import Serve

PAGE = (Path(__file__).parents[3] / "docs" / "dialects.md").read_text()
DOCUMENTS = ["water", "deep water", "three more stones"]
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "OpenAI": ("/v1/embeddings", {"input": "a"}),
    "Ollama": ("/api/embed", {"input": "a"}),
    "FastDeploy": ("/v1/reward", {"prompt_token_ids": [5, 6, 7]}),
    "the hub": ("/embed", {"inputs": "a"}),
    "Cohere": ("/v2/rerank", {"query": "a", "documents": DOCUMENTS}),
    "SiliconFlow": ("/v1/rerank", {"query": "a", "documents": DOCUMENTS}),
    "Weaviate": ("/vectors", {"text": "a"}),
    "Qwen": ("/rerank", {"query": "a", "documents": DOCUMENTS}),
    "LiteLLM": ("/v1/embeddings", {"input": "a"}),
}
"""A route of each service, and a body for it."""
ANSWERS = ("data", "embeddings", "results", "vector")
"""Keys of answers with numbers."""


@pytest.fixture
def ranking(serve: Serve) -> TestClient:
    """A server of a reranker, which also embeds."""
    return serve(info=CROSS_ENCODER)


def _numbers(answer: Any) -> Any:
    return [answer.get(key) for key in ANSWERS] if isinstance(answer, dict) else answer


@pytest.mark.parametrize("row", UNREAD, ids=lambda row: row.field)
def test_a_field_without_effect_has_none(ranking: TestClient, row: Unread) -> None:
    places = [place for service, place in PLACES.items() if service in row.clients]
    assert places
    for path, body in places:
        value = row.value
        *outer, name = row.field.split(".")
        added = {outer[0]: {name: value}} if outer else {name: value}
        plain, sent = (ranking.post(path, json=content) for content in (body, body | added))
        assert (plain.status_code, sent.status_code) == (200, 200), sent.text
        assert _numbers(sent.json()) == _numbers(plain.json())


@pytest.mark.parametrize("row", REFUSED.values(), ids=lambda row: row.field)
def test_a_field_that_is_not_served_is_refused(ranking: TestClient, row: Refused) -> None:
    bodies = {
        "/v2/rerank": {"query": "a", "documents": DOCUMENTS},
        "/v1/rerank": {"query": "a", "documents": DOCUMENTS},
        "/pooling": {"input": "a"},
        "/embed": {"inputs": "a"},
    }
    for path, body in bodies.items():
        answer = ranking.post(path, json=body | {row.field: "x"})
        assert answer.status_code == 400
        assert f"got `{row.field}`, a field of {row.clients} that is not served here; leave it out: " in answer.text
        for value in (None, *row.harmless):
            assert ranking.post(path, json=body | {row.field: value}).status_code == 200


def test_the_table_is_current() -> None:
    assert PAGE[PAGE.index(BEGIN) : PAGE.index(END)] in section(), "run: python -m cenote.server.unread"


RERANKS = {
    "jina": ("/rerank", {"documents": DOCUMENTS}, "results"),
    "cohere": ("/v2/rerank", {"documents": DOCUMENTS}, "results"),
    "voyage": ("/voyage/v1/rerank", {"documents": DOCUMENTS}, "data"),
    "mixedbread": ("/v1/reranking", {"input": DOCUMENTS}, "data"),
    "tei": ("/rerank", {"texts": DOCUMENTS}, None),
    "infinity": ("/infinity/rerank", {"documents": DOCUMENTS}, "results"),
    "nim": ("/v1/ranking", {"passages": DOCUMENTS}, "rankings"),
}


def _ranked(client: TestClient, dialect: str, **fields: Any) -> list[dict[str, Any]]:
    path, body, key = RERANKS[dialect]
    answer = client.post(path, json={"query": "a", **body, **fields})
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()[key] if key else answer.json()
    return results


@pytest.mark.parametrize("dialect", RERANKS)
@pytest.mark.parametrize("field", ["top_n", "top_k"])
def test_every_ranking_counts(ranking: TestClient, dialect: str, field: str) -> None:
    everything = _ranked(ranking, dialect)
    assert _ranked(ranking, dialect, **{field: 2}) == everything[:2]
    assert len(everything) == len(DOCUMENTS)


@pytest.mark.parametrize("dialect", sorted(RERANKS.keys() - {"nim"}))
@pytest.mark.parametrize("field", ["return_documents", "return_text", "return_input"])
def test_every_ranking_shows_documents(ranking: TestClient, dialect: str, field: str) -> None:
    for result in _ranked(ranking, dialect, **{field: True}):
        assert DOCUMENTS[result["index"]] in str(result)
    assert not any(text in str(_ranked(ranking, dialect, **{field: False})) for text in DOCUMENTS)


@pytest.mark.parametrize("dialect", RERANKS)
def test_every_ranking_gives_logits(ranking: TestClient, dialect: str) -> None:
    logits = [result["index"] for result in _ranked(ranking, "nim")]
    values = {r["index"]: r["logit"] for r in _ranked(ranking, "nim")}
    results = _ranked(ranking, dialect, raw_scores=True)
    scores = [next(value for key, value in r.items() if key in ("score", "relevance_score", "logit")) for r in results]
    assert [result["index"] for result in results] == logits
    assert scores == pytest.approx([values[index] for index in logits])


SHARED = {
    (method, path, tuple(sorted(entry.route.marks)), name)
    for (method, path), entries in collisions(Table(DIALECTS, ()).routes).items()
    for entry in entries
    for name in entry.strangers
}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/rerank", {"query": "a", "texts": ["a"], "documents": ["b"]}, "documents"),
        ("/v1/reranking", {"query": "a", "input": ["a"], "documents": ["b"]}, "documents"),
        ("/embeddings", {"content": "a", "dimensions": 4}, "dimensions"),
        ("/embeddings", {"content": "a", "input_type": "query"}, "input_type"),
        ("/tokenize", {"prompt": "a", "prompt_name": "query"}, "prompt_name"),
        ("/tokenize", {"content": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/invocations", {"inputs": "a", "input_type": "query"}, "input_type"),
        ("/invocations", {"input": "a", "normalize": False}, "normalize"),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused(
    ranking: TestClient, path: str, body: dict[str, Any], field: str
) -> None:
    answer = ranking.post(path, json=body)
    assert answer.status_code == 400
    assert f"got `{field}`, a field of " in answer.text
    assert ranking.post(path, json=body | {field: None}).status_code == 200


def test_parameters_of_the_hub_are_read_beside_those_of_vertex(serve: Serve) -> None:
    client = serve(info=CROSS_ENCODER)
    plain = client.post("/predict", json={"inputs": "a"})
    assert client.post("/predict", json={"inputs": "a", "parameters": {}}).json() == plain.json()
    raw = client.post("/predict", json={"inputs": "a", "parameters": {"raw_scores": True}})
    assert (raw.status_code, raw.json() == plain.json()) == (200, False)


def test_every_field_of_a_shared_path_is_read_refused_or_idle() -> None:
    for entries in collisions(Table(DIALECTS, ()).routes).values():
        fields = {name for entry in entries for name in entry.fields}
        for entry in entries:
            assert fields == entry.fields.keys() | entry.strangers.keys() | (fields & IDLE)
    assert SHARED
