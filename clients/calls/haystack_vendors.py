"""cohere-haystack, jina-haystack, voyage-embedders-haystack, nvidia-haystack: embedders and rankers."""

from __future__ import annotations

from collections.abc import Callable

import voyageai._base
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.embedders.cohere import CohereDocumentEmbedder, CohereTextEmbedder
from haystack_integrations.components.embedders.jina import JinaDocumentEmbedder, JinaTextEmbedder
from haystack_integrations.components.embedders.nvidia import NvidiaDocumentEmbedder, NvidiaTextEmbedder
from haystack_integrations.components.embedders.voyage_embedders import VoyageTextEmbedder
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from haystack_integrations.components.rankers.nvidia import NvidiaRanker
from haystack_integrations.components.rankers.voyage import VoyageRanker

from clients.call import VALUES, A, Call
from clients.refusals import refusals

voyageai._base.get_default_base_url = lambda key: f"{A}/v1"  # these components have no parameter of it
V = VALUES
key = Secret.from_token("none")
embedder, ranker = {"api_key": key, "model": "minilm"}, {"api_key": key, "model": "cross"}
cohere, nvidia = {"api_base_url": A}, {"api_url": f"{A}/v1"}
jina, jina_ranker = {"base_url": f"{A}/v1/embeddings"}, {"base_url": f"{A}/v1/rerank"}
quiet = {"progress_bar": False}


def documents() -> list[Document]:
    return [Document(content=text) for text in V["texts"]]


def embed(kind: type, **options: object) -> Call:
    return Call(kind.__name__, lambda: warm(kind(**embedder, **options)).run(V["text"]), "embedding", V["vectors"][0])


def embed_documents(kind: type, **options: object) -> Call:
    return Call(
        kind.__name__,
        lambda: warm(kind(**embedder, **options, **quiet)).run(documents()),
        "documents.*.embedding",
        V["vectors"],
    )


def rank(kind: type, expected: str = "ranked", **options: object) -> Call:
    return Call(
        kind.__name__, lambda: warm(kind(**ranker, **options)).run(V["question"], documents()), ranks, V[expected]
    )


def warm(component: object) -> object:
    if hasattr(component, "warm_up"):
        component.warm_up()
    return component


def ranks(answer: dict[str, list[Document]]) -> list[list[object]]:
    return [[V["texts"].index(document.content), document.score] for document in answer["documents"]]


CALLS = [
    embed(CohereTextEmbedder, **cohere),
    embed_documents(CohereDocumentEmbedder, **cohere),
    rank(CohereRanker, **cohere),
    embed(JinaTextEmbedder, **jina, task="retrieval.query"),
    embed_documents(JinaDocumentEmbedder, **jina, task="retrieval.passage"),
    rank(JinaRanker, **jina_ranker),
    embed(VoyageTextEmbedder, input_type="query"),
    rank(VoyageRanker),
    embed(NvidiaTextEmbedder, **nvidia),
    embed_documents(NvidiaDocumentEmbedder, **nvidia),
    rank(NvidiaRanker, "ranked raw", **nvidia),
]


def bad(kind: type, place: str, path: str = "", **options: object) -> Callable[..., object]:
    """A text for an embedder, whose URL has the parameter `place`."""

    def send(url: str, key: str = "none", model: str = "minilm", text: str = V["text"]) -> object:
        place_of = {place: url + path} if place else {}
        return warm(kind(api_key=Secret.from_token(key), model=model, **place_of, **options)).run(text)

    return send


def bad_voyage(url: str, key: str = "none", model: str = "minilm", text: str = V["text"]) -> object:
    """A text for Voyage's embedder, whose URL is that of its library."""
    base = voyageai._base.get_default_base_url
    voyageai._base.get_default_base_url = lambda key: f"{url}/v1"
    try:
        return bad(VoyageTextEmbedder, "", truncate=False, max_retries=0)(url, key, model, text)
    finally:
        voyageai._base.get_default_base_url = base


OWN = ["missing", "type"]
"""Components refuse what is no text."""
ERRORS = [
    *refusals(
        bad(CohereTextEmbedder, "api_base_url", truncate="NONE"),
        "text",
        {
            400: "BadRequestError",
            401: "UnauthorizedError",
            404: "NotFoundError",
            413: "ApiError",
            429: "TooManyRequestsError",
        },
        of="CohereTextEmbedder",
        without=OWN,
    ),
    *refusals(
        bad(JinaTextEmbedder, "base_url", "/v1/embeddings"), "text", "RuntimeError", of="JinaTextEmbedder", without=OWN
    ),
    *refusals(bad_voyage, "text", "VoyageError", of="VoyageTextEmbedder", without=OWN),
    *refusals(
        bad(NvidiaTextEmbedder, "api_url", "/v1", truncate="NONE"),
        "text",
        "ValueError",
        of="NvidiaTextEmbedder",
        without=OWN,
    ),
]
