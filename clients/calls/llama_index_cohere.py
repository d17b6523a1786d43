"""llama-index: Cohere's embeddings, by Cohere's names of models only, and rerank."""

from __future__ import annotations

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.cohere import CohereEmbedding
from llama_index.postprocessor.cohere_rerank import CohereRerank

from clients.call import KEY, VALUES, A, B, Call

V = VALUES
NAME = "embed-english-v3.0"


def embedding(kind: str = "search_document") -> CohereEmbedding:
    return CohereEmbedding(api_key=KEY, base_url=B, model_name=NAME, input_type=kind)


def rerank(model: str = "cross") -> list[list[object]]:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in V["texts"]]
    client = CohereRerank(api_key="none", base_url=A, model=model, top_n=2)
    return [[V["texts"].index(n.text), n.score] for n in client.postprocess_nodes(nodes, query_str=V["question"])]


CALLS = [
    Call(
        "CohereEmbedding",
        lambda: embedding().get_text_embedding_batch(V["texts"]),
        "",
        V["document vectors"],
        cause="any-model-name",
    ),
    Call(
        "CohereEmbedding: query, async",
        lambda: embedding("search_query").aget_query_embedding(V["question"]),
        "",
        V["query vector"],
    ),
    Call("CohereRerank", rerank, "", V["ranked"][:2]),
    Call("error: CohereRerank, model", lambda: rerank("none"), error="The model `none` does not exist"),
]
