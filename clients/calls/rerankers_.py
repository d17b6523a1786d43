"""rerankers: `APIRanker` of every provider whose URL can be set."""

from __future__ import annotations

from rerankers.documents import Document
from rerankers.models.api_rankers import APIRanker

from clients.call import VALUES, A, Call

V = VALUES
ISAACUS = "Isaacus's own path and answer are not served"


def rank(provider: str, path: str, model: str = "cross") -> object:
    return APIRanker(model, "none", provider, 0, f"{A}{path}").rank(V["question"], V["texts"])


def score(provider: str, path: str) -> object:
    return APIRanker("cross", "none", provider, 0, f"{A}{path}").score(V["question"], Document(text=V["text"]))


def places(answer: object) -> list[list[object]]:
    return [[result.document.doc_id, result.score] for result in answer.results]


SERVED = {
    "cohere": "/v1/rerank", "jina": "/v1/rerank", "voyage": "/v1/rerank", "mixedbread.ai": "/v1/reranking",
    "text-embeddings-inference": "/rerank",
}  # fmt: skip
PINECONE = "it reads `data[].score` of a request that is Jina's by its keys"
CALLS = [
    *(
        Call(f"rank: {provider}", lambda provider=provider, path=path: rank(provider, path), places, V["ranked"])
        for provider, path in SERVED.items()
    ),
    Call("score: jina", lambda: score("jina", "/v1/rerank"), "", dict(V["ranked"])[0]),
    Call("rank: pinecone", lambda: rank("pinecone", "/rerank"), places, V["ranked"], fails=PINECONE),
    Call("rank: isaacus", lambda: rank("isaacus", "/v1/rerankings"), places, V["ranked"], fails=ISAACUS),
]
MUTE = "the client does not look at the status"
ERRORS = [
    Call("jina", lambda: rank("jina", "/v1/rerank", "none"), error="does not exist", fails=MUTE),
]
