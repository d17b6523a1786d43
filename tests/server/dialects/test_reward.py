"""FastDeploy's reward routes: what its clients send, which number comes back, and errors with honest status codes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from cenote import LLM, PoolingParams
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest, CenoteError, CheckpointError, Closed, EngineFailed, Overloaded
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import checkpoints
from tests.conftest import CLASSIFIER, CROSS_ENCODER, INFO, UNKNOWN_IDS, classes, error, expected, floats, usage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

ROUTES = ("/v1/reward", "/v1/chat/reward")
ROUTE = ROUTES[1]
CLS, SEP, HELLO, WORLD = 101, 102, 7592, 2088
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{{ mark }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
SAID = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
TEXT = "user hello assistant world "
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "world"}]},
]
UNKNOWN = "Token id {} is out of vocabulary; fake takes ids from 0 to 30521" + UNKNOWN_IDS
IMAGE = [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}, {"type": "text", "text": "hello"}]


@pytest.fixture(scope="module")
def client(serve_all: Serve) -> TestClient:
    return serve_all(info=CROSS_ENCODER, chat_template=TEMPLATE)


def post(client: TestClient, path: str = ROUTE, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def score(client: TestClient, **body: Any) -> Any:
    (entry,) = post(client, **body)["data"]
    return floats(entry["score"])


def raw(ids: list[int]) -> list[float]:
    """The fake model's reward: the head's own number."""
    return classes(ids, CROSS_ENCODER, use_activation=False)


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of the rendered conversation."""
    found: list[int] = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("path", ROUTES)
def test_the_documented_request(client: TestClient, ids: list[int], path: str) -> None:
    before = int(time.time())
    answer = post(
        client, path, model="", messages=PARTS, user="user-123", enable_thinking=False, chat_template=None, priority=0
    )
    assert answer["id"].startswith("reward-user-123-")
    assert before <= answer["created"] <= time.time()
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert (answer["object"], answer["model"]) == ("object", "fake")
    assert floats(answer["data"][0].pop("score")) == raw(ids)
    assert answer["data"] == [{"index": 0, "object": "reward", "prompt_token_ids": None, "prompt_tokens": None}]
    assert answer["usage"] == usage(len(ids))


def test_embeddings_in_its_form(serve: Serve) -> None:
    client, path = serve(), "/fastdeploy/v1/embeddings"
    ids = [CLS, HELLO, SEP]
    for body in ({"input": "hello", "normalize": False}, {"messages": ids, "normalize": False}):
        (entry,) = post(client, path, **body)["data"]
        assert floats(entry["embedding"]) == floats(expected(ids, use_activation=False))
    (entry,) = post(client, path, input="hello", normalize=True)["data"]
    assert floats(entry["embedding"]) == floats(expected(ids))
    assert error(client, {"input": "hello", "normalize": True})["param"] == "normalize", "which vLLM has removed"


def test_embeddings_in_its_form_keep_the_last_tokens(serve: Serve) -> None:
    client, path = serve(), "/fastdeploy/v1/embeddings"
    for fields, ids in (({}, [WORLD, SEP]), ({"truncation_side": "right"}, [CLS, HELLO])):
        (entry,) = post(client, path, input="hello world", truncate_prompt_tokens=2, **fields)["data"]
        assert floats(entry["embedding"]) == floats(expected(ids))


@pytest.mark.parametrize("name", [None, "", "fake", "some/other-name"])
def test_a_server_of_one_model_answers_to_any_name(client: TestClient, ids: list[int], name: str | None) -> None:
    answer = post(client, model=name, messages=SAID)
    assert answer["model"] == (name or "fake")
    assert floats(answer["data"][0]["score"]) == raw(ids)


