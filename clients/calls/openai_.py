"""openai: embeddings in every form, models, errors, Azure."""

from __future__ import annotations

from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

from clients.call import FULL, KEY, LARGE, VALUES, A, B, C, Call, floats

V = VALUES
a, b = OpenAI(api_key="none", base_url=f"{A}/v1"), OpenAI(api_key=KEY, base_url=f"{B}/v1")
wrong = OpenAI(api_key="wrong", base_url=f"{B}/v1")
asynchronous = AsyncOpenAI(api_key=KEY, base_url=f"{B}/v1")
azure = AzureOpenAI(api_key=KEY, azure_endpoint=B, api_version="2024-10-21")
azure_wrong = AzureOpenAI(api_key="wrong", azure_endpoint=B, api_version="2024-10-21")
azure_async = AsyncAzureOpenAI(api_key=KEY, azure_endpoint=B, api_version="2024-10-21")
azure_deployment = AzureOpenAI(api_key=KEY, azure_endpoint=B, azure_deployment="minilm", api_version="2024-10-21")
azure_v1 = AzureOpenAI(api_key=KEY, base_url=f"{B}/v1", api_version="2024-10-21", azure_deployment=None)
MANY = "data.*.embedding"
BATCHES = "files and batches are no routes of a server that answers at once"


def embed(client: OpenAI, **fields: object) -> object:
    return client.embeddings.create(**{"model": "minilm", "input": V["texts"], **fields})


def header() -> bool:
    raw = a.embeddings.with_raw_response.create(model="minilm", input=V["text"])
    return bool(raw.headers["x-request-id"]) and len(raw.parse().data) == 1


CALLS = [
    Call("embeddings: base64, the default", lambda: embed(a), MANY, V["vectors"]),
    Call("embeddings: float", lambda: embed(a, encoding_format="float"), MANY, V["vectors"]),
    Call(
        "embeddings: base64, as it comes",
        lambda: embed(a, encoding_format="base64"),
        lambda answer: [floats(entry.embedding) for entry in answer.data],
        V["vectors"],
    ),
    Call("embeddings: one text", lambda: embed(b, input=V["text"]), MANY, V["vectors"][:1]),
    Call("embeddings: dimensions", lambda: embed(b, dimensions=V["size"]), MANY, V["small"]),
    Call("embeddings: dimensions of the model", lambda: embed(b, dimensions=384), MANY, V["vectors"]),
    Call("embeddings: token ids", lambda: embed(a, input=V["ids"]), MANY, V["vectors"][:1]),
    Call("embeddings: lists of token ids", lambda: embed(a, input=[V["ids"]]), MANY, V["vectors"][:1]),
    Call("embeddings: user", lambda: embed(a, user="me"), MANY, V["vectors"]),
    Call("embeddings: usage", lambda: embed(a, input=V["text"]), "usage.total_tokens", len(V["ids"])),
    Call("embeddings: async", lambda: embed(asynchronous), MANY, V["vectors"]),
    Call("embeddings: raw response with X-Request-Id", header, "", True),
    Call(
        "embeddings: base URL that ends in a slash",
        lambda: embed(OpenAI(api_key="none", base_url=f"{A}/v1/")),
        MANY,
        V["vectors"],
    ),
    Call(
        "embeddings: base URL without /v1",
        lambda: embed(OpenAI(api_key="none", base_url=A)),
        MANY,
        V["vectors"],
    ),
    Call("embeddings: a name of OpenAI's", lambda: embed(b, model="text-embedding-3-small"), MANY, V["vectors"]),
    Call("models.list", a.models.list, "data.*.id", V["names"]),
    Call("models.retrieve", lambda: a.models.retrieve("cross"), "id", "cross"),
    Call("models.retrieve: async", lambda: asynchronous.models.retrieve("minilm"), "id", "minilm"),
    Call("error: model", lambda: embed(a, model="none"), error="The model `none` does not exist"),
    Call("error: too long", lambda: embed(a, input=V["long"]), error="maximum context length is 256 tokens"),
    Call("error: key", lambda: embed(wrong), error="missing or wrong API key"),
    Call("Azure: embeddings", lambda: embed(azure), MANY, V["vectors"]),
    Call("Azure: deployment", lambda: embed(azure_deployment), MANY, V["vectors"]),
    Call("Azure: async", lambda: embed(azure_async), MANY, V["vectors"]),
    Call("Azure: base URL that ends in /v1", lambda: embed(azure_v1), MANY, V["vectors"]),
    Call(
        "files.create",
        lambda: a.files.create(file=("a.jsonl", b"{}"), purpose="batch"),
        fails=BATCHES,
    ),
    Call("batches.list", lambda: a.batches.list(), "data", [], fails=BATCHES),
]
full = OpenAI(api_key="none", base_url=f"{C}/v1", max_retries=0)
ERRORS = [
    Call("overload", lambda: embed(full), error=FULL),
    Call("a body that is too large", lambda: embed(full, input="deep " * 500), error=LARGE),
    Call("Azure: key", lambda: embed(azure_wrong), error="missing or wrong API key"),
]
