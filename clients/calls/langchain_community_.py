"""langchain-community: Jina, Infinity, the hub's API, NeMo, Ollama, llamafile, TextEmbed; rerankers of two."""

from __future__ import annotations

from infinity_client.client import Client
from langchain_community.document_compressors import InfinityRerank, JinaRerank, jina_rerank
from langchain_community.embeddings import (
    HuggingFaceInferenceAPIEmbeddings,
    InfinityEmbeddings,
    JinaEmbeddings,
    LlamafileEmbeddings,
    NeMoEmbeddings,
    OllamaEmbeddings,
    TextEmbedEmbeddings,
    jina,
)
from langchain_core.documents import Document

from clients.call import VALUES, A, Call
from clients.refusals import refusals

jina.JINA_API_URL = f"{A}/v1/embeddings"  # these have no parameter of it
jina_rerank.JINA_API_URL = f"{A}/v1/rerank"
V = VALUES
CLIENT_FAULT = "the client's own path is /v1/embedding, which no server of its dialect has"


def infinity() -> InfinityEmbeddings:
    return InfinityEmbeddings(model="minilm", infinity_api_url=f"{A}/infinity")


def jina_embeddings(model: str = "minilm") -> JinaEmbeddings:
    return JinaEmbeddings(jina_api_key="none", model_name=model)


def hub() -> HuggingFaceInferenceAPIEmbeddings:
    return HuggingFaceInferenceAPIEmbeddings(api_key="none", api_url=f"{A}/models/minilm")


def nemo() -> NeMoEmbeddings:
    return NeMoEmbeddings(model="minilm", api_endpoint_url=f"{A}/v1/embeddings")


def ollama() -> OllamaEmbeddings:
    return OllamaEmbeddings(base_url=A, model="minilm", embed_instruction="", query_instruction="")


def llamafile() -> LlamafileEmbeddings:
    return LlamafileEmbeddings(base_url=f"{A}/models/minilm")


def text_embed() -> TextEmbedEmbeddings:
    return TextEmbedEmbeddings(model="minilm", api_url=f"{A}/v1", api_key="none")


RERANK = {
    "JinaRerank": lambda: JinaRerank(jina_api_key="none", model="cross"),
    "InfinityRerank": lambda: InfinityRerank(client=Client(base_url=f"{A}/infinity"), model="cross"),
}


def compress(name: str) -> list[list[object]]:
    documents = RERANK[name]().compress_documents([Document(page_content=text) for text in V["texts"]], V["question"])
    return [[V["texts"].index(d.page_content), d.metadata["relevance_score"]] for d in documents]


def rerank(name: str) -> object:
    return RERANK[name]().rerank([Document(page_content=text) for text in V["texts"]], V["question"])


CALLS = [
    *(
        Call(f"{kind.__name__}.embed_documents", lambda kind=kind: kind().embed_documents(V["texts"]), "", V["vectors"])
        for kind in (jina_embeddings, infinity, hub, nemo, ollama, llamafile)
    ),
    *(
        Call(f"{kind.__name__}.embed_query", lambda kind=kind: kind().embed_query(V["text"]), "", V["vectors"][0])
        for kind in (jina_embeddings, infinity, ollama)
    ),
    Call(
        "text_embed.embed_documents",
        lambda: text_embed().embed_documents(V["texts"]),
        "",
        V["vectors"],
        fails=CLIENT_FAULT,
    ),
    Call("infinity.aembed_documents", lambda: infinity().aembed_documents(V["texts"]), "", V["vectors"]),
    *(Call(f"{name}.compress_documents", lambda name=name: compress(name), "", V["ranked"]) for name in RERANK),
    *(
        Call(f"{name}.rerank", lambda name=name: rerank(name), "*.index,relevance_score", V["ranked"])
        for name in RERANK
    ),
    Call(
        "error: Jina, model", lambda: jina_embeddings("none").embed_query("a"), error="The model `none` does not exist"
    ),
]


def bad_jina(url: str, key: str = "none", model: str = "minilm", text: object = V["text"]) -> object:
    """A query for Jina's embeddings, whose URL is a variable of their module."""
    place, jina.JINA_API_URL = jina.JINA_API_URL, f"{url}/v1/embeddings"
    try:
        return JinaEmbeddings(jina_api_key=key, model_name=model).embed_query(text)
    finally:
        jina.JINA_API_URL = place


ERRORS = refusals(bad_jina, "text", "RuntimeError", of="JinaEmbeddings", says={"missing": "validation error"})