def test_a_server_of_several_models_does_not(serve: Serve) -> None:
    client = serve.several(a=FakeEngine(CROSS_ENCODER), b=FakeEngine(CROSS_ENCODER))
    found = error(client, {"model": "c", "prompt_token_ids": [5]}, ROUTE)
    assert (found["message"], found["code"]) == ("The model `c` does not exist.", 404)
    assert post(client, model="b", prompt_token_ids=[5])["model"] == "b"


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": ""},
        {"chat_template": None, "chat_template_kwargs": None},
        {"mm_processor_kwargs": None},
        {"mm_processor_kwargs": {}},
        {"enable_thinking": True, "no_such_field": {"a": [1]}},
        {"add_generation_prompt": False, "add_special_tokens": False},
        {"return_token_ids": False, "dimensions": None, "truncate_prompt_tokens": None},
        {"use_activation": False},
        {"normalize": True, "dimensions": 2},
        {"normalize": False},
    ],
    ids=str,
)
def test_fields_that_change_nothing(client: TestClient, ids: list[int], fields: dict[str, Any]) -> None:
    assert score(client, messages=SAID, **fields) == raw(ids)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"add_generation_prompt": True}, TEXT + "assistant"),
        ({"continue_final_message": True}, "user hello assistant world"),
        ({"chat_template_kwargs": {"mark": "!"}}, "user hello! assistant world! "),
        ({"add_special_tokens": True}, f"[CLS] {TEXT} [SEP]"),
    ],
    ids=str,
)
def test_how_a_conversation_becomes_text(
    client: TestClient, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], text: str
) -> None:
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert score(client, messages=SAID, **fields) == raw(wanted)


def test_use_activation(client: TestClient, ids: list[int]) -> None:
    (logit,) = raw(ids)
    np.testing.assert_allclose(
        score(client, messages=SAID, use_activation=True), [1 / (1 + np.exp(-logit))], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("key", ["prompt_token_ids", "messages"])
def test_token_ids(serve: Serve, key: str) -> None:
    """They are taken as they are, and need no chat template."""
    client = serve(info=CROSS_ENCODER)
    answer = post(client, **{key: [HELLO, WORLD, HELLO]})
    assert floats(answer["data"][0]["score"]) == raw([HELLO, WORLD, HELLO])
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("body", "ran", "text"),
    [
        ({"prompt_token_ids": [HELLO, WORLD]}, [HELLO, WORLD], "hello world"),
        ({"messages": [CLS, HELLO, SEP]}, [CLS, HELLO, SEP], "[CLS] hello [SEP]"),
        ({"prompt_token_ids": [5, HELLO, WORLD], "truncate_prompt_tokens": 2}, [HELLO, WORLD], "hello world"),
    ],
    ids=str,
)
def test_ids_are_returned_when_asked_for(client: TestClient, body: dict[str, Any], ran: list[int], text: str) -> None:
    (entry,) = post(client, **body, return_token_ids=True)["data"]
    assert list(entry) == ["index", "object", "score", "prompt_token_ids", "prompt_tokens"]
    assert (entry["prompt_token_ids"], entry["prompt_tokens"]) == (ran, text)


