"""langchain-cohere: embeddings and a compressor that reranks."""

from __future__ import annotations

from langchain_cohere import CohereEmbeddings, CohereRerank
from langchain_core.documents import Document

from clients.call import KEY, VALUES, A, B, Call

V = VALUES
a = CohereEmbeddings(model="minilm", base_url=A, cohere_api_key="none")
b = CohereEmbeddings(model="minilm", base_url=B, cohere_api_key=KEY)
rerank = CohereRerank(model="cross", base_url=A, cohere_api_key="none", top_n=3)
wrong = CohereRerank(model="none", base_url=A, cohere_api_key="none")


def ranks(documents: list[Document]) -> list[list[object]]:
    return [[V["texts"].index(d.page_content), d.metadata["relevance_score"]] for d in documents]


CALLS = [
    Call("CohereEmbeddings.embed_documents", lambda: a.embed_documents(V["texts"]), "", V["vectors"]),
    Call("CohereEmbeddings.embed_query: prompt", lambda: b.embed_query(V["question"]), "", V["query vector"]),
    Call(
        "CohereEmbeddings.aembed_documents: prompt", lambda: b.aembed_documents(V["texts"]), "", V["document vectors"]
    ),
    Call(
        "CohereRerank.rerank", lambda: rerank.rerank(V["texts"], V["question"]), "*.index,relevance_score", V["ranked"]
    ),
    Call(
        "CohereRerank.compress_documents",
        lambda: rerank.compress_documents([Document(page_content=text) for text in V["texts"]], V["question"]),
        ranks,
        V["ranked"],
    ),
    Call("error: model", lambda: wrong.rerank(V["texts"], V["question"]), error="The model `none` does not exist"),
]
