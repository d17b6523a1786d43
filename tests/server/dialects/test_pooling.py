"""`/pooling`, `/tokenize` and `/detokenize`: both embed tasks at once, and the tokenizer on the wire."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.conftest import INFO, expected, floats

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

CLS, SEP, HELLO, WORLD = 101, 102, 7592, 2088
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def rows(ids: list[int], **params: Any) -> list[list[float]]:
    """The fake model's matrix: a row per token."""
    return [expected([token], **params) for token in ids]


@pytest.mark.parametrize("task", [None, "embed"])
def test_embed(client: TestClient, task: str | None) -> None:
    answer = post(client, "/pooling", {"input": ["hello", "world"], "task": task})
    assert answer["id"].startswith("pooling-")
    assert [entry["object"] for entry in answer["data"]] == ["pooling", "pooling"]
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    for entry, ids in zip(answer["data"], ([CLS, HELLO, SEP], [CLS, WORLD, SEP]), strict=True):
        assert floats(entry["data"]) == expected(ids)
    assert answer["usage"]["prompt_tokens"] == 6


@pytest.mark.parametrize("use_activation", [None, False])
def test_token_embed(client: TestClient, use_activation: bool | None) -> None:
    body = {"input": ["hello", "world hello"], "task": "token_embed", "use_activation": use_activation}
    answer = post(client, "/pooling", body)
    got = [floats(entry["data"]) for entry in answer["data"]]
    assert got == [
        rows([CLS, HELLO, SEP], use_activation=use_activation),
        rows([CLS, WORLD, HELLO, SEP], use_activation=use_activation),
    ]
    assert answer["usage"]["prompt_tokens"] == 7


def test_the_model_decides_the_default_task(serve: Serve) -> None:
    client = serve(info=replace(INFO, default_task="token_embed"))
    (entry,) = post(client, "/pooling", {"input": [5, 6]})["data"]
    assert floats(entry["data"]) == rows([5, 6])
    (entry,) = post(client, "/pooling", {"input": [5, 6], "task": "embed"})["data"]
    assert floats(entry["data"]) == expected([5, 6])
    (entry,) = post(client, "/v1/embeddings", {"input": [5, 6]})["data"]
    assert floats(entry["embedding"]) == expected([5, 6])


def test_matrices_as_bytes(client: TestClient) -> None:
    body = {"input": [[5, 6], [7]], "task": "token_embed", "encoding_format": "bytes", "endianness": "little"}
    answer = client.post("/pooling", json=body)
    described = json.loads(answer.headers["metadata"])
    assert [entry["shape"] for entry in described["data"]] == [[2, INFO.dimension], [1, INFO.dimension]]
    for entry, ids in zip(described["data"], ([5, 6], [7]), strict=True):
        raw = answer.content[entry["start"] : entry["end"]]
        assert np.frombuffer(raw, "<f4").reshape(entry["shape"]).tolist() == rows(ids)


def test_matrices_as_base64(client: TestClient) -> None:
    body = {"input": [5, 6], "task": "token_embed", "encoding_format": "base64", "embed_dtype": "float16"}
    (entry,) = post(client, "/pooling", body)["data"]
    got = np.frombuffer(base64.b64decode(entry["data"]), np.float16)
    assert got.tolist() == np.asarray(rows([5, 6]), np.float16).ravel().tolist()


def test_conversations_are_pooled(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    client = serve(chat_template=TEMPLATE)
    ids = tokenizer("user hello ", add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": "hello"}]
    (entry,) = post(client, "/pooling", {"messages": messages, "task": "token_embed"})["data"]
    assert floats(entry["data"]) == rows(ids)


PLUGIN = "No IOProcessor plugin installed."


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"input": "a", "task": "score"}, "`score` task was removed; use `classify` instead.", "task"),
        (
            {"input": "a", "task": "encode"},
            "`encode` task was removed; use `token_embed` or `token_classify` instead.",
            "task",
        ),
        (
            {"input": "a", "task": "nonsense"},
            "Unsupported task: 'nonsense' Supported tasks: ('embed', 'token_embed')",
            "task",
        ),
        (
            {"input": "a", "task": "classify"},
            "Unsupported task: 'classify' Supported tasks: ('embed', 'token_embed')",
            "task",
        ),
        ({"input": "a", "dimensions": 4}, "dimensions is currently not supported", "dimensions"),
        ({"data": {"any": 1}}, PLUGIN, "data"),
        ({"data": {"any": 1}, "task": "plugin"}, PLUGIN, "data"),
        ({"task": "plugin"}, PLUGIN, "data"),
        ({}, "Exactly one of `input` and `messages` must be given.", "input"),
        (
            {"input": "a", "messages": [{"role": "user", "content": "a"}]},
            "Exactly one of `input` and `messages` must be given.",
            "input",
        ),
    ],
    ids=str,
)
def test_refusals(client: TestClient, body: dict[str, Any], message: str, param: str) -> None:
    answer = client.post("/pooling", json=body)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400
    assert error["message"].startswith(message)
    assert error["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
@pytest.mark.parametrize(
    ("body", "ids"),
    [
        ({"prompt": "hello world"}, [CLS, HELLO, WORLD, SEP]),
        ({"prompt": "hello world", "add_special_tokens": False}, [HELLO, WORLD]),
        ({"prompt": ""}, [CLS, SEP]),
        ({"prompt": "hello " * 100, "model": "fake"}, [CLS, *[HELLO] * 100, SEP]),
    ],
    ids=["text", "no special tokens", "empty", "longer than the model takes"],
)
def test_tokenize(client: TestClient, path: str, body: dict[str, Any], ids: list[int]) -> None:
    assert post(client, path, body) == {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None}


def test_token_strings(client: TestClient) -> None:
    answer = post(client, "/tokenize", {"prompt": "cenote", "return_token_strs": True})
    assert answer["token_strs"] == ["[CLS]", "ce", "##note", "[SEP]"]
    assert answer["count"] == 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "user hello assistant"),
        ({"add_generation_prompt": False}, "user hello"),
        ({"continue_final_message": True}, "user hello"),
        ({"add_special_tokens": True}, "[CLS] user hello assistant [SEP]"),
    ],
    ids=str,
)
def test_tokenize_a_conversation(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], text: str
) -> None:
    client = serve(chat_template=TEMPLATE)
    answer = post(client, "/tokenize", {"messages": [{"role": "user", "content": "hello"}], **options})
    assert answer["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokenize_a_conversation_with_tools(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    client = serve(chat_template="{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}end")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    tool = {"type": "function", "function": {"name": "hello", "parameters": {}}}
    for tools, text in ((None, "end"), ([tool, tool], "hello hello end")):
        answer = post(client, "/tokenize", body | {"tools": tools})
        assert answer["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
@pytest.mark.parametrize(
    ("ids", "text"), [([CLS, HELLO, WORLD, SEP], "[CLS] hello world [SEP]"), ([HELLO, WORLD], "hello world"), ([], "")]
)
def test_detokenize(client: TestClient, path: str, ids: list[int], text: str) -> None:
    assert post(client, path, {"tokens": ids}) == dict.fromkeys(("prompt", "text", "content"), text)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "body.prompt"),
        ("/tokenize", {"messages": []}, 400, "body.messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, None),
        ("/detokenize", {}, 400, "body.tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "body.tokens.0"),
        ("/detokenize", {"tokens": [1, 2**63]}, 400, "body.tokens.1"),
        ("/detokenize", {"tokens": [INFO.vocab_size]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**63 - 1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, None),
    ],
    ids=str,
)
def test_tokenizer_refusals(
    client: TestClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param)
