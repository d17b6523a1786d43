"""haystack-ai: embedders of OpenAI and Azure."""

from __future__ import annotations

from haystack import Document
from haystack.components.embedders import AzureOpenAITextEmbedder, OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import OPENAI, refusals

V = VALUES
a = {"api_key": Secret.from_token("none"), "api_base_url": f"{A}/v1", "model": "minilm"}
b = {"api_key": Secret.from_token(KEY), "api_base_url": f"{B}/v1", "model": "minilm"}
azure = {"api_key": Secret.from_token(KEY), "azure_endpoint": B, "azure_deployment": "minilm"}


def documents() -> list[Document]:
    return [Document(content=text) for text in V["texts"]]


CALLS = [
    Call("OpenAITextEmbedder", lambda: OpenAITextEmbedder(**a).run(V["text"]), "embedding", V["vectors"][0]),
    Call(
        "OpenAIDocumentEmbedder",
        lambda: OpenAIDocumentEmbedder(**a, progress_bar=False).run(documents()),
        "documents.*.embedding",
        V["vectors"],
    ),
    Call(
        "OpenAITextEmbedder: dimensions",
        lambda: OpenAITextEmbedder(**b, dimensions=V["size"]).run(V["text"]),
        "embedding",
        V["small"][0],
    ),
    Call(
        "error: model",
        lambda: OpenAITextEmbedder(**{**a, "model": "none"}).run(V["text"]),
        error="The model `none` does not exist",
    ),
    Call(
        "AzureOpenAITextEmbedder", lambda: AzureOpenAITextEmbedder(**azure).run(V["text"]), "embedding", V["vectors"][0]
    ),
]


def bad(url: str, key: str = "none", model: str = "minilm", text: str = V["text"]) -> object:
    place = {"api_key": Secret.from_token(key), "api_base_url": f"{url}/v1", "max_retries": 0}
    return OpenAITextEmbedder(model=model, **place).run(text)


ERRORS = refusals(bad, "text", OPENAI, without=["missing", "type"])  # the component refuses what is no text
