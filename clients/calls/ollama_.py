"""ollama and langchain-ollama."""

from __future__ import annotations

from langchain_ollama import OllamaEmbeddings
from ollama import AsyncClient, Client

from clients.call import FULL, LARGE, VALUES, A, B, C, Call

V = VALUES
client = Client(host=A)
CALLS = [
    Call("embed", lambda: client.embed(model="minilm", input=V["texts"]), "embeddings", V["vectors"]),
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
wrong = Client(host=B, headers={"Authorization": "Bearer wrong"})
full = Client(host=C)
LONG = "one " * 300
ERRORS = [
    Call("key", lambda: wrong.embed(model="minilm", input="a"), error="missing or wrong API key"),
    Call("too long", lambda: client.embed(model="minilm", input=LONG, truncate=False), error="maximum context length"),
    Call("overload", lambda: full.embed(model="minilm", input="a"), error=FULL),
    Call("a body that is too large", lambda: full.embed(model="minilm", input="deep " * 500), error=LARGE),
]
