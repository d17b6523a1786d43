"""infinity_client: every route of its own, at the prefix `/infinity`."""

from __future__ import annotations

from infinity_client.api.default import classify, embeddings, health, models, rerank
from infinity_client.client import AuthenticatedClient, Client
from infinity_client.models import (
    ClassifyInput,
    EmbeddingEncodingFormat,
    OpenAIEmbeddingInputText,
    OpenAIEmbeddingInputTextModality,
    RerankInput,
)

from clients.call import FULL, KEY, LARGE, VALUES, A, B, C, Call

V = VALUES
a = Client(base_url=f"{A}/infinity")
strict = Client(base_url=f"{A}/infinity", raise_on_unexpected_status=True)
b = AuthenticatedClient(base_url=f"{B}/infinity", token=KEY)
MANY = "data.*.embedding"
RANKED = "results.*.index,relevance_score"
BASE64 = "the client cannot read base64, whatever comes"


def text(model: str = "minilm", **fields: object) -> OpenAIEmbeddingInputText:
    return OpenAIEmbeddingInputText(
        input_=V["texts"], model=model, modality=OpenAIEmbeddingInputTextModality.TEXT, **fields
    )


def ranking(**fields: object) -> RerankInput:
    return RerankInput(query=V["question"], documents=V["texts"], model="cross", **fields)


def classes(answer: object) -> list[list[list[object]]]:
    return [[[c.label, c.score] for c in of_text] for of_text in answer.data]


CALLS = [
    Call("embeddings", lambda: embeddings.sync(client=a, body=text()), MANY, V["vectors"]),
    Call(
        "embeddings: default model",
        lambda: embeddings.sync(client=b, body=text("default/not-specified")),
        MANY,
        V["vectors"],
    ),
    Call(
        "embeddings: base64",
        lambda: embeddings.sync(client=a, body=text(encoding_format=EmbeddingEncodingFormat.BASE64)),
        MANY,
        V["vectors"],
        fails=BASE64,
    ),
    Call("embeddings: async", lambda: embeddings.asyncio(client=a, body=text()), MANY, V["vectors"]),
    Call("rerank", lambda: rerank.sync(client=a, body=ranking()), RANKED, V["ranked"]),
    Call("rerank: raw_scores", lambda: rerank.sync(client=a, body=ranking(raw_scores=True)), RANKED, V["ranked raw"]),
    Call(
        "classify",
        lambda: classify.sync(client=a, body=ClassifyInput(input_=V["texts"], model="classes")),
        classes,
        V["classes"],
    ),
    Call("models", lambda: models.sync(client=a), "data.*.id", V["names"]),
    Call("health", lambda: health.sync(client=a), lambda answer: answer["unix"] > 0, True),
]
wrong = AuthenticatedClient(base_url=f"{B}/infinity", token="wrong", raise_on_unexpected_status=True)
full = Client(base_url=f"{C}/infinity", raise_on_unexpected_status=True)
ERRORS = [
    Call(
        "embeddings",
        lambda: embeddings.sync(client=strict, body=text("none")),
        error="The model `none` does not exist",
    ),
    Call("key", lambda: embeddings.sync(client=wrong, body=text()), error="missing or wrong API key"),
    Call("overload", lambda: embeddings.sync(client=full, body=text()), error=FULL),
    Call("overload: rerank", lambda: rerank.sync(client=full, body=ranking()), error=FULL),
    Call(
        "a body that is too large",
        lambda: rerank.sync(client=full, body=RerankInput(query="deep " * 500, documents=V["texts"], model="cross")),
        error=LARGE,
    ),
]