def test_ids_of_a_conversation_are_returned(client: TestClient, ids: list[int]) -> None:
    (entry,) = post(client, messages=SAID, return_token_ids=True)["data"]
    assert (entry["prompt_token_ids"], entry["prompt_tokens"]) == (ids, TEXT.strip())


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, slice(-2, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, slice(-3, None)),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, slice(None, 2)),
        ({"truncate_prompt_tokens": 4}, slice(None)),
        ({"truncate_prompt_tokens": 60}, slice(None)),
        ({"truncate_prompt_tokens": -1}, slice(None)),
        ({"truncation_side": "left"}, slice(None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["conversation", "ids"])
def test_truncation_keeps_the_last_tokens(
    client: TestClient, ids: list[int], form: str, fields: dict[str, Any], kept: slice
) -> None:
    assert len(ids) == 4
    body = {"messages": SAID} if form == "conversation" else {"prompt_token_ids": ids}
    answer = post(client, **body, **fields)
    assert floats(answer["data"][0]["score"]) == raw(ids[kept])
    assert answer["usage"]["prompt_tokens"] == len(ids[kept])


def test_truncation_to_the_models_maximum(client: TestClient) -> None:
    long = [*range(1, 91)]
    assert score(client, prompt_token_ids=long, truncate_prompt_tokens=-1) == raw(long[-64:])
    said = [{"role": "user", "content": "world " * 90 + "hello"}]
    assert score(client, messages=said, truncate_prompt_tokens=-1) == raw([WORLD] * 63 + [HELLO])


def test_special_tokens_are_cut_like_others(client: TestClient, ids: list[int]) -> None:
    got = score(client, messages=SAID, add_special_tokens=True, truncate_prompt_tokens=3)
    assert got == raw([*ids, SEP][-3:])


# --- refusals ----------------------------------------------------------------------------------------------------

ONE_SOURCE = "Exactly one of `messages` and `prompt_token_ids` must be given."
UNTRUSTED = "Chat template is passed with request, but --trust-request-chat-template is not set. "
IMAGES = "content parts of type 'image_url' are not supported by this model, only text: "


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, ONE_SOURCE, "messages"),
        ({"messages": None}, ONE_SOURCE, "messages"),
        ({"messages": SAID, "prompt_token_ids": [5]}, ONE_SOURCE, "messages"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, IMAGES, "messages"),
        ({"messages": SAID, "softmax": True}, "Parameter `softmax` was removed; use `use_acti", "softmax"),
        ({"messages": SAID, "mm_processor_kwargs": {"a": 1}}, "`mm_processor_kwargs` is not", "mm_processor_kwargs"),
        ({"messages": SAID, "media_io_kwargs": {"image": {}}}, "`media_io_kwargs` is not accepted", "media_io_kwargs"),
        ({"messages": SAID, "chat_template": "x"}, UNTRUSTED, "chat_template"),
        ({"messages": SAID, "chat_template_kwargs": {"chat_template": "x"}}, UNTRUSTED, "chat_template"),
        (
            {"prompt_token_ids": [-1]},
            UNKNOWN.format(-1),
            "input",
        ),
        (
            {"messages": [5, 30_522]},
            UNKNOWN.format(30_522),
            "messages",
        ),
        (
            {"prompt_token_ids": [5] * 65},
            "This model's maximum context length is 64 tokens. However, your prompt contains 65 input tokens",
            "input_tokens",
        ),
        (
            {"messages": SAID, "truncate_prompt_tokens": 65},
            "truncate_prompt_tokens value is greater than max_model_len.",
            "truncate_prompt_tokens",
        ),
    ],
    ids=str,
)
def test_refused_by_meaning(client: TestClient, path: str, body: dict[str, Any], message: str, param: str) -> None:
    found = error(client, body, path)
    assert found["message"].startswith(message)
    assert (found["code"], found["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"messages": []}, "too_short", "body.messages"),
        ({"messages": "hello"}, "list_type", "body.messages"),
        ({"messages": ["hello"]}, "dict_type", "body.messages.0"),
        ({"prompt_token_ids": []}, "too_short", "body.prompt_token_ids"),
        ({"prompt_token_ids": [[5]]}, "int_type", "body.prompt_token_ids.0"),
        ({"prompt_token_ids": [5], "truncate_prompt_tokens": -2}, "greater_than_equal", "body.truncate_prompt_tokens"),
        ({"prompt_token_ids": [5], "return_token_ids": "x"}, "bool_parsing", "body.return_token_ids"),
    ],
    ids=str,
)
def test_refused_by_type(client: TestClient, body: dict[str, Any], kind: str, param: str) -> None:
    found = error(client, body, ROUTE)
    assert f"'type': '{kind}'" in found["message"]
    assert (found["code"], found["type"], found["param"]) == (400, "Bad Request", param)


def test_a_conversation_without_a_chat_template(serve: Serve) -> None:
    assert error(serve(info=CROSS_ENCODER), {"messages": SAID}, ROUTE) == {
        "message": "fake has no chat template, so `messages` cannot be rendered; send `input`, or start the server "
        "with --chat-template",
        "type": "BadRequestError",
        "param": "messages",
        "code": 400,
    }


def test_a_trusted_request_brings_its_own_template(serve: Serve) -> None:
    client = serve(info=CROSS_ENCODER, trust_request_chat_template=True)
    assert score(client, messages=SAID, chat_template="{{ messages[1].content }}") == raw([WORLD])


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("info", "message"),
    [
        (INFO, "fake is not a reward model. It offers: embed, token_embed"),
        (
            CLASSIFIER,
            "fake is not a reward model; it has 3 labels, and a reward has one. It offers: classify, token_classify, "
            "embed, token_embed",
        ),
    ],
    ids=["embedder", "classifier"],
)
def test_a_model_that_gives_no_reward(serve: Serve, path: str, info: Any, message: str) -> None:
    assert error(serve(info=info, chat_template=TEMPLATE), {"messages": SAID}, path) == {
        "message": message,
        "type": "BadRequestError",
        "param": "task",
        "code": 400,
    }


