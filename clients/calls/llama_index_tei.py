"""llama-index: Text Embeddings Inference, its rerank, and Hugging Face's API, with a URL for each model."""

from __future__ import annotations

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.huggingface_api import HuggingFaceInferenceAPIEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

from clients.call import KEY, VALUES, A, B, Call

V = VALUES
tei = TextEmbeddingsInference(model_name="minilm", base_url=f"{A}/models/minilm")
keyless = TextEmbeddingsInference(model_name="minilm", base_url=B)
keyed = TextEmbeddingsInference(model_name="minilm", base_url=B, auth_token=KEY)
rerank = TextEmbeddingInference(base_url=f"{A}/models/cross", top_n=3)


def api() -> HuggingFaceInferenceAPIEmbedding:
    return HuggingFaceInferenceAPIEmbedding(model_name=f"{A}/models/minilm", token="none")


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text)) for text in V["texts"]]


def ranks(ranked: list[NodeWithScore]) -> list[list[object]]:
    return [[V["texts"].index(node.text), node.score] for node in ranked]


CALLS = [
    Call(
        "TextEmbeddingsInference: text",
        lambda: tei.get_text_embedding(V["text"]),
        "",
        V["vectors"][0],
        cause="url-per-model",
    ),
    Call("TextEmbeddingsInference: batch", lambda: tei.get_text_embedding_batch(V["texts"]), "", V["vectors"]),
    Call("TextEmbeddingsInference: async, key", lambda: keyed.aget_text_embedding_batch(V["texts"]), "", V["vectors"]),
    Call(
        "TextEmbeddingInference: rerank",
        lambda: rerank.postprocess_nodes(nodes(), query_str=V["question"]),
        ranks,
        V["ranked"],
    ),
    Call("HuggingFaceInferenceAPIEmbedding", lambda: api().get_text_embedding_batch(V["texts"]), "", V["vectors"]),
    Call(
        "HuggingFaceInferenceAPIEmbedding: async", lambda: api().aget_text_embedding_batch(V["texts"]), "", V["vectors"]
    ),
]
MUTE = "the client does not look at the status"
ERRORS = [
    Call(
        "TextEmbeddingsInference",
        lambda: keyless.get_text_embedding("a"),
        error="missing or wrong API key",
        fails=MUTE,
    ),
]
