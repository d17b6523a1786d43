"""`huggingface_hub.InferenceClient` and a server process: a URL for each model, and values of Transformers' own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from cenote.models.hub import embedded
from tests.checkpoints import classifier
from tests.server.test_process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MINILM = "sentence-transformers/minilm"
TEXTS = ["Cenotes are natural pits", "a"]
NER = ["O", "B-PER", "I-PER", "B-LOC"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Classifiers of texts and of tokens."""
    root = tmp_path_factory.mktemp("models")
    classifier(root / "classes", num_labels=3)
    classifier(root / "entities", head="ForTokenClassification", id2label=dict(enumerate(NER)))
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def url(folders: dict[str, Path]) -> Iterator[str]:
    """A server with a key, of MiniLM and the classifiers."""
    paths = map(str, (embedded(), *folders.values()))
    process = Process(*paths, "--served-model-name", MINILM, *folders, "--api-key", "secret")
    yield process.url
    process.kill()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client talk to loopback, which its offline mode refuses too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)


@pytest.fixture(scope="module")
def reference() -> Any:
    return SentenceTransformer(str(embedded()), device="cpu")


def of(url: str, model: str) -> InferenceClient:
    """A client of one model."""
    return InferenceClient(model=f"{url}/models/{model}", provider="hf-inference", token="secret")


@pytest.mark.usefixtures("online")
def test_embeddings(url: str, reference: Any) -> None:
    client = of(url, MINILM)
    vectors = reference.encode(TEXTS)
    np.testing.assert_allclose(client.feature_extraction(TEXTS[0]), vectors[:1], atol=1e-5)
    options: dict[str, Any] = {"normalize": True, "truncate": True, "truncation_direction": "right"}
    np.testing.assert_allclose(client.feature_extraction(TEXTS, **options), vectors, atol=1e-5)
    np.testing.assert_allclose(of(url, f"{MINILM}/tei").feature_extraction(TEXTS), vectors, atol=1e-5)
    rooted = InferenceClient(model=url, provider="hf-inference", token="secret")
    np.testing.assert_allclose(rooted.feature_extraction(TEXTS), vectors, atol=1e-5)


@pytest.mark.usefixtures("online")
def test_similarity(url: str, reference: Any) -> None:
    first, second = reference.encode(TEXTS)
    scores = of(url, MINILM).sentence_similarity(TEXTS[0], other_sentences=[TEXTS[1], TEXTS[0]])
    assert scores == pytest.approx([float(first @ second), 1], abs=1e-5)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"function_to_apply": "sigmoid"}], ids=str)
def test_classes(url: str, folders: dict[str, Path], options: dict[str, Any]) -> None:
    classify = pipeline("text-classification", str(folders["classes"]), device="cpu")
    expected = classify(TEXTS[0], **{"top_k": None, **options})
    found = of(url, "classes").text_classification(TEXTS[0], **options)
    assert [entry.label for entry in found] == [entry["label"] for entry in expected]
    assert [entry.score for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("strategy", [None, "first"])
def test_entities(url: str, folders: dict[str, Path], strategy: Any) -> None:
    text = "Anna of Cancun swims in natural pits"
    tag = pipeline("token-classification", str(folders["entities"]), device="cpu")
    expected = tag(text, aggregation_strategy=strategy or "simple")
    found = of(url, "entities").token_classification(text, aggregation_strategy=strategy)
    assert expected
    for entity, entry in zip(found, expected, strict=True):
        assert [entity.entity_group, entity.word, entity.start, entity.end] == [
            entry[key] for key in ("entity_group", "word", "start", "end")
        ]
        assert entity.score == pytest.approx(entry["score"], abs=1e-5)


@pytest.mark.usefixtures("online")
def test_async(url: str, reference: Any) -> None:
    async def vectors() -> Any:
        async with AsyncInferenceClient(
            model=f"{url}/models/{MINILM}", provider="hf-inference", token="secret"
        ) as client:
            return await client.feature_extraction(TEXTS)

    np.testing.assert_allclose(asyncio.run(vectors()), reference.encode(TEXTS), atol=1e-5)


@pytest.mark.usefixtures("online")
def test_health_and_info(url: str) -> None:
    client = of(url, "classes")
    assert client.health_check()
    info = client.get_endpoint_info()
    assert (info["model_id"], list(info["model_type"])) == ("classes", ["classifier"])


@pytest.mark.usefixtures("online")
def test_our_message_reaches_the_caller(url: str) -> None:
    with pytest.raises(HfHubHTTPError, match="maximum context length is 256 tokens"):
        of(url, MINILM).feature_extraction("one " * 300, truncate=False)
    with pytest.raises(HfHubHTTPError, match="missing or wrong API key"):
        InferenceClient(model=url, provider="hf-inference", token="wrong").feature_extraction("one")
    with pytest.raises(HfHubHTTPError, match="Unsupported task: 'classify'"):
        of(url, f"{MINILM}/predict").text_classification("one")
