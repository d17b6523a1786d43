"""litellm: `embedding` and `rerank` by each provider whose base URL can be set, also async."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from itertools import chain

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its price list lies in the package, too

import litellm

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import BIG, EXACTLY, refusals

litellm.suppress_debug_info = True
logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)  # which would log every error that is wanted
V = VALUES
MANY = "data.*.embedding"
RANKED = "results.*.index,relevance_score"

OPENAI = (
    "openai", "hosted_vllm", "openai_like", "litellm_proxy", "lm_studio", "llamafile", "nvidia_nim", "databricks",
    "together_ai", "mistral", "nebius", "sambanova", "xinference", "voyage", "jina_ai", "dashscope",
)  # fmt: skip
"""Providers whose base URL ends in `/v1`."""
EMBED = dict.fromkeys(OPENAI, "/v1") | {
    "azure": "",
    "cohere": "/v1/embed",
    "fireworks_ai": "",
    "infinity": "",
    "ollama": "",
    "huggingface": "/models/minilm",
    "triton": "/v2/models/minilm/infer",
}
RERANK = dict.fromkeys(("cohere", "hosted_vllm", "jina_ai", "voyage"), "/v1/rerank") | {
    "infinity": "/infinity",
    "together_ai": "",
    "nvidia_nim": "",
    "deepinfra": "",
    "fireworks_ai": "",
    "litellm_proxy": "",
    "azure_ai": "",
    "huggingface": "/models/cross",
}
EXTRA = {"azure": {"api_version": "2024-10-21"}, "huggingface": {"input_type": "feature-extraction"}}


def embed(provider: str, call: object = litellm.embedding, **fields: object) -> object:
    return call(
        **{
            "model": f"{provider}/minilm", "input": V["texts"], "api_base": f"{A}{EMBED[provider]}", "api_key": "none",
            **EXTRA.get(provider, {}), **fields,
        }
    )  # fmt: skip


def rerank(provider: str, call: object = litellm.rerank, **fields: object) -> object:
    return call(
        **{
            "model": f"{provider}/cross", "query": V["question"], "documents": V["texts"],
            "api_base": f"{A}{RERANK[provider]}", "api_key": "none", **fields,
        }
    )  # fmt: skip


b = {"api_base": f"{B}/v1", "api_key": KEY}
ELSEWHERE = {"fireworks_ai": b}
"""It puts `fireworks/` before the name, so that any name must do."""
SCORES = {"nvidia_nim": "ranked raw", "fireworks_ai": "ranked by prompted vectors"}
UNSERVED = {"deepinfra": "its own path, /v1/inference/NAME, is not served"}


def ranking(provider: str, call: object, name: str) -> Call:
    expected = V[SCORES.get(provider, "ranked")]
    place = ELSEWHERE.get(provider, {})
    return Call(
        f"{name}: {provider}",
        lambda: rerank(provider, call, **place),
        RANKED,
        expected,
        cause="answers-of-several-vendors",
        fails=UNSERVED.get(provider, ""),
    )


b_cohere = {"api_base": f"{B}/v1/embed", "api_key": KEY}
small = {"dimensions": V["size"], "allowed_openai_params": ["dimensions"]}
TOO_LONG = "maximum context length is 256 tokens"

CAUSES = dict.fromkeys(("voyage", "triton"), "no-content-type") | {
    "azure": "vendors-paths",
    "huggingface": "hub-and-tei",
}
CALLS = [
    *(Call(f"embedding: {p}", lambda p=p: embed(p), MANY, V["vectors"], cause=CAUSES.get(p, "")) for p in EMBED),
    *(Call(f"aembedding: {p}", lambda p=p: embed(p, litellm.aembedding), MANY, V["vectors"]) for p in EMBED),
    *(ranking(provider, litellm.rerank, "rerank") for provider in RERANK),
    *(ranking(provider, litellm.arerank, "arerank") for provider in RERANK),
    Call("embedding: openai, dimensions", lambda: embed("openai", **small, **b), MANY, V["small"]),
    Call(
        "embedding: cohere, prompt of queries",
        lambda: embed("cohere", input_type="search_query", **b_cohere),
        MANY,
        V["query vectors"],
    ),
    Call("embedding: azure, key", lambda: embed("azure", api_base=B, api_key=KEY), MANY, V["vectors"]),
    Call("rerank: voyage, top_n", lambda: rerank("voyage", top_n=2), RANKED, V["ranked"][:2]),
    Call("rerank: cohere, top_n", lambda: rerank("cohere", top_n=1), RANKED, V["ranked"][:1]),
    Call("rerank: jina_ai, documents", lambda: rerank("jina_ai", return_documents=True), RANKED, V["ranked"]),
    Call("error: openai, model", lambda: embed("openai", model="openai/none"), error="The model `none` does not exist"),
    Call("error: hosted_vllm, too long", lambda: embed("hosted_vllm", input=[V["long"]]), error=TOO_LONG),
    Call("error: voyage, key", lambda: embed("voyage", api_base=f"{B}/v1"), error="missing or wrong API key"),
    Call(
        "error: cohere, model", lambda: rerank("cohere", model="cohere/none"), error="The model `none` does not exist"
    ),
]


def bad_embed(provider: str) -> Callable[..., object]:
    """The embeddings of a provider, of whom some have the name of the model in the URL."""

    def send(url: str, key: str = "none", model: str = "minilm", **fields: object) -> object:
        place = f"{url}{EMBED[provider].replace('minilm', model)}"
        return embed(provider, model=f"{provider}/{model}", api_base=place, api_key=key, max_retries=0, **fields)

    return send


def bad_rerank(provider: str) -> Callable[..., object]:
    def send(url: str, key: str = "none", model: str = "", **fields: object) -> object:
        name = model or ("cross" if url == A else "minilm")
        place = f"{url}{BASES.get(provider, RERANK[provider]).replace('cross', name)}"
        return rerank(provider, model=f"{provider}/{name}", api_base=place, api_key=key, max_retries=0, **fields)

    return send


BASES = {"fireworks_ai": "/v1"}
RAISES = {
    400: "BadRequestError",  # of which `ContextWindowExceededError` is one
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "APIError",
    429: "RateLimitError",
}
KINDS = {"huggingface": {**RAISES, 404: "APIError"}}
SAID = {
    "huggingface": {},
    "jina_ai": {"missing": "validation error"},
    "cohere": {"missing": "validation error"},
}
OWN = {"ollama": ["missing", "type", "long"], "triton": ["missing"], "cohere": ["long"]}
"""What the client refuses by itself, or what is always cut."""
OWN_RERANK = {"jina_ai": ["long"], "voyage": ["long"]}
ERRORS = [
    *chain.from_iterable(
        refusals(
            bad_embed(name),
            "input",
            KINDS.get(name, RAISES),
            of=f"embedding, {name}",
            says=SAID.get(name, EXACTLY),
            without=OWN.get(name, []),
            long=[V["long"]],
            large=[BIG],
        )
        for name in EMBED
    ),
    *chain.from_iterable(
        refusals(
            bad_rerank(name),
            "documents",
            KINDS.get(name, RAISES),
            of=f"rerank, {name}",
            says={"model": "does not exist"},
            without=OWN_RERANK.get(name, ["missing", "type", "long"]),
            large=[BIG],
        )
        for name in RERANK
        if name not in UNSERVED
    ),
]
