"""chromadb: its embedding functions of OpenAI, Azure, Hugging Face, Jina, Cohere, Voyage and Ollama."""

from __future__ import annotations

import cohere
import voyageai
from chromadb.utils.embedding_functions import (
    CohereEmbeddingFunction,
    HuggingFaceEmbeddingFunction,
    HuggingFaceEmbeddingServer,
    JinaEmbeddingFunction,
    OllamaEmbeddingFunction,
    OpenAIEmbeddingFunction,
    VoyageAIEmbeddingFunction,
)

from clients.call import KEY, VALUES, A, B, Call

V = VALUES
a, b = {"api_key": "none", "api_base": f"{A}/v1"}, {"api_key": KEY, "api_base": f"{B}/v1"}


def hub() -> HuggingFaceEmbeddingFunction:
    function = HuggingFaceEmbeddingFunction(api_key="none", model_name="minilm")
    function._api_url = f"{A}/models/minilm/pipeline/feature-extraction"  # these have no parameter of it
    return function


def jina(**options: object) -> JinaEmbeddingFunction:
    function = JinaEmbeddingFunction(api_key="none", model_name="minilm", **options)
    function._api_url = f"{A}/v1/embeddings"
    return function


def of_cohere() -> CohereEmbeddingFunction:
    function = CohereEmbeddingFunction(api_key="none", model_name="minilm")
    function.client = cohere.Client(api_key="none", base_url=A)
    return function


def voyage() -> VoyageAIEmbeddingFunction:
    function = VoyageAIEmbeddingFunction(api_key="none", model_name="minilm", input_type="document")
    function._client = voyageai.Client(api_key="none", base_url=f"{A}/v1")
    return function


def azure() -> OpenAIEmbeddingFunction:
    return OpenAIEmbeddingFunction(
        api_key=KEY, api_base=B, api_type="azure", api_version="2024-10-21", deployment_id="minilm", model_name="minilm"
    )


TEXTS = {
    "OpenAIEmbeddingFunction": lambda: OpenAIEmbeddingFunction(**a, model_name="minilm"),
    "OpenAIEmbeddingFunction: default model": lambda: OpenAIEmbeddingFunction(**b),
    "OpenAIEmbeddingFunction: Azure": azure,
    "HuggingFaceEmbeddingServer": lambda: HuggingFaceEmbeddingServer(url=f"{A}/models/minilm/embed"),
    "HuggingFaceEmbeddingFunction": hub,
    "JinaEmbeddingFunction: task": lambda: jina(task="retrieval.passage"),
    "CohereEmbeddingFunction": of_cohere,
    "VoyageAIEmbeddingFunction": voyage,
    "OllamaEmbeddingFunction": lambda: OllamaEmbeddingFunction(url=A, model_name="minilm"),
}
CALLS = [
    *(Call(name, lambda make=make: make()(V["texts"]), "", V["vectors"]) for name, make in TEXTS.items()),
    Call(
        "JinaEmbeddingFunction: late_chunking",
        lambda: jina(late_chunking=True)(V["parts"]),
        "",
        V["chunks"],
        cause="late-chunking",
    ),
]
ERRORS = [
    Call(
        "OpenAIEmbeddingFunction",
        lambda: OpenAIEmbeddingFunction(**a, model_name="none")(["a"]),
        error="The model `none` does not exist",
    ),
    Call("JinaEmbeddingFunction", lambda: jina(task="poem")(["a"]), error="Unsupported"),
]
