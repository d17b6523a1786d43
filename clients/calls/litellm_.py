"""litellm: `embedding` and `rerank` by each provider whose base URL can be set, also async."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its price list lies in the package, too

import litellm

from clients.call import KEY, VALUES, A, B, Call

litellm.suppress_debug_info = True
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
        fails=UNSERVED.get(provider, ""),
    )


b_cohere = {"api_base": f"{B}/v1/embed", "api_key": KEY}
small = {"dimensions": V["size"], "allowed_openai_params": ["dimensions"]}
TOO_LONG = "maximum context length is 256 tokens"

CALLS = [
    *(Call(f"embedding: {p}", lambda p=p: embed(p), MANY, V["vectors"]) for p in EMBED),
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
