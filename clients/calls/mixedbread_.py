"""mixedbread: reranking, and embeddings."""

from __future__ import annotations

from mixedbread import AsyncMixedbread, Mixedbread

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import EXACTLY, OPENAI, refusals

V = VALUES
MANY, RANKED = "data.*.embedding", "data.*.index,score"


def rerank(url: str, key: str = "none", **fields: object) -> object:
    """Send a query with its inputs; what is too long is refused, where Mixedbread has no word for it."""
    named = {"model": "cross"} if url == A else {"model": "minilm"}
    more = {"extra_body": {"truncate": False}, **named, **fields}
    client = Mixedbread(api_key=key, base_url=url, max_retries=0)
    return client.rerank(**{"query": V["question"], "input": V["texts"], **more})


def embed(url: str, key: str = "none", kind: type = Mixedbread, **fields: object) -> object:
    client = kind(api_key=key, base_url=url, max_retries=0)
    return client.embed(**{"model": "minilm", "input": V["texts"], **fields})


CALLS = []
ERRORS = [
    Call("rerank", lambda: rerank(A), RANKED, V["ranked"]),
    Call("rerank: top_k", lambda: rerank(A, top_k=2), RANKED, V["ranked"][:2]),
    Call(
        "rerank: return_input",
        lambda: rerank(A, return_input=True, top_k=1),
        "data.0.input",
        V["texts"][V["ranked"][0][0]],
    ),
    Call("embed", lambda: embed(B, KEY), MANY, V["vectors"]),
    Call("embed: async", lambda: embed(B, KEY, AsyncMixedbread), MANY, V["vectors"]),
    *refusals(rerank, "input", OPENAI, of="rerank", long=[V["long"]]),
    *refusals(embed, "input", OPENAI, of="embed", says=EXACTLY),
    *refusals(lambda *a, **k: embed(*a, kind=AsyncMixedbread, **k), "input", OPENAI, of="async", says=EXACTLY),
]
