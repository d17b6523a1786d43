"""huggingface_hub: `InferenceClient` and `AsyncInferenceClient` with a URL for each model, and with the server's."""

from __future__ import annotations

from collections.abc import Callable

from huggingface_hub import AsyncInferenceClient, InferenceClient

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import refusals

V = VALUES
NO_MASK = "fill-mask is no task of a pooling model"
NO_ZERO = "zero-shot classification by NLI is not served"
CLASS = "*.label,score"
ENTITY = "*.entity_group,word,start,end,score"


def of(model: str, client: type = InferenceClient) -> InferenceClient:
    return client(model=f"{A}/models/{model}", provider="hf-inference")


minilm, classes, entities = map(of, ("minilm", "classes", "entities"))
b = InferenceClient(model=B, provider="hf-inference", token=KEY)
wrong = InferenceClient(model=B, provider="hf-inference", token="wrong")
later = {name: of(name, AsyncInferenceClient) for name in ("minilm", "classes", "entities")}
embed = minilm.feature_extraction

CALLS = [
    Call("feature_extraction", lambda: embed(V["text"]), "", V["vectors"][:1], cause="url-per-model"),
    Call("feature_extraction: several", lambda: embed(V["texts"]), "", V["vectors"], cause="hub-and-tei"),
    Call("feature_extraction: normalize False", lambda: embed(V["texts"], normalize=False), "", V["unnormalised"]),
    Call(
        "feature_extraction: truncate",
        lambda: embed(V["long"], truncate=True, truncation_direction="right"),
        "",
        V["cut"],
    ),
    Call(
        "feature_extraction: prompt_name",
        lambda: b.feature_extraction(V["texts"], prompt_name="query"),
        "",
        V["query vectors"],
    ),
    Call(
        "feature_extraction: dimensions", lambda: b.feature_extraction(V["texts"], dimensions=V["size"]), "", V["small"]
    ),
    Call(
        "feature_extraction: server's URL",
        lambda: InferenceClient(model=A, provider="hf-inference").feature_extraction(V["texts"]),
        "",
        V["vectors"],
        cause="no-model-name",
    ),
    Call("feature_extraction: async", lambda: later["minilm"].feature_extraction(V["texts"]), "", V["vectors"]),
    Call(
        "feature_extraction: /embed",
        lambda: InferenceClient(model=f"{A}/embed", provider="hf-inference").feature_extraction(V["texts"]),
        "",
        V["vectors"],
    ),
    Call(
        "sentence_similarity",
        lambda: minilm.sentence_similarity(V["question"], V["texts"]),
        "",
        V["similarities"],
        cause="hub-and-tei",
    ),
    Call(
        "sentence_similarity: async",
        lambda: later["minilm"].sentence_similarity(V["question"], V["texts"]),
        "",
        V["similarities"],
    ),
    Call("text_classification", lambda: classes.text_classification(V["text"]), CLASS, V["classes"][0]),
    Call(
        "text_classification: top_k",
        lambda: classes.text_classification(V["text"], top_k=2),
        CLASS,
        V["classes"][0][:2],
    ),
    Call(
        "text_classification: function_to_apply",
        lambda: classes.text_classification(V["text"], function_to_apply="none"),
        CLASS,
        V["classes raw"][0],
    ),
    Call("text_classification: async", lambda: later["classes"].text_classification(V["text"]), CLASS, V["classes"][0]),
    Call("token_classification", lambda: entities.token_classification(V["named"]), ENTITY, V["entities"]),
    Call(
        "token_classification: aggregation_strategy",
        lambda: entities.token_classification(V["named"], aggregation_strategy="simple"),
        ENTITY,
        V["entities"],
    ),
    Call(
        "token_classification: async", lambda: later["entities"].token_classification(V["named"]), ENTITY, V["entities"]
    ),
    Call("health_check", minilm.health_check, "", True),
    Call("get_endpoint_info", lambda: classes.get_endpoint_info(), "model_id", "classes"),
    Call(
        "error: too long",
        lambda: embed(V["long"], truncate=False),
        error="maximum context length is 256 tokens",
    ),
    Call("error: key", lambda: wrong.feature_extraction(V["text"]), error="missing or wrong API key"),
    Call("fill_mask", lambda: minilm.fill_mask("a [MASK]"), fails=NO_MASK),
    Call("fill_mask: async", lambda: later["minilm"].fill_mask("a [MASK]"), fails=NO_MASK),
    Call(
        "zero_shot_classification",
        lambda: classes.zero_shot_classification(V["text"], ["a", "b"]),
        fails=NO_ZERO,
    ),
    Call(
        "zero_shot_classification: async",
        lambda: later["classes"].zero_shot_classification(V["text"], ["a", "b"]),
        fails=NO_ZERO,
    ),
]
RAISES = {
    400: "BadRequestError",
    401: "HfHubHTTPError",
    404: "HfHubHTTPError",
    413: "HfHubHTTPError",
    429: "HfHubHTTPError",
}


def bad(kind: type, task: str, model: str, **body: object) -> Callable[..., object]:
    """A request of a task; a model that is not served is one in the URL."""

    def send(url: str, key: str = "none", **fields: object) -> object:
        name = fields.pop("model", model)
        place = f"{url}/models/{name}" if url == A else url
        return getattr(kind(model=place, provider="hf-inference", token=key), task)(**{**body, **fields})

    return send


OF_VECTORS = {"text": V["text"], "truncate": False}
OF_SIMILARITY = {"sentence": V["question"], "other_sentences": V["texts"]}
UNSENT = {"without": ["missing", "type"]}
ERRORS = [
    *refusals(bad(InferenceClient, "feature_extraction", "minilm", **OF_VECTORS), "text", RAISES),
    *refusals(bad(AsyncInferenceClient, "feature_extraction", "minilm", **OF_VECTORS), "text", RAISES, of="async"),
    *refusals(
        bad(InferenceClient, "sentence_similarity", "minilm", **OF_SIMILARITY),
        "other_sentences",
        RAISES,
        of="sentence_similarity",
        long=[V["long"]],
    ),
    *refusals(
        bad(InferenceClient, "text_classification", "classes", text=V["text"]), "text", RAISES, of="text_classification"
    ),
]
