"""Bodies as Voyage's Python client sends them (every field, also those that are null), and what it reads of answers."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.conftest import CROSS_ENCODER, INFO, classes, expected

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

CLS, SEP, ONE, HELLO = 101, 102, 2028, 7592
LONG = "one " * 90
MATRYOSHKA = replace(INFO, matryoshka=(4, 8))
EMBED: dict[str, Any] = {
    "input": ["hello"],
    "model": "fake",
    "input_type": None,
    "truncation": True,
    "output_dtype": None,
    "output_dimension": None,
    "encoding_format": "base64",
}
RERANK: dict[str, Any] = {
    "query": "one",
    "documents": ["three", "one", "deep water"],
    "model": "fake",
    "top_k": None,
    "truncation": True,
}


def vectors(answer: Any) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] > 0
    return [np.frombuffer(base64.b64decode(d["embedding"]), "<f4").tolist() for d in answer.json()["data"]]


def refused(client: TestClient, body: dict[str, Any]) -> str:
    """The message of a 400, after checking that nothing stands beside it: older clients fail on an `error` object."""
    answer = client.post("/v1/embeddings", json=body)
    assert (answer.status_code, list(answer.json())) == (400, ["detail"])
    return str(answer.json()["detail"])


@pytest.mark.parametrize(
    ("fields", "ids", "dimensions"),
    [
        ({}, [CLS, HELLO, SEP], None),
        ({"output_dimension": 4}, [CLS, HELLO, SEP], 4),
        ({"output_dimension": 4, "dimensions": 4}, [CLS, HELLO, SEP], 4),
        ({"input": [LONG]}, [CLS, *[ONE] * 62, SEP], None),
        ({"input": [LONG], "truncate_prompt_tokens": 5}, [CLS, *[ONE] * 3, SEP], None),
    ],
    ids=str,
)
def test_embed(serve: Serve, fields: dict[str, Any], ids: list[int], dimensions: int | None) -> None:
    answer = serve(info=MATRYOSHKA).post("/v1/embeddings", json=EMBED | fields)
    assert vectors(answer) == [expected(ids, dimensions=dimensions)]


@pytest.mark.parametrize("auto_truncate", [False, True])
def test_what_may_not_be_truncated_is_refused(serve: Serve, auto_truncate: bool) -> None:
    client = serve(auto_truncate=auto_truncate)
    assert "your prompt contains 92 input tokens" in refused(client, EMBED | {"input": [LONG], "truncation": False})
    absent = client.post("/v1/embeddings", json=EMBED | {"input": [LONG], "truncation": None})
    assert absent.status_code == (200 if auto_truncate else 400)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"output_dimension": 4, "dimensions": 8}, "`dimensions` and `output_dimension` are the same"),
        ({"output_dimension": 5}, "only supports Matryoshka dimensions [4, 8], got 5"),
        ({"truncation": False, "truncate_prompt_tokens": 5}, "`truncation` refuses; give one of them"),
    ],
)
def test_refused(serve: Serve, fields: dict[str, Any], words: str) -> None:
    assert words in refused(serve(info=MATRYOSHKA), EMBED | fields)


def test_a_wrong_key_has_a_detail(serve: Serve) -> None:
    answer = serve(api_key=["secret"]).post("/v1/embeddings", json=EMBED)
    assert (answer.status_code, answer.json()["detail"]) == (401, "missing or wrong API key")


@pytest.mark.parametrize(("top_k", "kept"), [(None, 3), (2, 2), (9, 3)])
def test_rerank(serve: Serve, tokenizer: PreTrainedTokenizerBase, top_k: int | None, kept: int) -> None:
    answer = serve(info=CROSS_ENCODER).post("/v1/rerank", json=RERANK | {"top_k": top_k})
    assert answer.status_code == 200, answer.text
    pairs = [tokenizer("one", document)["input_ids"] for document in RERANK["documents"]]
    scores = [classes(ids, CROSS_ENCODER)[0] for ids in pairs]
    best = sorted(range(3), key=lambda i: -scores[i])[:kept]
    got = answer.json()
    assert list(got) == ["object", "data", "model", "usage"]
    assert got["data"] == [{"index": i, "relevance_score": pytest.approx(scores[i])} for i in best]
    assert got["usage"]["total_tokens"] == sum(map(len, pairs))


def test_rerank_returns_documents_as_text(serve: Serve) -> None:
    body = RERANK | {"return_documents": True}
    results = serve(info=CROSS_ENCODER).post("/v1/rerank", json=body).json()["data"]
    assert {r["index"]: r["document"] for r in results} == dict(enumerate(RERANK["documents"]))


def test_rerank_with_both_limits_is_not_in_this_form(serve: Serve) -> None:
    client = serve(info=CROSS_ENCODER)
    answer = client.post("/v1/rerank", json=RERANK | {"top_k": 2, "top_n": 2}).json()
    assert len(answer["results"]) == 2
    refused = client.post("/v1/rerank", json=RERANK | {"top_k": 1, "top_n": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_k")


@pytest.mark.parametrize("truncation", [True, False])
def test_rerank_truncates_as_asked(serve: Serve, truncation: bool) -> None:
    body = RERANK | {"documents": [LONG], "truncation": truncation}
    answer = serve(info=CROSS_ENCODER).post("/v1/rerank", json=body)
    assert answer.status_code == (200 if truncation else 400)
    assert not truncation or answer.json()["usage"]["total_tokens"] == INFO.max_model_len
