"""tei-client: every route of its own, with a URL for each model."""

from __future__ import annotations

from tei_client import HttpClient

from clients.call import KEY, VALUES, A, B, Call

V = VALUES
minilm, cross, classes = (HttpClient(f"{A}/models/{name}") for name in ("minilm", "cross", "classes"))
prompted = HttpClient(B, headers={"Authorization": f"Bearer {KEY}"})


def scores(results: object) -> list[list[list[object]]]:
    return [[[score.label, score.score] for score in result.scores] for result in results]


def ids(results: object) -> list[list[int]]:
    return [result.get_ids() for result in results]


RANKED = "ranks.*.index,score"
CALLS = [
    Call("health", minilm.health, "", True),
    Call("info", minilm.info, "server_model_id", "minilm"),
    Call(
        "prompt_names",
        prompted.prompt_names,
        "",
        ["document", "query"],
        fails="it parses the wording of another server's error",
    ),
    Call("embed", lambda: minilm.embed(V["texts"]), "", V["vectors"], cause="url-per-model"),
    Call("embed: async", lambda: minilm.async_embed(V["texts"], truncate=True), "", V["vectors"]),
    Call("embed_all", lambda: minilm.embed_all(V["text"]), "", [V["tokens"]]),
    Call("tokenize", lambda: minilm.tokenize(V["text"]), ids, [V["ids"]]),
    Call("decode", lambda: minilm.decode([V["ids"]]), "", [V["text"].lower()]),
    Call("classify", lambda: classes.classify(V["texts"]), scores, V["classes"]),
    Call("classify: async", lambda: classes.async_classify(V["texts"], raw_scores=True), scores, V["classes raw"]),
    Call("rerank", lambda: cross.rerank(V["question"], V["texts"]), RANKED, V["ranked"], cause="hub-and-tei"),
    Call("rerank: async", lambda: cross.async_rerank(V["question"], V["texts"]), RANKED, V["ranked"]),
    Call("error: task", lambda: cross.embed(V["text"]), error="model required. The model on the server is of type"),
]
MUTE = "the client does not look at the status"
ERRORS = [
    Call("rerank", lambda: cross.rerank("a", []), error="texts", fails=MUTE),
]
