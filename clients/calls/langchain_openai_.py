"""langchain-openai: `OpenAIEmbeddings` as it is, which sends ids of another tokenizer, and with text; Azure."""

from __future__ import annotations

from langchain_openai import AzureOpenAIEmbeddings, OpenAIEmbeddings

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import BIG, LONG, OPENAI, refusals

V = VALUES
a = {"model": "minilm", "base_url": f"{A}/v1", "api_key": "none"}
b = {"model": "minilm", "base_url": f"{B}/v1", "api_key": KEY}
azure = {
    "azure_endpoint": B,
    "azure_deployment": "minilm",
    "api_key": KEY,
    "api_version": "2024-10-21",
    "model": "minilm",
}


def text(place: dict[str, str], **fields: object) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(**{**place, "check_embedding_ctx_length": False, **fields})


CALLS = [
    Call("embed_documents: text", lambda: text(a).embed_documents(V["texts"]), "", V["vectors"]),
    Call("embed_query: text", lambda: text(a).embed_query(V["text"]), "", V["vectors"][0]),
    Call("aembed_documents: text", lambda: text(b).aembed_documents(V["texts"]), "", V["vectors"]),
    Call(
        "embed_documents: dimensions", lambda: text(b, dimensions=V["size"]).embed_documents(V["texts"]), "", V["small"]
    ),
    Call(
        "embed_documents: default model",
        lambda: text(b, model="text-embedding-ada-002").embed_documents(V["texts"]),
        "",
        V["vectors"],
    ),
    Call("error: model", lambda: text(a, model="none").embed_query("a"), error="The model `none` does not exist"),
    Call(
        "Azure",
        lambda: AzureOpenAIEmbeddings(**azure, check_embedding_ctx_length=False).embed_documents(V["texts"]),
        "",
        V["vectors"],
    ),
    Call(
        "embed_documents: foreign ids are refused",
        lambda: OpenAIEmbeddings(**a).embed_documents(V["texts"]),
        error="check_embedding_ctx_length=False",
        cause="token-ids-of-another-tokenizer",
    ),
    Call(
        "embed_documents: ids of cl100k",
        lambda: OpenAIEmbeddings(**b).embed_documents(V["texts"]),
        "",
        V["vectors"],
        cause="token-ids-of-another-tokenizer",
    ),
    Call(
        "aembed_documents: ids of cl100k",
        lambda: OpenAIEmbeddings(**b).aembed_documents(V["texts"]),
        "",
        V["vectors"],
        cause="token-ids-of-another-tokenizer",
    ),
]


def bad(url: str, key: str = "none", model: str = "minilm", texts: object = V["texts"]) -> object:
    return text({"base_url": f"{url}/v1", "api_key": key}, model=model, max_retries=0).embed_documents(texts)


ERRORS = refusals(
    bad,
    "texts",
    OPENAI,
    without=["missing", "type"],  # it refuses what is no text
    long=[LONG],
    large=[BIG],
)
