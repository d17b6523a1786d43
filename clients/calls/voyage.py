"""voyageai: vectors in every type, rerank, contextualized and multimodal embeddings, errors."""

from __future__ import annotations

import voyageai

from clients.call import FULL, KEY, LARGE, VALUES, A, B, C, Call

V = VALUES
a = voyageai.Client(api_key="none", base_url=f"{A}/v1")
b = voyageai.Client(api_key=KEY, base_url=f"{B}/v1")
wrong = voyageai.Client(api_key="wrong", base_url=f"{B}/v1")
asynchronous = voyageai.AsyncClient(api_key=KEY, base_url=f"{B}/v1")
RANKED = "results.*.index,relevance_score"


def embed(client: object, **fields: object) -> object:
    return client.embed(**{"texts": V["texts"], "model": "minilm", **fields})


def rerank(client: object, model: str = "cross", **fields: object) -> object:
    return client.rerank(**{"query": V["question"], "documents": V["texts"], "model": model, **fields})


def contextualized(client: object, **fields: object) -> object:
    return client.contextualized_embed(**{"inputs": [V["parts"]], "model": "minilm", **fields})


def multimodal(client: object, **fields: object) -> object:
    return client.multimodal_embed(**{"inputs": [[text] for text in V["texts"]], "model": "minilm", **fields})


def typed(name: str) -> Call:
    return Call(f"embed: {name}", lambda: embed(a, output_dtype=name), "embeddings", V[name])


CALLS = [
    Call("embed", lambda: embed(a), "embeddings", V["vectors"]),
    Call("embed: input_type, no prompts", lambda: embed(a, input_type="document"), "embeddings", V["vectors"]),
    Call("embed: prompt of queries", lambda: embed(b, input_type="query"), "embeddings", V["query vectors"]),
    Call("embed: prompt of documents", lambda: embed(b, input_type="document"), "embeddings", V["document vectors"]),
    Call("embed: output_dimension", lambda: embed(b, output_dimension=V["size"]), "embeddings", V["small"]),
    Call("embed: float", lambda: embed(a, output_dtype="float"), "embeddings", V["vectors"]),
    *map(typed, ("int8", "uint8", "binary", "ubinary")),
    Call("embed: too long is cut", lambda: embed(a, texts=[V["long"]]), "embeddings", V["cut"]),
    Call("embed: a name of Voyage's", lambda: embed(b, model="voyage-3"), "embeddings", V["vectors"]),
    Call("embed: usage", lambda: embed(a, texts=[V["text"]]), "total_tokens", len(V["ids"])),
    Call("embed: async", lambda: embed(asynchronous), "embeddings", V["vectors"]),
    Call("rerank", lambda: rerank(a), RANKED, V["ranked"]),
    Call("rerank: top_k", lambda: rerank(a, top_k=1), RANKED, V["ranked"][:1]),
    Call("rerank: async", lambda: rerank(asynchronous, "minilm"), RANKED, V["ranked by prompted vectors"]),
    Call("contextualized_embed", lambda: contextualized(a), "results.0.embeddings", V["chunks"]),
    Call("contextualized_embed: async", lambda: contextualized(asynchronous), "results.0.embeddings", V["chunks"]),
    Call("multimodal_embed: text", lambda: multimodal(a), "embeddings", V["vectors"]),
    Call("error: model", lambda: embed(a, model="voyage-3"), error="The model `voyage-3` does not exist"),
    Call(
        "error: truncation False",
        lambda: embed(a, texts=[V["long"]], truncation=False),
        error="maximum context length is 256 tokens",
    ),
    Call("error: key", lambda: embed(wrong), error="missing or wrong API key"),
]
full = voyageai.Client(api_key="none", base_url=f"{C}/v1")
ERRORS = [
    Call("overload", lambda: embed(full), error=FULL),
    Call("overload: rerank", lambda: rerank(full), error=FULL),
    Call("a body that is too large", lambda: embed(full, texts=["deep " * 500]), error=LARGE),
]
