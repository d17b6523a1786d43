"""NVIDIA's dialect: bodies as its clients send them, and the logits that they read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cenote.engine.fake import FakeEngine
from tests.conftest import CROSS_ENCODER, ENCODER, INFO, classes, error, expected, floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

PASSAGES = ["three", "one", "deep water"]
BODY: dict[str, Any] = {
    "model": "fake",
    "query": {"text": "one"},
    "passages": [{"text": text} for text in PASSAGES],
    "truncate": "END",
}


@pytest.mark.parametrize("path", ["/v1/ranking", "/v1/retrieval/fake/reranking", "/nim/ranking"])
@pytest.mark.parametrize(("top_k", "kept"), [(None, 3), (2, 2)])
def test_ranking(serve: Serve, tokenizer: PreTrainedTokenizerBase, path: str, top_k: int | None, kept: int) -> None:
    answer = serve(info=CROSS_ENCODER).post(path, json=BODY | {"top_k": top_k})
    assert answer.status_code == 200, answer.text
    pairs = [tokenizer("one", text)["input_ids"] for text in PASSAGES]
    logits = [classes(ids, CROSS_ENCODER, use_activation=False)[0] for ids in pairs]
    best = sorted(range(3), key=lambda i: -logits[i])[:kept]
    assert answer.json() == {
        "rankings": [{"index": i, "logit": pytest.approx(logits[i])} for i in best],
        "usage": {"prompt_tokens": sum(map(len, pairs)), "total_tokens": sum(map(len, pairs))},
    }


def test_a_model_that_compares_vectors_has_no_logits(serve: Serve) -> None:
    client = serve(info=ENCODER)
    results = client.post("/rerank", json={"query": "one", "documents": PASSAGES}).json()["results"]
    rankings = client.post("/v1/ranking", json=BODY).json()["rankings"]
    assert [r["logit"] for r in rankings] == [r["relevance_score"] for r in results]


def test_truncation(serve: Serve) -> None:
    client = serve(info=CROSS_ENCODER)
    body = BODY | {"passages": [{"text": "one " * 90}]}
    assert client.post("/v1/ranking", json=body).json()["usage"]["total_tokens"] == INFO.max_model_len
    assert "maximum context length" in error(client, body | {"truncate": "NONE"}, "/v1/ranking")["message"]


def test_embeddings(serve: Serve) -> None:
    body = {"model": "fake", "input": ["one"], "input_type": "passage", "truncate": "END", "encoding_format": "float"}
    (entry,) = serve(info=replace(INFO)).post("/v1/embeddings", json=body).json()["data"]
    assert floats(entry["embedding"]) == expected([101, 2028, 102])


def test_health(serve: Serve) -> None:
    client = serve(FakeEngine(INFO, is_healthy=False), api_key=["secret"])
    assert client.get("/v1/health/live").status_code == 200
    assert client.get("/v1/health/ready").status_code == 503


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"query": None}, 400, "validation error"),
        ({"passages": [{"text": "a", "image": "x"}]}, 400, "fake takes no images, only texts"),
        ({"passages": [{"words": "x"}]}, 400, "got an object with the keys ['words']"),
        ({"model": "other"}, 404, "The model `other` does not exist."),
        ({"top_k": 0}, 400, "greater than or equal to 1"),
    ],
    ids=str,
)
def test_refused(serve: Serve, fields: dict[str, Any], status: int, words: str) -> None:
    refused = error(serve(info=CROSS_ENCODER), BODY | fields, "/v1/ranking")
    assert refused["code"] == status
    assert words in refused["message"]
