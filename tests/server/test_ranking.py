"""Rerank in the forms of several services on shared paths, and lengths that are their vendor's, not the model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import CROSS_ENCODER, classes, error

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

LONG = "one " * 90
BOOKS = [{"title": "three", "body": "deep"}, {"title": "one", "body": "water"}]


@pytest.fixture(scope="module")
def client(serve_all: Serve) -> TestClient:
    return serve_all(info=CROSS_ENCODER)


def post(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json={"query": "one", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def score(tokenizer: PreTrainedTokenizerBase, document: str) -> Any:
    return pytest.approx(classes(tokenizer("one", document)["input_ids"], CROSS_ENCODER)[0], abs=1e-6)


def test_cohere_reads_no_documents_unless_it_asks(client: TestClient, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = post(client, "/v2/rerank", documents=["two", "three four"], max_tokens_per_doc=4096)
    assert {r["index"]: r["relevance_score"] for r in answer["results"]} == {
        0: score(tokenizer, "two"),
        1: score(tokenizer, "three four"),
    }
    assert all(r.keys() == {"index", "relevance_score"} for r in answer["results"])
    assert answer["meta"]["api_version"] == {"version": "2"}
    assert answer["meta"]["billed_units"] == {"search_units": 1}
    asked = post(client, "/v2/rerank", documents=["two"], return_documents=True)
    assert asked["results"][0]["document"] == {"text": "two"}
    assert post(client, "/v2/rerank", documents=["two"] * 101)["meta"]["billed_units"] == {"search_units": 2}


@pytest.mark.parametrize("path", ["/v1/rerank", "/cohere/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("fields", [["title"], ["body", "title"]])
def test_rank_fields_are_what_is_rated(
    client: TestClient, tokenizer: PreTrainedTokenizerBase, path: str, fields: list[str]
) -> None:
    answer = post(client, path, documents=BOOKS, rank_fields=fields, return_documents=True)
    for result in answer["results"]:
        book = BOOKS[result["index"]]
        assert result["document"] == book
        assert result["relevance_score"] == score(tokenizer, "\n".join(book[field] for field in fields))


def test_an_object_without_a_text_is_told_what_it_needs(client: TestClient) -> None:
    found = error(client, {"query": "one", "documents": BOOKS}, "/v2/rerank")
    assert found["message"] == (
        "got an object with the keys ['body', 'title']; expected a text, or an object with one under `text` "
        "(Cohere's `rank_fields` names others)"
    )


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/voyage/v1/rerank"])
@pytest.mark.parametrize(
    "fields", [{}, {"max_tokens_per_doc": 4096}, {"max_tokens_per_query": 64}, {"truncate": True}, {"truncate": "END"}]
)
def test_documents_are_cut(client: TestClient, path: str, fields: dict[str, Any]) -> None:
    answer = post(client, path, documents=[LONG, "two"], **fields)
    assert answer["usage"]["total_tokens"] == CROSS_ENCODER.max_model_len + 5


@pytest.mark.parametrize("refusal", [{"truncate": False}, {"truncate": "NONE"}])
def test_or_refused_on_request(client: TestClient, refusal: dict[str, Any]) -> None:
    found = error(client, {"query": "one", "documents": [LONG], **refusal}, "/rerank")
    assert "maximum context length is 64 tokens" in found["message"]
    found = error(client, {"queries": "one", "documents": [LONG]}, "/score")
    assert "maximum context length is 64 tokens" in found["message"]
    found = error(client, {"queries": "one", "documents": ["two"], "max_tokens_per_doc": 4096}, "/score")
    assert found["param"] == "max_tokens_per_doc"


@pytest.mark.parametrize(
    ("limit", "keys"),
    [({}, {"results", "data"}), ({"top_n": 1}, {"results"}), ({"top_k": 1}, {"results", "data"})],
    ids=["neither", "top_n", "top_k"],
)
def test_results_stand_twice_where_no_number_is_named(
    client: TestClient, limit: dict[str, int], keys: set[str]
) -> None:
    """Voyage's JavaScript client and Pinecone's read `data`, and send nothing that tells them apart."""
    assert {"results", "data"} & post(client, "/v1/rerank", documents=["two", "three"], **limit).keys() == keys
