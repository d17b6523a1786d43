"""huggingface-api-haystack: embedders and ranker of Text Embeddings Inference; the ranker has no URL for each model."""

from __future__ import annotations

from haystack import Document
from haystack_integrations.components.embedders.huggingface_api import (
    HuggingFaceAPIDocumentEmbedder,
    HuggingFaceAPITextEmbedder,
    HuggingFaceTEISparseDocumentEmbedder,
    HuggingFaceTEISparseTextEmbedder,
)
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

from clients.call import VALUES, A, B, Call

V = VALUES
minilm = {"api_type": "text_embeddings_inference", "api_params": {"url": f"{A}/models/minilm"}}
splade = {"api_base_url": f"{A}/models/splade"}


def documents() -> list[Document]:
    return [Document(content=text) for text in V["texts"]]


def entries(vector: object) -> list[list[object]]:
    return [list(entry) for entry in zip(vector.indices, vector.values, strict=True)]


def ranks(answer: dict[str, list[Document]]) -> list[list[object]]:
    return [[V["texts"].index(document.content), document.score] for document in answer["documents"]]


CALLS = [
    Call(
        "HuggingFaceAPITextEmbedder",
        lambda: HuggingFaceAPITextEmbedder(**minilm).run(V["text"]),
        "embedding",
        V["unnormalised"][0],
    ),
    Call(
        "HuggingFaceAPIDocumentEmbedder",
        lambda: HuggingFaceAPIDocumentEmbedder(**minilm, normalize=True, progress_bar=False).run(documents()),
        "documents.*.embedding",
        V["vectors"],
    ),
    Call(
        "HuggingFaceTEISparseTextEmbedder",
        lambda: HuggingFaceTEISparseTextEmbedder(**splade).run(V["text"]),
        lambda answer: entries(answer["sparse_embedding"]),
        V["sparse"][0],
    ),
    Call(
        "HuggingFaceTEISparseDocumentEmbedder",
        lambda: HuggingFaceTEISparseDocumentEmbedder(**splade, progress_bar=False).run(documents()),
        lambda answer: [entries(document.sparse_embedding) for document in answer["documents"]],
        V["sparse"],
    ),
    Call(
        "HuggingFaceTEIRanker",
        lambda: HuggingFaceTEIRanker(url=A).run(V["question"], documents()),
        ranks,
        V["ranked"],
        cause="no-model-name",
    ),
]
ERRORS = [
    Call(
        "HuggingFaceTEIRanker",
        lambda: HuggingFaceTEIRanker(url=B, max_retries=0).run("a", documents()),
        error="missing or wrong API key",
    ),
    Call(
        "HuggingFaceAPITextEmbedder",
        lambda: HuggingFaceAPITextEmbedder(**minilm, truncate=False).run(V["long"]),
        error="maximum context length is 256 tokens",
    ),
]