@pytest.mark.parametrize(
    ("failure", "status"),
    [(EngineFailed("boom"), 500), (Closed("closing"), 503), (Overloaded("full", retry_after=7), 429)],
    ids=["failed", "closed", "overloaded"],
)
def test_failures_are_no_200(serve: Serve, failure: CenoteError, status: int) -> None:
    client = serve(FakeEngine(CROSS_ENCODER, failures=[failure]), chat_template=TEMPLATE)
    assert error(client, {"messages": SAID}, ROUTE)["code"] == status


@pytest.mark.parametrize(("header", "field", "want"), [("h", "b", "reward-h"), (None, "b", "reward-b")])
def test_request_id(client: TestClient, header: str | None, field: str, want: str) -> None:
    headers = {"X-Request-Id": header} if header else {}
    answer = client.post(ROUTE, json={"messages": SAID, "request_id": field}, headers=headers)
    assert answer.json()["id"] == want


def test_a_model_that_rates_tokens_is_asked_for_the_last_one(serve: Serve, ids: list[int]) -> None:
    engine = FakeEngine(replace(CROSS_ENCODER, reward="token_classify", default_task="token_classify"))
    assert score(serve(engine, chat_template=TEMPLATE), messages=SAID) == raw(ids)
    assert engine.submitted[0].task == "classify"


def test_a_model_that_rates_nothing_but_tokens_gives_all_of_them(serve: Serve, ids: list[int]) -> None:
    info = replace(CROSS_ENCODER, tasks=("token_classify",), reward="token_classify", default_task="token_classify")
    assert score(serve(info=info, chat_template=TEMPLATE), messages=SAID) == [raw([token])[0] for token in ids]


# --- real models -------------------------------------------------------------------------------------------------

LONG = [
    {"role": "user", "content": "How deep is the cenote?"},
    {"role": "assistant", "content": "The cenote is deep.<extra_0>Very deep.<extra_0>"},
]
RENDERED = "user How deep is the cenote? assistant The cenote is deep.<extra_0>Very deep.<extra_0> "
OTHER = "the quick brown fox<extra_0>jumps<extra_0>over<extra_0>"


def tokenizer_of_steps() -> PreTrainedTokenizerBase:
    return checkpoints.byte_level("$A", special=("<extra_0>",), chat_template=TEMPLATE)


def start(folder: Path, **options: Any) -> TestClient:
    return TestClient(build([Service.open(ModelConfig(model=str(folder), **options), EngineConfig())], ServerConfig()))


def states(folder: Path, text: str) -> tuple[list[int], torch.Tensor]:
    """Token ids of a text, and the last hidden states of Transformers' backbone."""
    found = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return found, model(input_ids=torch.tensor([found])).last_hidden_state[0]


def rated(weights: dict[str, torch.Tensor], states_TD: torch.Tensor) -> torch.Tensor:
    first = torch.relu(states_TD @ weights["score.0.weight"].T + weights["score.0.bias"])
    return first @ weights["score.2.weight"].T + weights["score.2.bias"]


def test_an_outcome_model(tmp_path: Path) -> None:
    """One number, the logit of the whole conversation, as Transformers gives it."""
    made = tokenizer_of_steps()
    folder = checkpoints.classifier(tmp_path, "Qwen3", num_labels=1, tokenizer=made, max_position_embeddings=256)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = []
    with torch.inference_mode():
        for text in (RENDERED, OTHER):
            wanted += model(input_ids=torch.tensor([made(text)["input_ids"]])).logits[0].tolist()
    with start(folder) as client:
        assert post(client, messages=LONG)["usage"]["prompt_tokens"] == len(made(RENDERED)["input_ids"])
        got = score(client, messages=LONG) + score(client, prompt_token_ids=made(OTHER)["input_ids"])
        logits = post(client, "/classify", input=[RENDERED, OTHER], use_activation=False)["data"]
    with LLM(str(folder)) as llm:
        own = [float(output.outputs.data) for output in llm.reward([RENDERED, OTHER], use_tqdm=False)]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(got, own, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got, [entry["probs"][0] for entry in logits], rtol=0, atol=1e-6)
    assert abs(got[0] - got[1]) > 1e-2


