"""pymilvus-model: Text Embeddings Inference and Jina, embeddings and rerankers."""

from __future__ import annotations

from pymilvus.model.dense import jinaai
from pymilvus.model.dense.tei import TEIEmbeddingFunction
from pymilvus.model.reranker import jinaai as jina_reranker
from pymilvus.model.reranker.tei import TEIRerankFunction

from clients.call import VALUES, A, Call

jinaai.API_URL = f"{A}/v1/embeddings"  # these have no parameter of it
jina_reranker.API_URL = f"{A}/v1/rerank"
V = VALUES
RANKED = "*.index,score"
CALLS = [
    Call("TEIEmbeddingFunction", lambda: TEIEmbeddingFunction(A)(V["texts"]), "", V["vectors"]),
    Call(
        "TEIRerankFunction",
        lambda: TEIRerankFunction(A)(V["question"], V["texts"]),
        RANKED,
        V["ranked"],
        cause="no-model-name",
    ),
    Call(
        "JinaEmbeddingFunction",
        lambda: jinaai.JinaEmbeddingFunction("minilm", "none").encode_documents(V["texts"]),
        "",
        V["vectors"],
    ),
    Call(
        "JinaRerankFunction",
        lambda: jina_reranker.JinaRerankFunction("cross", "none")(V["question"], V["texts"]),
        RANKED,
        V["ranked"],
    ),
]
ERRORS = [
    Call(
        "JinaEmbeddingFunction",
        lambda: jinaai.JinaEmbeddingFunction("none", "none").encode_documents(["a"]),
        error="The model `none` does not exist",
    ),
]
