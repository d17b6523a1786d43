"""`/classify`, and the class tasks of `/pooling`: every form of input, labels, and the values of a real model."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from cenote import LLM, PoolingParams
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.conventions import PairTemplate
from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import checkpoints
from tests.conftest import CLASSIFIER, CROSS_ENCODER, UNKNOWN_IDS, classes, error, expected, floats, usage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

ROUTES = ("/classify", "/v1/classify")
CLS, SEP, HELLO, WORLD = 101, 102, 7592, 2088
LABELS = ("no", "maybe", "yes")
PAIR = {"text": "hello", "text_pair": "world"}
PAIR_IDS = [CLS, HELLO, SEP, WORLD, SEP]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def client(serve_all: Serve) -> TestClient:
    return serve_all(info=CLASSIFIER)


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def probs(client: TestClient, given: Any, **fields: Any) -> list[list[float]]:
    return [floats(entry["probs"]) for entry in post(client, "/classify", {"input": given, **fields})["data"]]


def rows(ids: list[int], **params: Any) -> list[list[float]]:
    """The fake classifier's matrix: a row per token."""
    return [classes([token], **params) for token in ids]


# --- /classify ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("hello world", [[CLS, HELLO, WORLD, SEP]]),
        (["hello", "world"], [[CLS, HELLO, SEP], [CLS, WORLD, SEP]]),
        ("", [[CLS, SEP]]),
        ([HELLO, WORLD], [[HELLO, WORLD]]),
        ([[HELLO], [WORLD, HELLO]], [[HELLO], [WORLD, HELLO]]),
        (PAIR, [PAIR_IDS]),
        ([PAIR, {"text": "world", "text_pair": ""}], [PAIR_IDS, [CLS, WORLD, SEP, SEP]]),
    ],
    ids=["text", "texts", "empty text", "ids", "lists of ids", "pair", "pairs"],
)
def test_forms_of_input(client: TestClient, path: str, given: Any, ids: list[list[int]]) -> None:
    answer = post(client, path, {"input": given})
    values = [classes(own) for own in ids]
    tokens = sum(map(len, ids))
    assert answer["id"].startswith("classify-")
    assert isinstance(answer["created"], int)
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert (answer["object"], answer["model"]) == ("list", "fake")
    assert [floats(entry.pop("probs")) for entry in answer["data"]] == values
    assert answer["data"] == [
        {"index": i, "label": LABELS[int(np.argmax(own))], "num_classes": 3} for i, own in enumerate(values)
    ]
    assert answer["usage"] == usage(tokens)


def test_every_label_is_found(client: TestClient) -> None:
    """So that the labels above are not one and the same."""
    answer = post(client, "/classify", {"input": [[i] for i in range(1, 30)]})
    assert {entry["label"] for entry in answer["data"]} == {*LABELS}


def test_a_model_that_names_no_labels(serve: Serve) -> None:
    answer = post(serve(info=replace(CLASSIFIER, labels=())), "/classify", {"input": [[5], [6]]})
    assert [(entry["label"], floats(entry["probs"])) for entry in answer["data"]] == [
        (None, classes([5])),
        (None, classes([6])),
    ]


def test_second_texts_have_type_1(serve: Serve) -> None:
    engine = FakeEngine(CLASSIFIER)
    post(serve(engine), "/classify", {"input": [PAIR]})
    (sequence,) = engine.submitted
    assert (list(sequence.ids), list(sequence.type_ids or [])) == (PAIR_IDS, [0, 0, 0, 1, 1])


