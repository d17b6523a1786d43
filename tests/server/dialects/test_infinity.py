"""Infinity's dialect: bodies as `infinity_client` and LangChain send them, and the fields that their models require."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote.engine.fake import FakeEngine
from tests.conftest import CLASSIFIER, CROSS_ENCODER, INFO, classes, error, expected, floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

CLS, SEP, ONE, HELLO = 101, 102, 2028, 7592
UNNAMED = "default/not-specified"
EMBED: dict[str, Any] = {
    "model": UNNAMED,
    "encoding_format": "float",
    "user": None,
    "dimensions": 0,
    "input": ["hello"],
    "modality": "text",
}
RERANK: dict[str, Any] = {
    "query": "one",
    "documents": ["three", "one", "deep water"],
    "return_documents": False,
    "raw_scores": False,
    "model": UNNAMED,
    "top_n": None,
}


@pytest.mark.parametrize("path", ["/embeddings", "/infinity/embeddings"])
def test_embed(serve: Serve, path: str) -> None:
    answer = serve().post(path, json=EMBED).json()
    (entry,) = answer["data"]
    assert floats(entry["embedding"]) == expected([CLS, HELLO, SEP])
    assert (entry["object"], answer["model"], answer["usage"]["prompt_tokens"]) == ("embedding", "fake", 3)


def test_what_is_not_embedded_is_refused_by_name(serve: Serve) -> None:
    refused = error(serve(), EMBED | {"modality": "audio"}, "/embeddings")
    assert (refused["param"], refused["message"][:25]) == ("modality", "got the modality 'audio';")
    assert "takes no images" in error(serve(), EMBED | {"modality": "image"}, "/embeddings")["message"]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("top_n", "kept"), [(None, 3), (2, 2)])
def test_rerank(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, raw: bool, documents: bool, top_n: int | None, kept: int
) -> None:
    body = RERANK | {"raw_scores": raw, "return_documents": documents, "top_n": top_n}
    answer = serve(info=CROSS_ENCODER).post("/rerank", json=body).json()
    params = {"use_activation": False} if raw else {}
    pairs = [tokenizer("one", document)["input_ids"] for document in RERANK["documents"]]
    scores = [classes(ids, CROSS_ENCODER, **params)[0] for ids in pairs]
    best = sorted(range(3), key=lambda i: -scores[i])[:kept]
    assert answer["results"] == [
        {
            "relevance_score": pytest.approx(scores[i]),
            "index": i,
            "document": RERANK["documents"][i] if documents else None,
        }
        for i in best
    ]
    assert (answer["object"], answer["model"]) == ("rerank", "fake")
    assert {"id", "created", "usage"} < answer.keys()


def test_the_prefix_alone_tells_a_body_of_everybody(serve: Serve) -> None:
    body = {"query": "one", "documents": ["one"], "return_documents": True}
    client = serve(info=CROSS_ENCODER)
    assert client.post("/infinity/rerank", json=body).json()["results"][0]["document"] == "one"
    assert client.post("/rerank", json=body).json()["results"][0]["document"] == {"text": "one", "multi_modal": None}


@pytest.mark.parametrize("raw", [False, True])
def test_classify(serve: Serve, raw: bool) -> None:
    body = {"input": ["one", "hello"], "model": UNNAMED, "raw_scores": raw}
    answer = serve(info=CLASSIFIER).post("/classify", json=body).json()
    assert (answer["object"], answer["model"]) == ("classify", "fake")
    for token, data in zip((ONE, HELLO), answer["data"], strict=True):
        values = np.array(classes([CLS, token, SEP], **({"use_activation": False} if raw else {})))
        assert [entry["label"] for entry in data] == [CLASSIFIER.labels[i] for i in np.argsort(-values)]
        assert [entry["score"] for entry in data] == pytest.approx(sorted(values, reverse=True))


def test_models_and_health(serve: Serve) -> None:
    client = serve.several(one=FakeEngine(INFO), two=FakeEngine(CROSS_ENCODER))
    cards = client.get("/infinity/models").json()["data"]
    assert [card["id"] for card in cards] == ["one", "two"]
    assert {card["owned_by"] for card in cards} == {"infinity"}
    assert cards[0]["stats"] == {"queue_fraction": 0.0, "queue_absolute": 0, "results_pending": 0, "batch_size": 768}
    assert [card["capabilities"] for card in cards] == [["embed"], ["classify", "embed", "rerank"]]
    assert client.get("/infinity/health").json()["unix"] > 1e9
    assert (client.get("/health").content, client.get("/models").json()["data"][0]["owned_by"]) == (b"", "cenote")


def test_an_engine_that_fails_is_not_healthy(serve: Serve) -> None:
    assert serve(FakeEngine(INFO, is_healthy=False)).get("/infinity/health").status_code == 503


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/classify", {"input": ["one"], "model": "other", "raw_scores": True}, 404),
        ("/classify", {"input": 5, "raw_scores": True}, 400),
        ("/rerank", RERANK | {"documents": None}, 400),
        ("/infinity/none", {}, 404),
    ],
)
def test_refused(serve: Serve, path: str, body: Any, status: int) -> None:
    assert error(serve(info=CROSS_ENCODER), body, path)["code"] == status
