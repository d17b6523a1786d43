"""voyageai: vectors in every type, rerank, contextualized and multimodal embeddings, errors."""

from __future__ import annotations

from collections.abc import Callable

import voyageai

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import BIG, EXACTLY, LONG, refusals

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
    Call(
        "embed: input_type, no prompts",
        lambda: embed(a, input_type="document"),
        "embeddings",
        V["vectors"],
        cause="vendors-input-types",
    ),
    Call("embed: prompt of queries", lambda: embed(b, input_type="query"), "embeddings", V["query vectors"]),
    Call("embed: prompt of documents", lambda: embed(b, input_type="document"), "embeddings", V["document vectors"]),
    Call("embed: output_dimension", lambda: embed(b, output_dimension=V["size"]), "embeddings", V["small"]),
    Call("embed: float", lambda: embed(a, output_dtype="float"), "embeddings", V["vectors"]),
    *map(typed, ("int8", "uint8", "binary", "ubinary")),
    Call("embed: too long is cut", lambda: embed(a, texts=[V["long"]]), "embeddings", V["cut"]),
    Call(
        "embed: a name of Voyage's",
        lambda: embed(b, model="voyage-3"),
        "embeddings",
        V["vectors"],
        cause="any-model-name",
    ),
    Call("embed: usage", lambda: embed(a, texts=[V["text"]]), "total_tokens", len(V["ids"])),
    Call("embed: async", lambda: embed(asynchronous), "embeddings", V["vectors"]),
    Call("rerank", lambda: rerank(a), RANKED, V["ranked"]),
    Call("rerank: top_k", lambda: rerank(a, top_k=1), RANKED, V["ranked"][:1]),
    Call("rerank: async", lambda: rerank(asynchronous, "minilm"), RANKED, V["ranked by prompted vectors"]),
    Call("contextualized_embed", lambda: contextualized(a), "results.0.embeddings", V["chunks"], cause="vendors-paths"),
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
RAISES = {
    400: "InvalidRequestError",
    401: "AuthenticationError",
    404: "APIError",
    413: "APIError",
    429: "RateLimitError",
}


def bad(call: Callable[..., object], kind: type = voyageai.Client) -> Callable[..., object]:
    """A request that cuts nothing, of an endpoint."""

    def send(url: str, key: str = "none", **fields: object) -> object:
        return call(kind(api_key=key, base_url=f"{url}/v1"), **fields)

    return send


def uncut(client: object, **fields: object) -> object:
    return embed(client, truncation=False, **fields)


def uncut_rerank(client: object, **fields: object) -> object:
    return rerank(client, **{"truncation": False, **fields})


def uncut_multimodal(client: object, **fields: object) -> object:
    return multimodal(client, **{"truncation": False, **fields})


ERRORS = [  # the client refuses some of them by itself
    *refusals(bad(uncut), "texts", RAISES, says=EXACTLY),
    *refusals(bad(uncut, voyageai.AsyncClient), "texts", RAISES, of="async", says=EXACTLY),
    *refusals(bad(uncut_rerank), "documents", RAISES, of="rerank"),
    *refusals(
        bad(contextualized),
        "inputs",
        RAISES,
        of="contextualized_embed",
        without=["missing"],
        long=[[LONG]],
    ),
    *refusals(
        bad(uncut_multimodal),
        "inputs",
        RAISES,
        of="multimodal_embed",
        without=["missing", "type"],
        long=[[LONG]],
        large=[[BIG]],
    ),
]