def test_pairs_pass_the_pair_template(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    template = PairTemplate("{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}")
    client = serve(info=CLASSIFIER, pair_template=template)
    assert probs(client, [PAIR]) == [classes(tokenizer("query hello document world")["input_ids"])]
    assert probs(client, "hello") == [classes([CLS, HELLO, SEP])]


@pytest.mark.parametrize("key", ["messages", "input"])
@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ([{"role": "user", "content": "hello"}], ["user hello "]),
        ([{"role": "user", "content": "hello"}, {"role": "critic", "content": "world"}], ["user hello critic world "]),
        ([[{"role": "a", "content": "hello"}], [{"role": "b", "content": "world"}]], ["a hello ", "b world "]),
        ([{"role": "user", "content": [{"type": "text", "text": "hello"}]}], ["user hello "]),
        ([{"role": "user", "content": "hello", "text": "x", "name": "n"}], ["user hello "]),
    ],
    ids=["one", "two turns", "several", "parts", "further keys"],
)
def test_conversations(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, key: str, given: list[Any], texts: list[str]
) -> None:
    answer = post(serve(info=CLASSIFIER, chat_template=TEMPLATE), "/classify", {key: given})
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [floats(entry["probs"]) for entry in answer["data"]] == [classes(own) for own in ids]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("given", ["hello", [PAIR]], ids=["text", "pair"])
@pytest.mark.parametrize("asked", [True, None, False])
def test_use_activation(client: TestClient, given: Any, asked: bool | None) -> None:
    (got,) = probs(client, given, use_activation=asked)
    logits = np.asarray(classes([CLS, HELLO, SEP] if given == "hello" else PAIR_IDS, use_activation=False))
    wanted = logits if asked is False else np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"input": "hello world hello", "truncate_prompt_tokens": 4}, [CLS, HELLO, WORLD, SEP]),
        ({"input": [5, 6, 7], "truncate_prompt_tokens": 2, "truncation_side": "left"}, [6, 7]),
        ({"input": "hello", "add_special_tokens": False}, [HELLO]),
        ({"input": "hello", "padding": "max_length", "truncate_prompt_tokens": 5}, [CLS, HELLO, SEP, 0, 0]),
        (
            {"input": {"text": "hello hello", "text_pair": "world world"}, "truncate_prompt_tokens": 5},
            [CLS, HELLO, SEP, WORLD, SEP],
        ),
        ({"input": PAIR, "add_special_tokens": False}, [HELLO, WORLD]),
    ],
    ids=str,
)
def test_truncation_and_padding(client: TestClient, fields: dict[str, Any], ids: list[int]) -> None:
    answer = post(client, "/classify", fields)
    assert floats(answer["data"][0]["probs"]) == classes(ids)
    assert answer["usage"]["prompt_tokens"] == len(ids)


WITHOUT_HEAD = (
    "Unsupported task: 'classify' Supported tasks: ('embed', 'token_embed'). Classification API is not supported by "
    "this model. It needs a checkpoint with a classification head (*ForSequenceClassification), or a language model "
    "and `--convert classify`."
)


@pytest.mark.parametrize("path", ROUTES)
def test_a_model_without_a_head_says_what_it_offers_and_what_would_classify(serve: Serve, path: str) -> None:
    for given in ("hello", [PAIR]):
        assert error(serve(), {"input": given}, path) == {
            "message": WITHOUT_HEAD,
            "type": "BadRequestError",
            "param": "task",
            "code": 400,
        }


@pytest.mark.parametrize("old", ["normalize", "softmax", "activation"])
@pytest.mark.parametrize("path", [*ROUTES, "/pooling"])
def test_older_names_of_use_activation(client: TestClient, path: str, old: str) -> None:
    assert client.post(path, json={"input": "hello", old: None}).status_code == 200, "null is as good as absent"
    for value in (True, False):
        assert error(client, {"input": "hello", old: value}, path) == {
            "message": f"Parameter `{old}` was removed; use `use_activation` instead.",
            "type": "Bad Request",
            "param": old,
            "code": 400,
        }


ONE_SOURCE = "Exactly one of `input` and `messages` must be given."


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, ONE_SOURCE, "input"),
        ({"input": PAIR, "messages": [{"role": "user", "content": "a"}]}, ONE_SOURCE, "input"),
        ({"input": []}, "You must pass at least one prompt", "input"),
        ({"input": [[]]}, "The decoder prompt cannot be empty", "input"),
        ({"input": [-1]}, f"Token id -1 is out of vocabulary; fake takes ids from 0 to 30521{UNKNOWN_IDS}", "input"),
        (
            {"input": [PAIR, {"text": "a", "text_pair": "one " * 70}]},
            "This model's maximum context length is 64 tokens. However, your prompt contains 74 input tokens",
            "input_tokens",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "fake has no chat template, so `messages` cannot be rendered; send `input`",
            "messages",
        ),
        (
            {"input": "a", "mm_processor_kwargs": {"a": 1}},
            "`mm_processor_kwargs` is not accepted",
            "mm_processor_kwargs",
        ),
    ],
    ids=str,
)
def test_refused_by_meaning(client: TestClient, body: dict[str, Any], message: str, param: str) -> None:
    found = error(client, body, "/classify")
    assert found["message"].startswith(message)
    assert (found["code"], found["param"]) == (400, param)


