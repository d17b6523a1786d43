"""cohere-haystack, jina-haystack, voyage-embedders-haystack, nvidia-haystack: embedders and rankers."""

from __future__ import annotations

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
MISSING = "The model `none` does not exist"
none = {"api_key": key, "model": "none"}
ERRORS = [
    Call("CohereTextEmbedder", lambda: CohereTextEmbedder(**none, **cohere).run("a"), error=MISSING),
    Call("JinaTextEmbedder", lambda: JinaTextEmbedder(**none, **jina).run("a"), error=MISSING),
    Call("VoyageTextEmbedder", lambda: warm(VoyageTextEmbedder(**none)).run("a"), error=MISSING),
    Call("NvidiaTextEmbedder", lambda: warm(NvidiaTextEmbedder(**none, **nvidia)).run("a"), error=MISSING),
]