def test_a_model_that_rates_tokens(tmp_path: Path) -> None:
    """FastDeploy's routes give the last token's number, `/pooling` and `LLM.reward` those of all."""
    weights = checkpoints.two_layers(1)
    made = checkpoints.decoder(tmp_path, "Qwen3Model", tokenizer=tokenizer_of_steps())
    folder = checkpoints.add_head(made, "Qwen2ForRewardModel", weights)
    _, hidden_TD = states(folder, RENDERED)
    wanted = rated(weights, hidden_TD)[:, 0].numpy()
    with start(folder) as client:
        got = score(client, messages=LONG)
        (entry,) = post(client, "/pooling", input=RENDERED)["data"]
        bounded = score(client, messages=LONG, use_activation=True)
    with LLM(str(folder)) as llm:
        (own,) = llm.reward(RENDERED, use_tqdm=False)
    np.testing.assert_allclose(got, wanted[-1:], rtol=0, atol=2e-5)
    np.testing.assert_allclose(entry["data"], wanted[:, None], rtol=0, atol=2e-5)
    np.testing.assert_allclose(own.outputs.data, wanted[:, None], rtol=0, atol=2e-5)
    np.testing.assert_allclose(bounded, 1 / (1 + np.exp(-wanted[-1:])), rtol=0, atol=2e-5)
    assert np.ptp(wanted) > 1e-2


@pytest.fixture(scope="module")
def head() -> dict[str, torch.Tensor]:
    return checkpoints.two_layers(2, seed=1)


@pytest.fixture(scope="module")
def prm(tmp_path_factory: pytest.TempPathFactory, head: dict[str, torch.Tensor]) -> Path:
    made = checkpoints.decoder(tmp_path_factory.mktemp("prm"), "Qwen3Model", tokenizer=tokenizer_of_steps())
    return checkpoints.add_head(made, "Qwen2ForProcessRewardModel", head)


@pytest.fixture(scope="module")
def steps(prm: Path) -> Iterator[TestClient]:
    with start(prm) as made:
        yield made