@pytest.mark.parametrize(
    "given",
    [
        5,
        ["a", 5],
        ["a", PAIR],
        [PAIR, "a"],
        [PAIR, {"text": "a"}, "b"],
        {"text": "a"},
        {"text": "a", "text_pair": None},
        {"text": ["a"], "text_pair": "b"},
    ],
    ids=str,
)
def test_refused_by_type(client: TestClient, given: Any) -> None:
    found = error(client, {"input": given}, "/classify")
    assert found["message"].partition(" ")[2].startswith("validation error")
    assert (found["code"], found["type"], found["param"].partition(".")[0]) == (400, "Bad Request", "body")


@pytest.mark.parametrize("given", [["a"] * 4, [[5]] * 4, [PAIR] * 4], ids=["texts", "ids", "pairs"])
def test_too_many_inputs(serve: Serve, given: list[Any]) -> None:
    engine = FakeEngine(CLASSIFIER)
    client = serve(engine, max_client_batch_size=3)
    found = error(client, {"input": given}, "/classify")
    assert found["message"] == "the request has 4 inputs; at most 3 are allowed"
    assert not engine.submitted
    assert len(probs(client, given[:3])) == 3


@pytest.mark.parametrize(("header", "field", "want"), [("h", "b", "h"), (None, "b", "b")])
def test_request_id_and_model_are_echoed(serve: Serve, header: str | None, field: str, want: str) -> None:
    client = serve(info=CLASSIFIER, names=("first", "second"))
    body = {"input": "a", "request_id": field, "model": "second", "user": "u", "unknown": 1}
    answer = client.post("/classify", json=body, headers={"X-Request-Id": header} if header else {}).json()
    assert (answer["id"], answer["model"]) == (f"classify-{want}", "second")
    assert error(client, {"input": "a", "model": "third"}, "/classify")["code"] == 404


# --- /pooling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_activation", [None, False])
@pytest.mark.parametrize("task", [None, "classify"])
def test_pooling_classifies(client: TestClient, task: str | None, use_activation: bool | None) -> None:
    body = {"input": ["hello", "world hello"], "task": task, "use_activation": use_activation}
    answer = post(client, "/pooling", body)
    assert [floats(entry["data"]) for entry in answer["data"]] == [
        classes([CLS, HELLO, SEP], use_activation=use_activation),
        classes([CLS, WORLD, HELLO, SEP], use_activation=use_activation),
    ]
    assert [entry["object"] for entry in answer["data"]] == ["pooling", "pooling"]
    assert answer["usage"]["prompt_tokens"] == 7


@pytest.mark.parametrize("use_activation", [None, False])
def test_pooling_classifies_tokens(client: TestClient, use_activation: bool | None) -> None:
    body = {"input": ["hello", "world hello"], "task": "token_classify", "use_activation": use_activation}
    answer = post(client, "/pooling", body)
    assert [floats(entry["data"]) for entry in answer["data"]] == [
        rows([CLS, HELLO, SEP], use_activation=use_activation),
        rows([CLS, WORLD, HELLO, SEP], use_activation=use_activation),
    ]


def test_a_classifier_also_embeds(client: TestClient) -> None:
    (entry,) = post(client, "/v1/embeddings", {"input": [5, 6]})["data"]
    assert floats(entry["embedding"]) == expected([5, 6])
    (entry,) = post(client, "/pooling", {"input": [5, 6], "task": "embed"})["data"]
    assert floats(entry["data"]) == expected([5, 6])


@pytest.mark.parametrize(("task", "shape"), [("classify", [3]), ("token_classify", [2, 3])])
def test_pooling_encodings(client: TestClient, task: str, shape: list[int]) -> None:
    wanted = np.asarray(classes([5, 6]) if task == "classify" else rows([5, 6]), np.float32)
    body = {"input": [5, 6], "task": task, "encoding_format": "base64"}
    (entry,) = post(client, "/pooling", body)["data"]
    got = np.frombuffer(base64.b64decode(entry["data"]), "<f4").reshape(shape)
    np.testing.assert_array_equal(got, wanted)


