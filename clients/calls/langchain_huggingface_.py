"""langchain-huggingface: `HuggingFaceEndpointEmbeddings`, which refuses URLs."""

from __future__ import annotations

from langchain_huggingface import HuggingFaceEndpointEmbeddings

from clients.call import VALUES, A, Call

V = VALUES
REFUSES = "the client takes no URL any more"


def endpoint() -> HuggingFaceEndpointEmbeddings:
    return HuggingFaceEndpointEmbeddings(model=f"{A}/models/minilm", huggingfacehub_api_token="none")


CALLS = [
    Call("embed_documents", lambda: endpoint().embed_documents(V["texts"]), "", V["vectors"], fails=REFUSES),
    Call("embed_query", lambda: endpoint().embed_query(V["text"]), "", V["vectors"][0], fails=REFUSES),
]
