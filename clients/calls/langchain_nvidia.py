"""langchain-nvidia-ai-endpoints: NIM's embeddings and its ranking."""

from __future__ import annotations

import warnings

from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings, NVIDIARerank

from clients.call import VALUES, A, Call
from clients.refusals import BIG, LONG, refusals

V = VALUES


def embed(url: str, key: str = "none", model: str = "minilm", texts: object = V["texts"]) -> object:
    """Embed documents; NONE refuses what is too long."""
    with warnings.catch_warnings(action="ignore"):  # of names that are not NVIDIA's
        client = NVIDIAEmbeddings(model=model, base_url=f"{url}/v1", nvidia_api_key=key, truncate="NONE")
    return client.embed_documents(texts)


def rerank(url: str, key: str = "none", model: str = "", texts: object = V["texts"]) -> object:
    name = model or ("cross" if url == A else "minilm")
    with warnings.catch_warnings(action="ignore"):
        client = NVIDIARerank(model=name, base_url=f"{url}/v1", nvidia_api_key=key, truncate="NONE")
    return client.compress_documents([Document(page_content=text) for text in texts], V["question"])


def ranks(documents: list[Document]) -> list[list[object]]:
    return [[V["texts"].index(d.page_content), d.metadata["relevance_score"]] for d in documents]


CALLS = []
SENT = {"without": ["missing", "type"], "long": [LONG], "large": [BIG]}
"""The client refuses what is no list of texts."""
ERRORS = [
    Call("NVIDIAEmbeddings.embed_documents", lambda: embed(A), "", V["vectors"]),
    Call("NVIDIARerank.compress_documents", lambda: rerank(A), ranks, V["ranked raw"]),
    *refusals(embed, "texts", "Exception", of="NVIDIAEmbeddings", **SENT),
    *refusals(rerank, "texts", "Exception", of="NVIDIARerank", **SENT),
]