def only(task: str, offered: str, given: str) -> str:
    return f"Task '{task}' only supports {offered} parameters, does not support ['{given}'] parameters"


VECTORS, CLASSES = "['dimensions', 'use_activation']", "['use_activation']"
TOKENS = "['dimensions', 'use_activation', 'late_chunking_params']"
STEPS = "['use_activation', 'step_tag_id', 'returned_token_ids']"
NO_STEPS = "{} is for process reward models (pooling type STEP); fake is not one"


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"task": "classify", "step_tag_id": 5}, only("classify", CLASSES, "step_tag_id"), "step_tag_id"),
        (
            {"task": "classify", "returned_token_ids": [1]},
            only("classify", CLASSES, "returned_token_ids"),
            "returned_token_ids",
        ),
        ({"task": "embed", "step_tag_id": 5}, only("embed", VECTORS, "step_tag_id"), "step_tag_id"),
        (
            {"task": "token_embed", "returned_token_ids": [1]},
            only("token_embed", TOKENS, "returned_token_ids"),
            "returned_token_ids",
        ),
        ({"task": "token_classify", "step_tag_id": 5}, NO_STEPS.format("step_tag_id"), "step_tag_id"),
        (
            {"task": "token_classify", "returned_token_ids": [1]},
            NO_STEPS.format("returned_token_ids"),
            "returned_token_ids",
        ),
        ({"task": "classify", "dimensions": 2}, "dimensions is currently not supported", "dimensions"),
        (
            {"task": "reward"},
            "`reward` task was removed; use `classify` (one reward per input) or `token_classify` (one per token or "
            "step) instead.",
            "task",
        ),
        (
            {"task": "rank"},
            "Unsupported task: 'rank' Supported tasks: ('classify', 'token_classify', 'embed', 'token_embed')",
            "task",
        ),
    ],
    ids=str,
)
def test_parameters_of_other_tasks(client: TestClient, fields: dict[str, Any], message: str, param: str) -> None:
    assert error(client, {"input": "a", **fields}, "/pooling") == {
        "message": message,
        "type": "BadRequestError",
        "param": param,
        "code": 400,
    }


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"step_tag_id": -1}, "greater_than_equal"),
        ({"step_tag_id": True}, "int_type"),
        ({"returned_token_ids": []}, "too_short"),
        ({"returned_token_ids": [1, -1]}, "greater_than_equal"),
        ({"returned_token_ids": ["1"]}, "int_type"),
        ({"returned_token_ids": 1}, "list_type"),
    ],
    ids=str,
)
def test_step_parameters_of_the_wrong_type(client: TestClient, fields: dict[str, Any], kind: str) -> None:
    found = error(client, {"input": "a", "task": "token_classify", **fields}, "/pooling")
    assert f"'type': '{kind}'" in found["message"]
    assert found["param"].startswith(f"body.{next(iter(fields))}")


# --- real models -------------------------------------------------------------------------------------------------

