"""infinity_client: every route of its own, at the prefix `/infinity`."""

from __future__ import annotations

from collections.abc import Callable

from infinity_client.api.default import classify, embeddings, health, models, rerank
from infinity_client.client import AuthenticatedClient, Client
from infinity_client.models import (
    ClassifyInput,
    EmbeddingEncodingFormat,
    OpenAIEmbeddingInputText,
    OpenAIEmbeddingInputTextModality,
    RerankInput,
)

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import EXACTLY, refusals

V = VALUES
a = Client(base_url=f"{A}/infinity")
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
    Call(
        "embeddings",
        lambda: embeddings.sync(client=a, body=text()),
        MANY,
        V["vectors"],
        cause="dimensions-of-the-model",
    ),
    Call(
        "embeddings: default model",
        lambda: embeddings.sync(client=b, body=text("default/not-specified")),
        MANY,
        V["vectors"],
        cause="any-model-name",
    ),
    Call(
        "embeddings: base64",
        lambda: embeddings.sync(client=a, body=text(encoding_format=EmbeddingEncodingFormat.BASE64)),
        MANY,
        V["vectors"],
        fails=BASE64,
    ),
    Call("embeddings: async", lambda: embeddings.asyncio(client=a, body=text()), MANY, V["vectors"]),
    Call(
        "rerank", lambda: rerank.sync(client=a, body=ranking()), RANKED, V["ranked"], cause="answers-of-several-vendors"
    ),
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


class Body:
    """A body of one's own, where the client's models refuse it."""

    def __init__(self, **fields: object) -> None:
        self.fields = fields

    def to_dict(self) -> dict[str, object]:
        return self.fields


def bad(route: object, **body: object) -> Callable[..., object]:
    """A request of a route."""

    def send(url: str, key: str = "none", **fields: object) -> object:
        client = AuthenticatedClient(base_url=f"{url}/infinity", token=key, raise_on_unexpected_status=True)
        return route.sync(client=client, body=Body(**{**body, **fields}))

    return send


OF_EMBEDDINGS = bad(embeddings, model="minilm", input=V["texts"], modality="text")
OF_RERANK = bad(rerank, model="minilm", query=V["question"], documents=V["texts"], truncate=False)
OF_CLASSIFY = bad(classify, model="classes", input=V["texts"])
ERRORS = [
    *refusals(OF_EMBEDDINGS, "input", "UnexpectedStatus", says=EXACTLY),
    *refusals(OF_RERANK, "documents", "UnexpectedStatus", of="rerank", long=[V["long"]]),
    *refusals(OF_CLASSIFY, "input", "UnexpectedStatus", of="classify", long=[V["long"]]),
]
