"""langchain-voyageai: embeddings and a compressor that reranks."""

from __future__ import annotations

from langchain_core.documents import Document
from langchain_voyageai import VoyageAIEmbeddings, VoyageAIRerank

from clients.call import KEY, VALUES, A, B, Call

V = VALUES
a, b = {"api_key": "none", "base_url": f"{A}/v1"}, {"api_key": KEY, "base_url": f"{B}/v1", "model": "minilm"}


def unmeasured(embeddings: VoyageAIEmbeddings) -> VoyageAIEmbeddings:
    """Without the tokenizer that it would fetch to count tokens."""
    for client in (embeddings._client, embeddings._aclient):
        client.tokenize = lambda texts, model: [text.split() for text in texts]
    return embeddings


minilm, prompted = (unmeasured(VoyageAIEmbeddings(**{"model": "minilm", **place})) for place in (a, b))
wrong = unmeasured(VoyageAIEmbeddings(model="none", **a))
reranker = VoyageAIRerank(**a, model="cross", top_k=2)


def ranks(documents: list[Document]) -> list[list[object]]:
    return [[V["texts"].index(d.page_content), d.metadata["relevance_score"]] for d in documents]


CALLS = [
    Call("embed_documents", lambda: minilm.embed_documents(V["texts"]), "", V["vectors"]),
    Call("embed_query: prompt", lambda: prompted.embed_query(V["question"]), "", V["query vector"]),
    Call("aembed_documents: prompt", lambda: prompted.aembed_documents(V["texts"]), "", V["document vectors"]),
    Call(
        "compress_documents",
        lambda: reranker.compress_documents([Document(page_content=text) for text in V["texts"]], V["question"]),
        ranks,
        V["ranked"][:2],
    ),
]
ERRORS = [
    Call("embed_query", lambda: wrong.embed_query("a"), error="The model `none` does not exist"),
]
