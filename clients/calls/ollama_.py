"""ollama and langchain-ollama."""

from __future__ import annotations

from langchain_ollama import OllamaEmbeddings
from ollama import AsyncClient, Client

from clients.call import VALUES, A, Call
from clients.refusals import refusals

V = VALUES
client = Client(host=A)
CALLS = [
    Call(
        "embed",
        lambda: client.embed(model="minilm", input=V["texts"]),
        "embeddings",
        V["vectors"],
        cause="vendors-paths",
    ),
    Call("embeddings", lambda: client.embeddings(model="minilm", prompt=V["text"]), "embedding", V["vectors"][0]),
    Call("list", client.list, "models.*.model", V["names"]),
    Call(
        "error: model, async", lambda: AsyncClient(host=A).embed(model="none", input="a"), error="`none` does not exist"
    ),
    Call(
        "OllamaEmbeddings.embed_documents",
        lambda: OllamaEmbeddings(model="minilm", base_url=A).embed_documents(V["texts"]),
        "",
        V["vectors"],
    ),
]


def bad(url: str, key: str = "none", **fields: object) -> object:
    client = Client(host=url, headers={"Authorization": f"Bearer {key}"})
    return client.embed(**{"model": "minilm", "input": V["text"], "truncate": False, **fields})


def bad_old(url: str, key: str = "none", **fields: object) -> object:
    client = Client(host=url, headers={"Authorization": f"Bearer {key}"})
    return client.embeddings(**{"model": "minilm", "prompt": V["text"], **fields})


def bad_langchain(url: str, key: str = "none", model: str = "minilm", text: str = "a") -> object:
    options = {"headers": {"Authorization": f"Bearer {key}"}}
    return OllamaEmbeddings(model=model, base_url=url, client_kwargs=options).embed_documents([text])


OWN = ["missing", "type"]
"""The client refuses these by itself; the other forms always cut."""
ERRORS = [
    *refusals(bad, "input", "ResponseError", without=OWN),
    *refusals(bad_old, "prompt", "ResponseError", of="embeddings", without=["type", "long"]),
    *refusals(bad_langchain, "text", "ResponseError", of="OllamaEmbeddings", without=[*OWN, "long"]),
]
