"""openai: embeddings in every form, models, errors, Azure."""

from __future__ import annotations

from collections.abc import Callable

from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

from clients.call import KEY, VALUES, A, B, Call, floats
from clients.refusals import EXACTLY, OPENAI, refusals

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
    Call(
        "embeddings: dimensions of the model",
        lambda: embed(b, dimensions=384),
        MANY,
        V["vectors"],
        cause="dimensions-of-the-model",
    ),
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
    Call(
        "embeddings: a name of OpenAI's",
        lambda: embed(b, model="text-embedding-3-small"),
        MANY,
        V["vectors"],
        cause="any-model-name",
    ),
    Call("models.list", a.models.list, "data.*.id", V["names"]),
    Call("models.retrieve", lambda: a.models.retrieve("cross"), "id", "cross", cause="vendors-paths"),
    Call("models.retrieve: async", lambda: asynchronous.models.retrieve("minilm"), "id", "minilm"),
    Call("error: model", lambda: embed(a, model="none"), error="The model `none` does not exist"),
    Call("error: too long", lambda: embed(a, input=V["long"]), error="maximum context length is 256 tokens"),
    Call("error: key", lambda: embed(wrong), error="missing or wrong API key"),
    Call("Azure: embeddings", lambda: embed(azure), MANY, V["vectors"], cause="headers-of-keys"),
    Call("Azure: deployment", lambda: embed(azure_deployment), MANY, V["vectors"], cause="vendors-paths"),
    Call("Azure: async", lambda: embed(azure_async), MANY, V["vectors"]),
    Call("Azure: base URL that ends in /v1", lambda: embed(azure_v1), MANY, V["vectors"]),
    Call(
        "files.create",
        lambda: a.files.create(file=("a.jsonl", b"{}"), purpose="batch"),
        fails=BATCHES,
    ),
    Call("batches.list", lambda: a.batches.list(), "data", [], fails=BATCHES),
]


def at(prefix: str) -> Callable[..., object]:
    """Embeddings of the dialect that a prefix of the path names."""

    def send(url: str, key: str = "none", **fields: object) -> object:
        return embed(OpenAI(api_key=key, base_url=f"{url}{prefix}/v1", max_retries=0), **fields)

    return send


def at_azure(url: str, key: str = "none", **fields: object) -> object:
    return embed(AzureOpenAI(api_key=key, azure_endpoint=url, api_version="2024-10-21", max_retries=0), **fields)


def posted(path: str, **body: object) -> Callable[..., object]:
    """A request of a path that the client has no method for."""

    def send(url: str, key: str = "none", **fields: object) -> object:
        client = OpenAI(api_key=key, base_url=url, max_retries=0)
        return client.post(path, body={**body, **fields}, cast_to=object)

    return send


IDS = {"type": ["a"], "large": [1000] * 500}
ERRORS = [
    *refusals(at(""), "input", OPENAI, says=EXACTLY),
    *refusals(at_azure, "input", OPENAI, of="Azure", says=EXACTLY),
    *refusals(at("/fastdeploy"), "input", OPENAI, of="FastDeploy", says=EXACTLY),
    *refusals(
        posted("/fastdeploy/v1/chat/reward", model="cross", prompt_token_ids=V["ids"]),
        "prompt_token_ids",
        OPENAI,
        of="FastDeploy, reward",
        says={"missing": "Exactly one of `messages` and `prompt_token_ids` must be given"},
        without=["long"],  # ids of the served model's own tokenizer, which this environment does not have
        **IDS,
    ),
    *refusals(at("/llamacpp"), "input", OPENAI, of="llama.cpp", says=EXACTLY),
    *refusals(
        posted("/llamacpp/embedding", model="minilm", content=V["text"]),
        "content",
        OPENAI,
        of="llama.cpp, embedding",
    ),
    *refusals(posted("/pooling", model="minilm", input=V["text"]), "input", OPENAI, of="vLLM", says=EXACTLY),
]
