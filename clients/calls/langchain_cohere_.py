"""langchain-cohere: embeddings and a compressor that reranks."""

from __future__ import annotations

from langchain_cohere import CohereEmbeddings, CohereRerank
from langchain_core.documents import Document

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import BIG, COHERE, refusals

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
        "CohereRerank.rerank",
        lambda: rerank.rerank(V["texts"], V["question"]),
        "*.index,relevance_score",
        V["ranked"],
        cause="null-fields",
    ),
    Call(
        "CohereRerank.compress_documents",
        lambda: rerank.compress_documents([Document(page_content=text) for text in V["texts"]], V["question"]),
        ranks,
        V["ranked"],
    ),
    Call("error: model", lambda: wrong.rerank(V["texts"], V["question"]), error="The model `none` does not exist"),
]


def bad_embed(url: str, key: str = "none", model: str = "minilm", texts: object = V["texts"]) -> object:
    return CohereEmbeddings(model=model, base_url=url, cohere_api_key=key, max_retries=0).embed_documents(texts)


def bad_rerank(url: str, key: str = "none", model: str = "", texts: object = V["texts"]) -> object:
    name = model or ("cross" if url == A else "minilm")
    return CohereRerank(model=name, base_url=url, cohere_api_key=key).rerank(texts, V["question"])


ERRORS = [  # texts that are too long are cut
    *refusals(bad_embed, "texts", COHERE, without=["missing", "long"], large=[BIG]),
    *refusals(bad_rerank, "texts", COHERE, of="CohereRerank", without=["missing", "type", "long"], large=[BIG]),
]
