"""llama-index: Voyage's embeddings and rerank, with the release of voyageai that they pin."""

from __future__ import annotations

import voyageai
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.voyageai import VoyageEmbedding
from llama_index.postprocessor.voyageai_rerank import VoyageAIRerank

from clients.call import FULL, VALUES, A, B, C, Call

V = VALUES
voyageai.api_base = f"{A}/v1"


def embedding(model: str = "minilm", url: str = f"{A}/v1") -> VoyageEmbedding:
    client = VoyageEmbedding(model_name=model, voyage_api_key="none")
    for part in (client._client, client._aclient):
        part._params["base_url"] = url  # it has no parameter of it
        part.tokenize = lambda texts, model: [text.split() for text in texts]  # it would fetch a tokenizer
    return client


def rerank() -> list[list[object]]:
    client = VoyageAIRerank(model="cross", api_key="none", top_n=2)
    client._client._params["base_url"] = f"{A}/v1"
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in V["texts"]]
    return [[V["texts"].index(n.text), n.score] for n in client.postprocess_nodes(nodes, query_str=V["question"])]


CALLS = [
    Call("VoyageEmbedding", lambda: embedding().get_text_embedding_batch(V["texts"]), "", V["vectors"]),
    Call(
        "error: VoyageEmbedding, model",
        lambda: embedding("none").get_query_embedding("a"),
        error="`none` does not exist",
    ),
    Call("VoyageAIRerank", rerank, "", V["ranked"][:2]),
]
ERRORS = [  # this release fails on an `error` that is an object: the keys of the body tell the dialect
    Call(
        "VoyageEmbedding: key",
        lambda: embedding(url=f"{B}/v1").get_query_embedding("a"),
        error="missing or wrong API key",
    ),
    Call("VoyageEmbedding: overload", lambda: embedding(url=f"{C}/v1").get_query_embedding("a"), error=FULL),
]
