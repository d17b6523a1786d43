"""Vertex AI, Elasticsearch, the page at `/`, and the card of a model under its name alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import checkpoints
from tests.conftest import CLASSIFIER, CROSS_ENCODER, INFO, expected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

RANK = {"query": "a", "texts": ["water", "deep water"]}
PATHS = ("/vertex", "/predict", "/models/fake/vertex", "/vertex/predict", "/v1/models/fake:predict")
HTML = {"Accept": "text/html,application/xhtml+xml"}


def _answer(client: TestClient, path: str, body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("path", PATHS)
def test_instances_are_answered_as_the_root_does(
    client: TestClient, path: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = ["The cenote is deep.", "pits"]
    predictions = _answer(client, path, {"instances": [{"inputs": text} for text in texts]})["predictions"]
    vectors = [expected(tokenizer(text)["input_ids"], use_activation=True) for text in texts]
    assert [row for (row,) in predictions] == [pytest.approx(vector) for vector in vectors]


@pytest.mark.parametrize(("info", "instance"), [(CLASSIFIER, {"inputs": "a"}), (CROSS_ENCODER, RANK)])
def test_instances_of_other_models(serve: Serve, info: Any, instance: dict[str, Any]) -> None:
    client = serve(info=info)
    assert _answer(client, "/vertex", {"instances": [instance, instance]}) == {
        "predictions": [_answer(client, "/", instance)] * 2
    }


def test_parameters_are_fields_of_every_instance(client: TestClient) -> None:
    body = {"instances": [{"inputs": "a"}, {"inputs": "a", "normalize": True}], "parameters": {"normalize": False}}
    raw, normalised = _answer(client, "/vertex", body)["predictions"]
    assert raw == _answer(client, "/embed", {"inputs": "a", "normalize": False})
    assert normalised == _answer(client, "/embed", {"inputs": "a"})
    assert raw != normalised


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Field required"),
        ({"instances": []}, "at least 1 item"),
        ({"instances": [{"inputs": "a"}, {"inputs": 5}]}, "validation error"),
        ({"instances": [{"inputs": "a"}, {"inputs": "deep " * 90}]}, "maximum context length is 64 tokens"),
        ({"instances": [{"inputs": ["a", "a"]}, {"inputs": ["a", "a"]}]}, "has 4 inputs; at most 3 are allowed"),
        ({"instances": [{"inputs": "a"}], "model": "other"}, "The model `other` does not exist."),
    ],
)
def test_a_wrong_instance_refuses_all(serve: Serve, body: Any, message: str) -> None:
    answer = serve(max_client_batch_size=3).post("/vertex", json=body)
    assert answer.status_code in (400, 404)
    assert set(answer.json()) == {"error", "error_type"}
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"instances": [{"inputs": ["a", "a", "a", {}]}]},
        {"instances": [{"inputs": "a"}, {"query": "a", "texts": ["a", "a", "a", {}]}]},
        {"instances": [{}], "parameters": {"inputs": ["a", "a", "a", {}]}},
    ],
    ids=["texts", "a ranking", "parameters"],
)
def test_lists_within_are_counted_before_they_are_validated(serve: Serve, body: Any) -> None:
    answer = serve(max_client_batch_size=3).post("/vertex", json=body)
    assert answer.json()["error"] == "the request has 4 inputs; at most 3 are allowed"


def test_token_ids_are_one_input(serve: Serve) -> None:
    client = serve(max_client_batch_size=3)
    body = {"instances": [{"inputs": [5, 6, 7, 8]}, {"inputs": [[5] * 4, [6] * 4]}]}
    assert len(_answer(client, "/vertex", body)["predictions"]) == 2
    refused = client.post("/vertex", json={"instances": [*body["instances"], {"inputs": "a"}]})
    assert (refused.status_code, "has 4 inputs; at most 3" in refused.json()["error"]) == (400, True)


def test_bytes_are_counted_once(serve: Serve) -> None:
    body = {"instances": [{"inputs": "water"}] * 8}
    engine = FakeEngine(INFO)
    _answer(serve(engine, max_pending_bytes=400), "/vertex", body)
    assert len(engine.submitted) == 8


def test_weights_by_token(tmp_path: Path) -> None:
    config = ModelConfig(model=str(checkpoints.classifier(tmp_path / "splade", head="ForMaskedLM")), convert="sparse")
    service = Service.open(config, EngineConfig())
    with TestClient(build([service], ServerConfig())) as client:
        (pairs,) = _answer(client, "/", {"inputs": ["deep water"]})
        (weights,) = _answer(client, "/elasticsearch", {"inputs": ["deep water"]})
    tokens = service.renderer.token_strings([pair["index"] for pair in pairs])
    assert tokens
    assert weights == dict(zip(tokens, [pair["value"] for pair in pairs], strict=True))


def test_elasticsearch_reads_lists(serve: Serve) -> None:
    client = serve(info=CROSS_ENCODER)
    listed = _answer(client, "/rerank", RANK)
    older = {"query": "a", "documents": RANK["texts"]}
    for path in ("/elasticsearch", "/elasticsearch/rerank", "/models/fake/elasticsearch"):
        assert _answer(client, path, RANK) == _answer(client, path, older) == listed
    assert _answer(client, "/", older) == listed
    assert _answer(client, "/elasticsearch/rerank", older | {"return_documents": True, "top_n": 1}) == [
        {**listed[0], "text": RANK["texts"][listed[0]["index"]]}
    ]
    vectors = _answer(serve(), "/elasticsearch", {"inputs": ["a"]})
    assert len(vectors[0]) == INFO.dimension
    refused = client.post("/elasticsearch", json={"query": "a", "documents": ["a"], "texts": ["a"]})
    assert refused.json()["error_type"] == "Validation"


def test_the_root_is_a_page_in_browsers_alone(serve: Serve) -> None:
    client = serve(names=("<model>", "other"))
    assert (client.get("/").content, client.get("/tei/").content) == (b"", b"")
    page = client.get("/", headers=HTML)
    assert page.headers["content-type"].startswith("text/html")
    for text in ("&lt;model&gt;, other: embed", "POST /v1/embeddings", 'href="/docs"', "POST /api/embed"):
        assert text in page.text
    assert "<model>" not in page.text
    assert [line for line in page.text.splitlines() if "<a " in line] == [
        '<p><a href="/docs">the API</a></p>',
        '<p><a href="/openapi.json">its description for programs</a></p>',
    ]


def test_the_page_keeps_what_needs_a_key(serve: Serve) -> None:
    client = serve(api_key=["secret"], disable_fastapi_docs=True)
    page = client.get("/", headers=HTML)
    assert (page.status_code, "fake" in page.text, "/docs" in page.text) == (200, False, False)


def test_the_card_of_a_name_alone(serve: Serve) -> None:
    client = serve(info=CROSS_ENCODER, names=("lab/fake",))
    card = client.get("/models/lab/fake").json()
    assert card == client.get("/v1/models/lab/fake").json()
    assert (card["id"], card["modelId"], card["pipeline_tag"]) == ("lab/fake", "lab/fake", "text-ranking")
    assert client.get("/models/lab/fake/health").content == b""
    assert client.get("/models/other").status_code == 404
    assert serve(api_key=["secret"]).get("/models/fake").status_code == 401


def test_an_endpoint_of_sagemaker_is_a_model(client: TestClient) -> None:
    """boto3 sends to the path that SageMaker has before it passes a request on."""
    answer = client.post("/endpoints/fake/invocations", json={"inputs": "a"})
    assert answer.json() == client.post("/invocations", json={"inputs": "a"}).json()
    answer = client.post("/endpoints/other/invocations", json={"inputs": "a"})
    assert (answer.status_code, answer.json()["message"]) == (404, "The model `other` does not exist.")


def test_sagemaker_tells_which_documents_are_missing(client: TestClient) -> None:
    for body in ({"query": "a"}, {"query": "a", "documents": None}):
        answer = client.post("/invocations", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body.documents")
