"""mteb's model of OpenAI, and mem0's embedder."""

from __future__ import annotations

from mem0.configs.embeddings.base import BaseEmbedderConfig
from mem0.embeddings.openai import OpenAIEmbedding
from mteb.models.model_implementations.openai_models import OpenAIModel
from openai import OpenAI

from clients.call import KEY, VALUES, B, Call

V = VALUES
client = OpenAI(api_key=KEY, base_url=f"{B}/v1")


def mteb(dimensions: int) -> object:
    model = OpenAIModel("minilm", max_tokens=200, embed_dim=dimensions, client=client)
    return model.encode([{"text": V["texts"]}], task_metadata=None, hf_split="", hf_subset="")


def mem0(**options: object) -> list[float]:
    config = BaseEmbedderConfig(model="minilm", api_key=KEY, openai_base_url=f"{B}/v1", **options)
    return OpenAIEmbedding(config).embed(V["text"])


CALLS = [
    Call("mteb: encode", lambda: mteb(384), "", V["vectors"], cause="dimensions-of-the-model"),
    Call("mem0: embed", mem0, "", V["vectors"][0]),
    Call(
        "mem0: embed, dimensions",
        lambda: mem0(embedding_dims=V["size"]),
        "",
        V["small"][0],
        cause="dimensions-of-the-model",
    ),
]
ERRORS = [
    Call("mem0: dimensions", lambda: mem0(embedding_dims=100), error="only supports Matryoshka dimensions"),
]
