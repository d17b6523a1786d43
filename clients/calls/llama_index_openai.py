"""llama-index: `OpenAILikeEmbedding` and `OpenAIEmbedding`."""

from __future__ import annotations

from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

from clients.call import KEY, VALUES, A, B, Call

V = VALUES
a, b = {"api_base": f"{A}/v1", "api_key": "none"}, {"api_base": f"{B}/v1", "api_key": KEY}
minilm = OpenAILikeEmbedding(model_name="minilm", **a)
small = OpenAILikeEmbedding(model_name="minilm", dimensions=V["size"], **b)
CALLS = [
    Call("OpenAILikeEmbedding: text", lambda: minilm.get_text_embedding(V["text"]), "", V["vectors"][0]),
    Call("OpenAILikeEmbedding: batch", lambda: minilm.get_text_embedding_batch(V["texts"]), "", V["vectors"]),
    Call("OpenAILikeEmbedding: async", lambda: minilm.aget_text_embedding_batch(V["texts"]), "", V["vectors"]),
    Call("OpenAILikeEmbedding: dimensions", lambda: small.get_text_embedding_batch(V["texts"]), "", V["small"]),
    Call(
        "OpenAIEmbedding: default model",
        lambda: OpenAIEmbedding(**b).get_query_embedding(V["text"]),
        "",
        V["vectors"][0],
    ),
    Call(
        "error: model",
        lambda: OpenAILikeEmbedding(model_name="none", **a, max_retries=0).get_text_embedding("a"),
        error="The model `none` does not exist",
    ),
]
