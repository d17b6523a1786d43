"""cohere: `ClientV2`, `Client` and their asynchronous forms; the same calls by releases 5 and 7."""

from __future__ import annotations

import cohere

from clients.call import KEY, VALUES, A, B, Call, floats
from clients.refusals import BIG, COHERE, LONG, refusals

V = VALUES
a, b = cohere.ClientV2(api_key="none", base_url=A), cohere.ClientV2(api_key=KEY, base_url=B)
old = cohere.Client(api_key="none", base_url=A)
wrong = cohere.ClientV2(api_key="wrong", base_url=B)
asynchronous = cohere.AsyncClientV2(api_key=KEY, base_url=B)
old_async = cohere.AsyncClient(api_key="none", base_url=A)
FLOATS = "embeddings.float_"
RANKED = "results.*.index,relevance_score"
LEARNS = "classify learns from examples in the request, which a pooling model does not"
JOBS = "jobs over data sets are no routes of a server that answers at once"


def embed(client: object, kind: str = "search_document", **fields: object) -> object:
    fields = {"texts": V["texts"], **fields} if "inputs" not in fields else fields
    return client.embed(**{"model": "minilm", "input_type": kind, "embedding_types": ["float"], **fields})


def typed(name: str) -> Call:
    def codes(answer: object) -> object:
        return getattr(answer.embeddings, name)

    return Call(f"embed: {name}", lambda: embed(b, embedding_types=[name]), codes, V[f"document {name}"])


def rerank(client: object, model: str = "cross", **fields: object) -> object:
    return client.rerank(**{"model": model, "query": V["question"], "documents": V["texts"], **fields})


OBJECTS = [{"title": "x", "body": text} for text in V["texts"]]
CONTENT = [{"content": [{"type": "text", "text": text}]} for text in V["texts"]]

CALLS = [
    *(
        Call(
            f"embed: input_type {kind}, no prompts",
            lambda kind=kind: embed(a, kind),
            FLOATS,
            V["vectors"],
            cause="vendors-input-types",
        )
        for kind in ("search_document", "search_query", "classification", "clustering")
    ),
    Call("embed: float", lambda: embed(b), FLOATS, V["document vectors"]),
    Call("embed: prompt of queries", lambda: embed(b, "search_query"), FLOATS, V["query vectors"]),
    *map(typed, ("int8", "uint8", "binary", "ubinary")),
    Call(
        "embed: base64",
        lambda: embed(b, embedding_types=["base64"]),
        lambda answer: [floats(code) for code in answer.embeddings.base64],
        V["document vectors"],
    ),
    Call("embed: several types", lambda: embed(b, embedding_types=["int8", "float"]), FLOATS, V["document vectors"]),
    Call("embed: inputs of content", lambda: embed(a, inputs=CONTENT), FLOATS, V["vectors"], cause="objects-for-texts"),
    Call("embed: output_dimension", lambda: embed(b, output_dimension=V["size"]), FLOATS, V["small document"]),
    Call("embed: too long is cut", lambda: embed(a, texts=[V["long"]]), FLOATS, V["cut"]),
    Call(
        "error: truncate NONE",
        lambda: embed(a, texts=[V["long"]], truncate="NONE"),
        error="maximum context length is 256 tokens",
    ),
    Call("embed: 210 texts", lambda: embed(a, texts=V["texts"] * 70), FLOATS, V["vectors"] * 70),
    Call(
        "embed: billed units",
        lambda: embed(a, texts=[V["text"]]),
        "meta.billed_units.input_tokens",
        float(len(V["ids"])),
    ),
    Call("embed: async", lambda: embed(asynchronous), FLOATS, V["document vectors"]),
    Call("rerank", lambda: rerank(a), RANKED, V["ranked"]),
    Call("rerank: top_n", lambda: rerank(a, top_n=2), RANKED, V["ranked"][:2]),
    Call("rerank: by vectors", lambda: rerank(a, "minilm"), RANKED, V["ranked by vectors"]),
    Call(
        "rerank: too long is cut",
        lambda: rerank(a, documents=[V["text"], V["long"]]),
        RANKED,
        V["ranked cut"],
        cause="long-documents",
    ),
    Call(
        "rerank: max_tokens_per_doc above the model's",
        lambda: rerank(a, max_tokens_per_doc=4096),
        RANKED,
        V["ranked"],
        cause="long-documents",
    ),
    Call("rerank: async", lambda: rerank(asynchronous, "minilm"), RANKED, V["ranked by prompted vectors"]),
    Call("error: model", lambda: embed(a, model="embed-v4.0"), error="The model `embed-v4.0` does not exist"),
    Call("error: input_type", lambda: embed(a, "poem"), error="Unsupported input_type 'poem'"),
    Call("error: key", lambda: embed(wrong), error="missing or wrong API key"),
    Call("models.list", lambda: a.models.list(), "models.*.name", V["names"], cause="vendors-paths"),
    Call("models.get", lambda: a.models.get("cross"), "name", "cross"),
    Call("tokenize", lambda: a.tokenize(text=V["text"], model="minilm", offline=False), "tokens", V["ids"][1:-1]),
    Call(
        "detokenize",
        lambda: a.detokenize(tokens=V["ids"][1:-1], model="minilm", offline=False),
        "text",
        V["text"].lower(),
    ),
    Call("v1 embed", lambda: embed(old, embedding_types=None), "embeddings", V["vectors"]),
    Call("v1 embed: types", lambda: embed(old), FLOATS, V["vectors"]),
    Call(
        "v1 rerank: rank_fields",
        lambda: rerank(old, documents=OBJECTS, rank_fields=["body"]),
        RANKED,
        V["ranked"],
    ),
    Call(
        "v1 rerank: return_documents",
        lambda: rerank(old, return_documents=True, top_n=1),
        "results.*.document.text",
        [V["texts"][V["ranked"][0][0]]],
        cause="answers-of-several-vendors",
    ),
    Call("classify", lambda: a.classify(model="classes", inputs=V["texts"], examples=[]), fails=LEARNS),
    Call("embed_jobs.list", lambda: a.embed_jobs.list(), "embed_jobs", [], fails=JOBS),
]
ONCE = {"request_options": {"max_retries": 0}}


def bad_embed(url: str, key: str = "none", **fields: object) -> object:
    return embed(cohere.ClientV2(api_key=key, base_url=url), truncate="NONE", **ONCE, **fields)


def bad_rerank(url: str, key: str = "none", **fields: object) -> object:
    model = "cross" if url == A else "minilm"
    return rerank(cohere.ClientV2(api_key=key, base_url=url), **{"model": model, **ONCE, **fields})


def bad_old(url: str, key: str = "none", **fields: object) -> object:
    return embed(cohere.Client(api_key=key, base_url=url), truncate="NONE", **ONCE, **fields)


def bad_async(url: str, key: str = "none", **fields: object) -> object:
    return embed(cohere.AsyncClientV2(api_key=key, base_url=url), truncate="NONE", **ONCE, **fields)


TEXTS = {
    "long": [LONG],
    "large": [BIG],
    "says": {"missing": "Exactly one of texts, images, or inputs must be provided"},
}
ERRORS = [
    *refusals(bad_embed, "texts", COHERE, **TEXTS),
    *refusals(bad_async, "texts", COHERE, of="async", **TEXTS),
    *refusals(bad_old, "texts", COHERE, of="v1", without=["missing"], **TEXTS),
    *refusals(bad_rerank, "documents", COHERE, of="rerank", without=["long"]),  # Cohere's always cuts
]
