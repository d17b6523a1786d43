"""llama-index: Jina's embeddings and rerank."""

from __future__ import annotations

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.jinaai import JinaEmbedding
from llama_index.postprocessor.jinaai_rerank import JinaRerank

from clients.call import VALUES, A, Call

V = VALUES


def embedding(**options: object) -> JinaEmbedding:
    client = JinaEmbedding(api_key="none", model="minilm", **options)
    client._api.api_url = f"{A}/v1/embeddings"  # it has no parameter of it
    return client


def rerank(model: str = "cross") -> list[list[object]]:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in V["texts"]]
    client = JinaRerank(top_n=2, model=model, base_url=f"{A}/v1", api_key="none")
    return [[V["texts"].index(n.text), n.score] for n in client.postprocess_nodes(nodes, query_str=V["question"])]


def signs(codes: list[list[int]]) -> list[list[int]]:
    return [[byte >> bit & 1 for byte in row for bit in range(7, -1, -1)] for row in codes]


CALLS = [
    Call("JinaEmbedding: text", lambda: embedding().get_text_embedding(V["text"]), "", V["vectors"][0]),
    Call("JinaEmbedding: batch, async", lambda: embedding().aget_text_embedding_batch(V["texts"]), "", V["vectors"]),
    Call(
        "JinaEmbedding: ubinary",
        lambda: embedding(encoding_documents="ubinary").get_text_embedding_batch(V["texts"]),
        "",
        signs(V["ubinary"]),
    ),
    Call(
        "JinaEmbedding: task",
        lambda: embedding(task="retrieval.passage").get_text_embedding_batch(V["texts"]),
        "",
        V["vectors"],
        cause="vendors-input-types",
    ),
    Call(
        "JinaEmbedding: late_chunking",
        lambda: embedding(late_chunking=True).get_text_embedding_batch(V["parts"]),
        "",
        V["chunks"],
        cause="late-chunking",
    ),
    Call("JinaRerank", rerank, "", V["ranked"][:2]),
]
ERRORS = [
    Call("JinaRerank", lambda: rerank("none"), error="The model `none` does not exist"),
]