TEXTS = ["natural pits", "the quick brown fox jumps over the lazy dog.", "water", "MIXED case and UPPER CASE", "a"]
PAIRS = [{"text": "one two", "text_pair": text} for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.classifier(tmp_path_factory.mktemp("nli"), id2label=dict(enumerate(LABELS)))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[TestClient]:
    with TestClient(build([Service.open(ModelConfig(model=str(folder)), EngineConfig())], ServerConfig())) as made:
        yield made


def logits(folder: Path, *texts: Any) -> torch.Tensor:
    """Logits of Transformers' model, one input at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return torch.cat(
            [
                model(**tokenizer(*(t.values() if isinstance(t, dict) else [t]), return_tensors="pt")).logits
                for t in texts
            ]
        )


@pytest.mark.parametrize("given", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_classes_are_those_of_transformers_and_of_llm(
    real: TestClient, llm: LLM, folder: Path, given: list[Any]
) -> None:
    reference = logits(folder, *given)
    answer = post(real, "/classify", {"input": given})
    own = llm.classify(given, use_tqdm=False)
    got = [entry["probs"] for entry in answer["data"]]
    np.testing.assert_allclose(got, reference.softmax(-1).numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(got, [output.outputs.probs for output in own], rtol=0, atol=1e-6)
    labels = [LABELS[i] for i in reference.argmax(-1).tolist()]
    assert [entry["label"] for entry in answer["data"]] == labels == [output.outputs.label for output in own]
    np.testing.assert_allclose(probs(real, given, use_activation=False), reference.numpy(), rtol=0, atol=2e-5)
    assert np.ptp(got, axis=0).min() > 1e-2, "all inputs give nearly the same classes: this proves nothing"


def test_pairs_between_other_prompts_offline(llm: LLM, folder: Path) -> None:
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]
    pair = ("one two", TEXTS[2])
    got = llm.classify([TEXTS[1], pair, ids, PAIRS[3]], use_tqdm=False)
    wanted = logits(folder, TEXTS[1], PAIRS[2], TEXTS[0], PAIRS[3]).softmax(-1)
    np.testing.assert_allclose([output.outputs.probs for output in got], wanted.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("problem", "activation"),
    [
        ("single_label_classification", lambda x: x.softmax(-1)),
        ("multi_label_classification", lambda x: x.sigmoid()),
        ("regression", lambda x: x),
    ],
    ids=["single label", "multi label", "regression"],
)
def test_the_activation_follows_the_problem_type(tmp_path: Path, serve: Serve, problem: str, activation: Any) -> None:
    folder = checkpoints.classifier(tmp_path, num_labels=3, problem_type=problem)
    client = serve.of(Service.open(ModelConfig(model=str(folder)), EngineConfig()))
    answer = post(client, "/classify", {"input": TEXTS[:2]})
    wanted = activation(logits(folder, *TEXTS[:2]))
    np.testing.assert_allclose([entry["probs"] for entry in answer["data"]], wanted.numpy(), rtol=0, atol=2e-5)
    assert answer["data"][0]["label"] == f"LABEL_{int(wanted[0].argmax())}"


def test_token_classes_are_those_of_transformers(tmp_path: Path, serve: Serve) -> None:
    folder = checkpoints.classifier(tmp_path, head="ForTokenClassification", num_labels=4)
    client = serve.of(Service.open(ModelConfig(model=str(folder)), EngineConfig()))
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = post(client, "/pooling", {"input": TEXTS})  # its only class task is the default
    with torch.inference_mode():
        for text, entry in zip(TEXTS, answer["data"], strict=True):
            wanted = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            np.testing.assert_allclose(entry["data"], wanted.numpy(), rtol=0, atol=2e-5)
    found = error(client, {"input": "a"}, "/classify")
    assert found["message"].startswith("Unsupported task: 'classify' Supported tasks: ('token_classify', 'embed', ")


@pytest.mark.parametrize(
    ("task", "params", "message"),
    [
        ("classify", {"dimensions": 4}, only("classify", CLASSES, "dimensions")),
        ("embed", {"step_tag_id": 4}, only("embed", VECTORS, "step_tag_id")),
        ("token_embed", {"returned_token_ids": [4]}, only("token_embed", TOKENS, "returned_token_ids")),
    ],
)
def test_parameters_of_other_tasks_offline(llm: LLM, task: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        llm.encode("a", PoolingParams(**params), pooling_task=task, use_tqdm=False)
    assert str(caught.value) == message


def test_parameters_of_token_classes_offline(tmp_path: Path) -> None:
    folder = checkpoints.classifier(tmp_path, head="ForTokenClassification", num_labels=4)
    with LLM(str(folder)) as llm:
        for params, message in (
            ({"dimensions": 4}, only("token_classify", STEPS, "dimensions")),
            ({"step_tag_id": 4}, NO_STEPS.format("step_tag_id").replace("fake", folder.name)),
        ):
            with pytest.raises(BadRequest) as caught:
                llm.encode("a", PoolingParams(**params), pooling_task="token_classify", use_tqdm=False)
            assert str(caught.value) == message


def test_a_cross_encoder_classifies_pairs_as_it_scores_them(serve: Serve) -> None:
    client = serve(info=CROSS_ENCODER)
    (score,) = post(client, "/score", {"queries": "hello", "documents": "world"})["data"]
    assert probs(client, PAIR) == [[floats(score["score"])]]
