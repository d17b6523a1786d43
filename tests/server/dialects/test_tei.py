"""Requests of Text Embeddings Inference and of Hugging Face's clients, and what these read of the answers."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cenote.core import Output, Report
from cenote.engine.fake import FakeEngine
from cenote.engine.promise import Timed
from cenote.errors import Overloaded
from cenote.pipeline.entities import softmax
from cenote.pipeline.pipeline import Service
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.rendering import Renderer
from cenote.tensors.similarity import pairwise
from tests.conftest import CLASSIFIER, CROSS_ENCODER, INFO, classes, expected, floats

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from cenote.core import Sequence
    from tests.conftest import Serve

CLS, SEP, ONE, TWO, HELLO = 101, 102, 2028, 2048, 7592
LONG = "two " + "one " * 90
MATRYOSHKA = replace(INFO, matryoshka=(4, 8))
TAGGER = replace(
    INFO,
    tasks=("token_classify",),
    default_task="token_classify",
    num_labels=3,
    labels=("O", "B-PER", "B-LOC"),
    activation="softmax",
)
SPARSE = replace(INFO, tasks=("sparse",), default_task="sparse", vector_task="sparse")


class Weights(FakeEngine):
    """An engine whose sparse results are the tokens of an input, each with the weight of its place."""

    def _output(self, sequence: Sequence) -> Output:
        ids = np.unique(sequence.ids)
        return Output(np.arange(1, len(ids) + 1, dtype=np.float32) / 10, ids)


@pytest.fixture
def several(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> TestClient:
    """A model of each kind, the embedder first."""
    engines = {
        "embedder": FakeEngine(INFO),
        "classifier": FakeEngine(CLASSIFIER),
        "reranker": FakeEngine(CROSS_ENCODER),
        "lab/tagger": FakeEngine(TAGGER),
        "splade": Weights(SPARSE),
    }
    return serve.of(*(Service(e, Renderer(tokenizer, e.info), (name,)) for name, e in engines.items()))


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


EMBEDDINGS: dict[str, tuple[dict[str, Any], list[list[int]], dict[str, Any]]] = {
    "one text": ({"inputs": "hello"}, [[CLS, HELLO, SEP]], {}),
    "texts": ({"inputs": ["hello", "one"]}, [[CLS, HELLO, SEP], [CLS, ONE, SEP]], {}),
    "ids, as they are": ({"inputs": [CLS, ONE]}, [[CLS, ONE]], {}),
    "mixed": ({"inputs": [[CLS, ONE], "one"]}, [[CLS, ONE], [CLS, ONE, SEP]], {}),
    "raw": ({"inputs": "hello", "normalize": False}, [[CLS, HELLO, SEP]], {"use_activation": False}),
    "nulls": ({"inputs": "hello", "normalize": None, "prompt_name": None}, [[CLS, HELLO, SEP]], {}),
    "short": ({"inputs": "hello", "dimensions": 4}, [[CLS, HELLO, SEP]], {"dimensions": 4}),
    "the hub's parameters": (
        {"inputs": "hello", "parameters": {"dimensions": 4, "normalize": None}, "options": {"wait": True}},
        [[CLS, HELLO, SEP]],
        {"dimensions": 4},
    ),
    "cut": ({"inputs": LONG, "truncate": True}, [[CLS, TWO, *[ONE] * 61, SEP]], {}),
    "cut at the left": (
        {"inputs": LONG, "truncate": True, "truncation_direction": "Left"},
        [[CLS, *[ONE] * 62, SEP]],
        {},
    ),
}


@pytest.mark.parametrize(("body", "ids", "params"), EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("path", ["/embed", "/", "/models/fake", "/models/fake/pipeline/feature-extraction"])
def test_embed(serve: Serve, path: str, body: dict[str, Any], ids: list[list[int]], params: dict[str, Any]) -> None:
    assert floats(post(serve(info=MATRYOSHKA), path, body)) == [expected(of_text, **params) for of_text in ids]


def test_embed_as_base64(client: TestClient) -> None:
    (text,) = post(client, "/embed", {"inputs": "hello", "encoding_format": "base64"})
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == expected([CLS, HELLO, SEP])


def test_prompts(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizer, INFO, prompts=Prompts({"question": "one "}))
    client = serve.of(Service(FakeEngine(INFO), renderer, ("fake",)))
    body = {"inputs": "hello", "prompt_name": "question"}
    assert floats(post(client, "/embed", body)) == [expected([CLS, ONE, HELLO, SEP])]
    assert [token["text"] for token in post(client, "/tokenize", body)[0]] == ["[CLS]", "one", "hello", "[SEP]"]
    answer = client.post("/embed", json=body | {"prompt_name": "none"})
    assert answer.json() == {
        "error": "unknown prompt_name 'none'. Supported values: question",
        "error_type": "Validation",
    }


def test_embed_all(client: TestClient) -> None:
    rows = [expected([token], use_activation=False) for token in (CLS, HELLO, SEP)]
    assert floats(post(client, "/embed_all", {"inputs": ["hello"]})) == [rows]


@pytest.mark.parametrize("path", ["/embed_sparse", "/models/splade"])
def test_embed_sparse(several: TestClient, path: str) -> None:
    entries = [{"index": CLS, "value": 0.1}, {"index": SEP, "value": 0.2}, {"index": HELLO, "value": 0.3}]
    assert post(several, path, {"inputs": ["hello"]}) == [entries]


def ranked(values: Any, labels: Any = CLASSIFIER.labels) -> list[dict[str, Any]]:
    order = np.argsort(-np.asarray(values))
    return [{"label": labels[i], "score": pytest.approx(values[i], abs=1e-6)} for i in order]


TEXT, PAIR = [CLS, ONE, SEP], [CLS, ONE, SEP, TWO, SEP]
LOGITS = np.array(classes(TEXT, use_activation=False), np.float32)
PREDICTIONS: dict[str, tuple[str, Any, Any]] = {
    "one, flat": ("/predict", {"inputs": "one"}, ranked(classes(TEXT))),
    "raw": ("/predict", {"inputs": "one", "raw_scores": True}, ranked(LOGITS)),
    "one pair": ("/predict", {"inputs": ["one", "two"]}, ranked(classes(PAIR))),
    "a batch": ("/predict", {"inputs": [["one"], ["one", "two"]]}, [ranked(classes(TEXT)), ranked(classes(PAIR))]),
    "at the root nested": ("/", {"inputs": "one"}, [ranked(classes(TEXT))]),
    "texts at the root": ("/", {"inputs": ["one", "two"]}, [ranked(classes(TEXT)), ranked(classes([CLS, TWO, SEP]))]),
    "the hub": (
        "/pipeline/text-classification",
        {"inputs": "one", "parameters": {"top_k": 2, "function_to_apply": "sigmoid"}},
        [ranked(1 / (1 + np.exp(-LOGITS)))[:2]],
    ),
    "softmax": ("/", {"inputs": "one", "parameters": {"function_to_apply": "softmax"}}, [ranked(softmax(LOGITS))]),
    "no function": ("/", {"inputs": "one", "parameters": {"function_to_apply": "none"}}, [ranked(LOGITS)]),
}


@pytest.mark.parametrize(("path", "body", "answer"), PREDICTIONS.values(), ids=PREDICTIONS)
def test_predict(serve: Serve, path: str, body: dict[str, Any], answer: Any) -> None:
    assert post(serve(info=CLASSIFIER), path, body) == answer


def test_a_model_without_names_of_labels(serve: Serve) -> None:
    client = serve(info=replace(CLASSIFIER, labels=()))
    assert {entry["label"] for entry in post(client, "/predict", {"inputs": "one"})} == {
        "LABEL_0",
        "LABEL_1",
        "LABEL_2",
    }


@pytest.mark.parametrize("path", ["/models/lab/tagger", "/pipeline/token-classification"])
def test_entities(several: TestClient, path: str) -> None:
    logits = np.array([classes([token], TAGGER, use_activation=False) for token in (ONE, TWO)], np.float32)
    scores = softmax(logits)
    found = post(several, path, {"inputs": "one two", "parameters": {"ignore_labels": []}})
    assert all(list(entity) == ["entity_group", "score", "word", "start", "end"] for entity in found)
    labels = [TAGGER.labels[i].removeprefix("B-") for i in scores.argmax(axis=1)]
    assert [(e["entity_group"], e["word"], e["start"], e["end"]) for e in found] == [
        (labels[0], "one", 0, 3),
        (labels[1], "two", 4, 7),
    ]
    assert [e["score"] for e in found] == pytest.approx(scores.max(axis=1).tolist(), abs=1e-6)
    body = {"inputs": ["one two"], "parameters": {"aggregation_strategy": "none", "ignore_labels": []}}
    ((first, second),) = post(several, path, body)
    assert (first["index"], second["entity"]) == (1, TAGGER.labels[int(scores[1].argmax())])


@pytest.mark.parametrize("path", ["/", "/similarity", "/models/embedder/pipeline/sentence-similarity"])
def test_similarity(several: TestClient, path: str) -> None:
    body = {"inputs": {"source_sentence": "one", "sentences": ["two", "one"]}, "parameters": {}}
    vectors = [np.array(expected([CLS, token, SEP]), np.float32) for token in (ONE, TWO, ONE)]
    scores = pairwise([vectors[0]] * 2, vectors[1:])
    assert floats(post(several, path, body)) == pytest.approx(scores.tolist())
    assert scores[1] == pytest.approx(1)


RERANK: dict[str, Any] = {"query": "one", "texts": ["two", "one", "deep water"]}


@pytest.mark.parametrize("path", ["/rerank", "/", "/models/reranker/rerank", "/pipeline/text-ranking"])
@pytest.mark.parametrize("fields", [{}, {"raw_scores": True, "truncation_direction": "Right"}, {"top_n": 2}])
def test_rerank(several: TestClient, tokenizer: PreTrainedTokenizerBase, path: str, fields: dict[str, Any]) -> None:
    raw = {"use_activation": False} if "raw_scores" in fields else {}
    scores = [classes(tokenizer("one", text)["input_ids"], CROSS_ENCODER, **raw)[0] for text in RERANK["texts"]]
    best = sorted(range(3), key=lambda i: -scores[i])[: fields.get("top_n")]
    results = [{"index": i, "score": pytest.approx(scores[i], abs=1e-6)} for i in best]
    assert post(several, path, RERANK | fields) == results
    with_text = [result | {"text": RERANK["texts"][result["index"]]} for result in results]
    assert post(several, path, RERANK | fields | {"return_text": True}) == with_text


def test_rerank_refuses_the_left_end(serve: Serve) -> None:
    answer = serve(info=CROSS_ENCODER).post("/rerank", json=RERANK | {"truncation_direction": "left"})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "Validation")
    assert answer.json()["error"].startswith("`truncation_direction` is 'Left', and pairs of texts are cut")


def test_tokenize(client: TestClient) -> None:
    tokens = post(client, "/tokenize", {"inputs": ["Hello one"]})
    assert tokens == [
        [
            {"id": CLS, "text": "[CLS]", "special": True, "start": None, "stop": None},
            {"id": HELLO, "text": "Hello", "special": False, "start": 0, "stop": 5},
            {"id": ONE, "text": "one", "special": False, "start": 6, "stop": 9},
            {"id": SEP, "text": "[SEP]", "special": True, "start": None, "stop": None},
        ]
    ]
    assert [t["id"] for t in post(client, "/tokenize", {"inputs": "one", "add_special_tokens": False})[0]] == [ONE]
    assert post(client, "/tokenize", {"prompt": "one"})["tokens"] == [CLS, ONE, SEP], "vLLM's"


def test_tokenize_with_a_slow_tokenizer(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cenote.server.dialects.tei.FastTokenizer", type(None))
    tokens = post(client, "/tokenize", {"inputs": "one"})[0]
    assert [(t["id"], t["text"], t["special"], t["start"]) for t in tokens] == [
        (CLS, "[CLS]", True, None),
        (ONE, "one", False, None),
        (SEP, "[SEP]", True, None),
    ]


def test_tokenize_refuses_what_is_too_long(serve: Serve) -> None:
    answer = serve(max_tokenize_bytes=8).post("/tokenize", json={"inputs": "one two three"})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "Validation")
    assert answer.json()["error"].startswith("the text has 13 bytes; at most 8 are tokenised")


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ({"ids": [CLS, HELLO, SEP]}, ["hello"]),
        ({"ids": [[HELLO], [ONE, TWO]]}, ["hello", "one two"]),
        ({"ids": [CLS, HELLO], "skip_special_tokens": False}, ["[CLS] hello"]),
    ],
)
def test_decode(client: TestClient, body: dict[str, Any], texts: list[str]) -> None:
    assert post(client, "/decode", body) == texts


KINDS = {"embedder": "embedding", "classifier": "classifier", "reranker": "reranker", "lab/tagger": "classifier"}
INFO_KEYS = (
    "model_id model_sha model_dtype served_model_name model_type max_concurrent_requests max_input_length "
    "max_batch_tokens max_batch_requests max_client_batch_size auto_truncate "
    "tokenization_workers version sha docker_label"
)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_info(several: TestClient, name: str, kind: str) -> None:
    answer = several.get(f"/models/{name}/info").json()
    assert list(answer) == INFO_KEYS.split()
    assert (answer["model_id"], answer["max_input_length"], answer["max_client_batch_size"]) == (name, 64, 2048)
    assert list(answer["model_type"]) == [kind]
    assert several.get("/info").json()["model_id"] == "embedder"


def test_info_has_names_of_text_embeddings_inference(serve: Serve) -> None:
    assert serve(info=CLASSIFIER).get("/info").json()["model_type"] == {
        "classifier": {
            "id2label": {"0": "no", "1": "maybe", "2": "yes"},
            "label2id": {"no": 0, "maybe": 1, "yes": 2},
        }
    }
    last = replace(INFO, report=Report(pooling="lasttoken"))
    assert serve(info=last).get("/info").json()["model_type"] == {"embedding": {"pooling": "last_token"}}
    assert serve(info=SPARSE).get("/info").json()["model_type"] == {"embedding": {"pooling": "splade"}}


def test_headers(serve: Serve) -> None:
    answer = serve().post("/embed", json={"inputs": ["hello", "one two"]})
    told = {name: value for name, value in answer.headers.items() if name.startswith("x-") and name != "x-request-id"}
    assert set(told) == {
        "x-compute-type", "x-compute-time", "x-compute-characters", "x-compute-tokens", "x-total-time",
        "x-tokenization-time", "x-queue-time", "x-inference-time",
    }  # fmt: skip
    assert (told["x-compute-type"], told["x-compute-characters"], told["x-compute-tokens"]) == ("cpu", "12", "7")
    assert int(told["x-total-time"]) >= int(told["x-tokenization-time"]) >= 0
    pairs = serve(info=CROSS_ENCODER).post("/rerank", json=RERANK)
    assert pairs.headers["x-compute-characters"] == str(3 * 3 + len("twoonedeep water"))


def test_headers_tell_of_queue_and_forward(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(self: FakeEngine, sequences: Any, **options: Any) -> Any:
        future = Timed[Any]()
        future.times.accepted, future.times.launched, future.times.finished = 100.0, 100.25, 101.75
        future.set_result(submit(self, sequences, **options).result())
        return future

    submit = FakeEngine.submit
    monkeypatch.setattr(FakeEngine, "submit", timed)
    headers = serve().post("/embed", json={"inputs": "hello"}).headers
    assert (headers["x-queue-time"], headers["x-inference-time"]) == ("250", "1500")


def test_health_is_open(serve: Serve) -> None:
    client = serve(api_key=["secret"])
    assert client.get("/").status_code == 200
    refused = client.post("/", json={"inputs": "one"})
    assert (refused.status_code, refused.json()) == (
        401,
        {"error": "missing or wrong API key", "error_type": "Unauthorized"},
    )


def test_an_engine_that_fails_is_not_healthy(serve: Serve) -> None:
    assert serve(FakeEngine(INFO, is_healthy=False)).get("/").status_code == 503


REFUSED: dict[str, tuple[str, Any, int, str, str]] = {
    "no field": ("/embed", {"input": "one"}, 400, "Validation", "'loc': ('body', 'inputs')"),
    "zero-shot": (
        "/",
        {"inputs": "a", "parameters": {"candidate_labels": ["a"]}},
        400,
        "Validation",
        "`candidate_labels` ask for zero-shot classification",
    ),
    "windows": (
        "/",
        {"inputs": "a", "parameters": {"stride": 8}},
        400,
        "Validation",
        "`stride` asks for a long text in",
    ),
    "wrong type": ("/embed", {"inputs": 5}, 400, "Validation", "3 validation errors"),
    "empty": ("/embed", {"inputs": []}, 400, "Validation", "You must pass at least one prompt"),
    "unknown model": ("/embed", {"inputs": "a", "model": "none"}, 404, "Validation", "The model `none` does not exist"),
    "too long": ("/embed", {"inputs": LONG}, 400, "Validation", "maximum context length is 64 tokens"),
    "not to be cut": ("/", {"inputs": LONG, "truncate": False}, 400, "Validation", "maximum context length"),
    "not offered": ("/predict", {"inputs": "one"}, 400, "Backend", "Unsupported task: 'classify'"),
    "no Matryoshka": ("/embed", {"inputs": "one", "dimensions": 4}, 400, "Validation", "Matryoshka"),
    "three texts": ("/predict", {"inputs": ["a", "b", "c"]}, 400, "Validation", "got an input of 3 parts"),
    "no pair": ("/", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Validation", "at least 1 item"),
}


@pytest.mark.parametrize(("path", "body", "status", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(client: TestClient, path: str, body: Any, status: int, kind: str, words: str) -> None:
    answer = client.post(path, json=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error", "error_type"])
    assert answer.json()["error_type"] == kind
    assert words in answer.json()["error"]


def test_overload(serve: Serve) -> None:
    answer = serve(FakeEngine(INFO, failures=[Overloaded("full", retry_after=3)])).post(
        "/embed", json={"inputs": "one"}
    )
    assert (answer.status_code, answer.json()) == (429, {"error": "full", "error_type": "Overloaded"})
    assert answer.headers["retry-after"] == "3"


def test_an_answer_may_be_too_large(serve: Serve) -> None:
    answer = serve(max_response_bytes=500).post("/embed_all", json={"inputs": LONG, "truncate": True})
    assert answer.json()["error"].startswith(f"the answer would have some {64 * 8 * 12} bytes, and at most 500 are")


def test_too_many_inputs(serve: Serve) -> None:
    client = serve(max_client_batch_size=2)
    for path in ("/embed", "/", "/tokenize"):
        answer = client.post(path, json={"inputs": ["a", "b", "c"]})
        assert answer.json()["error"] == "the request has 3 inputs; at most 2 are allowed"
    answer = client.post("/similarity", json={"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}})
    assert answer.json()["error"] == "the request has 3 inputs; at most 2 are allowed"
    answer = client.post("/embed", json={"parameters": {"inputs": ["a", "b", {}]}})
    assert answer.json()["error"] == "the request has 3 inputs; at most 2 are allowed", "before they are validated"