def test_a_process_reward_model(steps: TestClient, prm: Path, head: dict[str, torch.Tensor]) -> None:
    """FastDeploy's routes give the probability that a step is good, the others those of both classes."""
    ids, hidden_TD = states(prm, RENDERED)
    tags = [i for i, token in enumerate(ids) if token == 1]
    logits = rated(head, hidden_TD)[tags]
    wanted = logits.softmax(-1).numpy()
    assert wanted.shape == (2, 2)
    (entry,) = post(steps, "/pooling", input=RENDERED)["data"]
    with LLM(str(prm)) as llm:
        (own,) = llm.reward(RENDERED, use_tqdm=False)
    np.testing.assert_allclose(score(steps, messages=LONG), wanted[:, 1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(score(steps, messages=LONG, use_activation=False), logits[:, 1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(entry["data"], wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(own.outputs.data, wanted, rtol=0, atol=2e-5)
    assert np.ptp(wanted[:, 1]) > 1e-3


def test_step_parameters_of_a_request(steps: TestClient, prm: Path, head: dict[str, torch.Tensor]) -> None:
    ids, hidden_TD = states(prm, OTHER)
    logits = rated(head, hidden_TD).numpy()
    other = ids[3]
    for tag, columns in ((other, [0, 1]), (1, [1]), (other, [1, 0, 1])):
        body = {"step_tag_id": tag, "returned_token_ids": columns, "use_activation": False}
        (entry,) = post(steps, "/pooling", input=OTHER, **body)["data"]
        wanted = logits[[i for i, token in enumerate(ids) if token == tag]][:, columns]
        np.testing.assert_allclose(entry["data"], wanted, rtol=0, atol=2e-5)


def test_an_input_without_steps_has_no_rewards(steps: TestClient) -> None:
    said = [{"role": "user", "content": "hello"}]
    assert score(steps, messages=said) == []
    answer = post(steps, "/pooling", input=["hello", OTHER, "world"])
    assert [len(entry["data"]) for entry in answer["data"]] == [0, 3, 0]


@pytest.mark.parametrize("columns", [[2], [0, 1, 7]], ids=str)
def test_columns_that_the_head_has_not(steps: TestClient, prm: Path, columns: list[int]) -> None:
    """The message names the folder of a model without a served name, and shows no path."""
    found = error(steps, {"input": OTHER, "returned_token_ids": columns}, "/pooling")
    assert found["message"] == f"returned_token_ids: {columns[-1]} is no column of {prm.name}'s head"
    assert (found["code"], found["param"]) == (400, "returned_token_ids")


def test_a_process_reward_model_names_no_entities(steps: TestClient) -> None:
    found = error(steps, {"input": OTHER}, "/v1/token_classify")
    assert "rates steps and has no labels that would be entities" in found["message"]
    assert found["code"] == 400


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose vocabulary rates steps, as math-shepherd-mistral-7b-prm."""
    folder = tmp_path_factory.mktemp("generator")
    return checkpoints.decoder(folder, "LlamaForCausalLM", tokenizer=tokenizer_of_steps())


@pytest.mark.parametrize("returned", [(40, 50), None], ids=["two columns", "the vocabulary"])
def test_steps_rated_by_a_language_model(generator: Path, returned: tuple[int, int] | None) -> None:
    pooler: dict[str, Any] = {"pooling_type": "STEP", "step_tag_id": 1}
    if returned:
        pooler["returned_token_ids"] = returned
    ids = AutoTokenizer.from_pretrained(generator)(OTHER)["input_ids"]
    model = checkpoints.LlamaForCausalLM.from_pretrained(generator, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    tags = [i for i, token in enumerate(ids) if token == 1]
    with start(generator, pooler_config=pooler) as client:
        (entry,) = post(client, "/pooling", input=OTHER, returned_token_ids=[50, 40])["data"]
        np.testing.assert_allclose(entry["data"], logits[tags][:, [50, 40]].softmax(-1), rtol=0, atol=2e-5)
        # An input without a step shares a batch with one that has some.
        answer = post(client, "/pooling", input=["hello", OTHER])
        assert answer["data"][0]["data"] == []
        wanted = logits[tags][:, list(returned) if returned else slice(None)].softmax(-1)
        np.testing.assert_allclose(answer["data"][1]["data"], wanted, rtol=0, atol=2e-5)
        found = error(client, {"input": OTHER, "returned_token_ids": [60 if returned else 10**6]}, "/pooling")
        assert (found["code"], found["param"]) == (400, "returned_token_ids")


@pytest.mark.parametrize(
    ("pooler", "sentence"),
    [
        (
            {"pooling_type": "STEP", "returned_token_ids": [1, 10**6]},
            r"classes are logits of token ids below 270, got \[1, 1000000\]",
        ),
        ({"step_tag_id": 1}, "pooler_config.step_tag_id is for pooling type STEP, which .* does not use"),
    ],
    ids=str,
)
def test_step_options_that_the_model_cannot_follow(generator: Path, pooler: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        LLM(str(generator), pooler_config=pooler)


def test_columns_of_the_pooler_config_that_the_head_has_not(prm: Path) -> None:
    with pytest.raises(CheckpointError, match="pooler_config.returned_token_ids: 2 is no column of .*'s head"):
        LLM(str(prm), pooler_config={"returned_token_ids": [2]})


def test_steps_cannot_be_rated_by_a_head_for_whole_inputs(tmp_path: Path) -> None:
    folder = checkpoints.classifier(tmp_path, num_labels=2)
    with pytest.raises(CheckpointError, match="pooling type STEP rates steps, but .* has no head to rate them"):
        LLM(str(folder), pooler_config={"pooling_type": "STEP", "step_tag_id": 1})


def test_step_parameters_offline(prm: Path) -> None:
    with LLM(str(prm)) as llm, pytest.raises(BadRequest, match="returned_token_ids: -1 is no column of"):
        llm.reward(OTHER, pooling_params=PoolingParams(returned_token_ids=(-1,)), use_tqdm=False)
