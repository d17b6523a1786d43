"""Models by their names in the path, as Azure's clients send them, and the lists of models that clients read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cohere
import httpx
import openai
import pytest

from cenote.engine.fake import FakeEngine
from tests.conftest import CROSS_ENCODER, INFO, expected, floats

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

NAME = "lab/embedder"


@pytest.fixture
def server(serve: Serve) -> TestClient:
    return serve.several(**{"reranker": FakeEngine(CROSS_ENCODER), NAME: FakeEngine(INFO)})


def through(client: TestClient) -> httpx.Client:
    """A client of the kind that packages take, whose requests `client` answers."""

    def answer(request: httpx.Request) -> httpx.Response:
        path = str(request.url).removeprefix("http://cenote")
        got = client.request(request.method, path, content=request.content, headers=dict(request.headers))
        return httpx.Response(got.status_code, headers={"Content-Type": "application/json"}, content=got.content)

    return httpx.Client(transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("base", ["/v1", "/openai/v1"])
def test_openai(server: TestClient, base: str) -> None:
    client = openai.OpenAI(base_url=f"http://cenote{base}", api_key="k", http_client=through(server), max_retries=0)
    assert client.models.retrieve(NAME).id == NAME
    assert [card.id for card in client.models.list()] == ["reranker", NAME]
    (entry,) = client.embeddings.create(input="hello", model=NAME).data
    assert floats(entry.embedding) == expected([101, 7592, 102])
    with pytest.raises(openai.NotFoundError, match="The model `none` does not exist"):
        client.models.retrieve("none")


def test_azure(server: TestClient) -> None:
    client = openai.AzureOpenAI(
        azure_endpoint="http://cenote",
        azure_deployment=NAME,
        api_version="2024-06-01",
        api_key="k",
        http_client=through(server),
        max_retries=0,
    )
    answer = client.embeddings.create(input="hello", model="text-embedding-3-small")
    assert (answer.model, floats(answer.data[0].embedding)) == (NAME, expected([101, 7592, 102]))
    with pytest.raises(openai.NotFoundError, match="The model `none` does not exist"):
        openai.AzureOpenAI(
            azure_endpoint="http://cenote", azure_deployment="none", api_version="1", api_key="k",
            http_client=through(server), max_retries=0,
        ).embeddings.create(input="a", model="a")  # fmt: skip


@pytest.mark.parametrize("path", ["/openai/deployments/{}/embeddings", "/v1/deployments/{}/embeddings"])
def test_deployments(server: TestClient, path: str) -> None:
    answer = server.post(f"{path.format(NAME)}?api-version=2024-06-01", json={"input": "hello"}).json()
    assert (answer["model"], floats(answer["data"][0]["embedding"])) == (NAME, expected([101, 7592, 102]))


def test_cohere(server: TestClient, tokenizer: PreTrainedTokenizerBase) -> None:
    client = cohere.Client(api_key="k", base_url="http://cenote", httpx_client=through(server))
    cards: Any = client.models.list().models
    assert [(card.name, card.endpoints) for card in cards] == [
        ("reranker", ["classify", "embed", "rerank"]),
        (NAME, ["embed"]),
    ]
    assert (client.models.get(NAME).name, client.models.get(NAME).context_length) == (NAME, 64)
    tokens = client.tokenize(text="hello waters", model=NAME, offline=False)
    assert (tokens.tokens, tokens.token_strings) == ([7592, 5380], ["hello", "waters"])
    assert client.detokenize(tokens=[7592, 5380], model=NAME, offline=False).text == "hello waters"


def test_a_text_to_tokenize_may_be_too_long(serve: Serve) -> None:
    answer = serve(max_tokenize_bytes=4).post("/v1/tokenize", json={"text": "hello", "model": "fake"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text")
