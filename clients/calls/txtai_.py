"""txtai: vectors by a function of one's own, and by LiteLLM."""

from __future__ import annotations

import requests
from txtai import Embeddings

from clients.call import VALUES, A, Call

V = VALUES


def post(texts: list[str]) -> list[list[float]]:
    answer = requests.post(f"{A}/v1/embeddings", json={"model": "minilm", "input": texts}, timeout=60)
    return [entry["embedding"] for entry in answer.json()["data"]]


def litellm(path: str = "openai/minilm") -> Embeddings:
    return Embeddings(method="litellm", path=path, vectors={"api_base": f"{A}/v1", "api_key": "none"})


CALLS = [
    Call(
        "method external",
        lambda: Embeddings(method="external", transform=post).batchtransform(V["texts"]),
        "",
        V["vectors"],
    ),
    Call("method litellm", lambda: litellm().batchtransform(V["texts"]), "", V["vectors"]),
]
ERRORS = [
    Call(
        "method litellm", lambda: litellm("openai/none").batchtransform(["a"]), error="The model `none` does not exist"
    ),
]
