"""Bad requests: each is refused with the status, type, parameter and words that clients rely on."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest, CenoteError, Closed, EngineFailed, Overloaded
from cenote.server import app, errors, reading
from tests.conftest import CLASSIFIER, INFO, JSON, UNKNOWN_IDS, error, expected, floats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.testclient import TestClient

    from tests.conftest import Serve

ROUTE = "/v1/embeddings"
SAID = [{"role": "user", "content": "hello"}]
BOTH_FLAGS = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
ONE_SOURCE = "Exactly one of `input` and `messages` must be given."
SALT = "`cache_salt` must be at most 128 characters without '@', '/', '\\' or NUL."
UNTRUSTED = (
    "Chat template is passed with request, but --trust-request-chat-template is not set. "
    "Refused request with untrusted chat template."
)


def too_long(count: str) -> str:
    return (
        f"This model's maximum context length is 64 tokens. However, your prompt contains {count} input tokens, which "
        "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
    )


def unknown_id(token: int) -> str:
    return f"Token id {token} is out of vocabulary; fake takes ids from 0 to {INFO.vocab_size - 1}{UNKNOWN_IDS}"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"input": []}, "You must pass at least one prompt", "input"),
        ({"input": [[]]}, "The decoder prompt cannot be empty", "input"),
        ({"input": [[5], []]}, "The decoder prompt cannot be empty", "input"),
        ({"input": "", "add_special_tokens": False}, "The decoder prompt cannot be empty", "input"),
        ({"input": [5], "truncate_prompt_tokens": 0}, "The decoder prompt cannot be empty", "input"),
        ({"input": [-1]}, unknown_id(-1), "input"),
        ({"input": [[5], [7, INFO.vocab_size]]}, unknown_id(INFO.vocab_size), "input"),
        ({"input": [2**63]}, unknown_id(2**63), "input"),
        ({"input": [-(2**70), 2]}, unknown_id(-(2**70)), "input"),
        ({"input": "one " * 63}, too_long("65"), "input_tokens"),
        ({"input": ["one", "one " * 70]}, too_long("72"), "input_tokens"),
        ({"input": "one " * 20_000}, too_long("at least 65"), "input_tokens"),
        ({"input": [5] * 65}, too_long("65"), "input_tokens"),
        ({"input": "\ud800"}, "text must be valid Unicode, without lone surrogates", "input"),
        (
            {"input": "a", "truncate_prompt_tokens": 65},
            "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
            "truncate_prompt_tokens",
        ),
        ({"messages": SAID, "chat_template": "x"}, UNTRUSTED, "chat_template"),
        ({"messages": SAID, "chat_template_kwargs": {"chat_template": "x"}}, UNTRUSTED, "chat_template"),
        (
            {"messages": SAID},
            "fake has no chat template, so `messages` cannot be rendered; send `input`, "
            "or start the server with --chat-template",
            "messages",
        ),
        (
            {"input": "a", "mm_processor_kwargs": {"a": 1}},
            "`mm_processor_kwargs` is not accepted from requests",
            "mm_processor_kwargs",
        ),
        (
            {"messages": SAID, "media_io_kwargs": {"image": {}}},
            "`media_io_kwargs` is not accepted from requests",
            "media_io_kwargs",
        ),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_refused_by_meaning(client: TestClient, body: dict[str, Any], message: str, param: str) -> None:
    assert error(client, body) == {"message": message, "type": "BadRequestError", "param": param, "code": 400}


def test_the_longest_input_is_taken(client: TestClient) -> None:
    for given in ("one " * 62, [5] * 64):
        assert client.post(ROUTE, json={"input": given}).json()["usage"]["prompt_tokens"] == 64


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, ONE_SOURCE, "input"),
        ({"input": None}, ONE_SOURCE, "input"),
        ({"input": "a", "messages": SAID}, ONE_SOURCE, "input"),
        (
            {"messages": SAID, "add_generation_prompt": True, "continue_final_message": True},
            BOTH_FLAGS,
            "continue_final_message",
        ),
        (
            {"input": "a", "normalize": False},
            "Parameter `normalize` was removed; use `use_activation` instead.",
            "normalize",
        ),
        ({"input": "a", "cache_salt": "x" * 129}, SALT, "cache_salt"),
        ({"input": "a", "cache_salt": "a/b"}, SALT, "cache_salt"),
        ({"input": "a", "cache_salt": "a\0b"}, SALT, "cache_salt"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_refused_by_a_rule_that_has_words_of_its_own(
    client: TestClient, body: dict[str, Any], message: str, param: str
) -> None:
    assert error(client, body) == {"message": message, "type": "Bad Request", "param": param, "code": 400}


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"input": 5}, "list_type", "body.input"),
        ({"input": {"text": "a"}}, "string_type", "body.input"),
        ({"input": ["a", 5]}, "string_type", "body.input.1"),
        ({"input": ["a", None]}, "string_type", "body.input.1"),
        ({"input": [1.5]}, "int_from_float", "body.input.0"),
        ({"input": [5, "a"]}, "int_parsing", "body.input.1"),
        ({"input": [5, "6"]}, "token_ids", "body.input.1"),
        ({"input": ["5", 6]}, "string_type", "body.input.1"),
        ({"input": [[5, True]]}, "token_ids", "body.input.0.1"),
        ({"input": [True]}, "token_ids", "body.input.0"),
        ({"messages": []}, "too_short", "body.messages"),
        ({"messages": [[]]}, "too_short", "body.messages.0"),
        ({"messages": "a"}, "list_type", "body.messages"),
        ({"input": "a", "model": 5}, "string_type", "body.model"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "greater_than_equal", "body.truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": "x"}, "int_parsing", "body.truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "middle"}, "literal_error", "body.truncation_side"),
        ({"input": "a", "padding": "longest"}, "literal_error", "body.padding"),
        ({"input": "a", "encoding_format": "hex"}, "literal_error", "body.encoding_format"),
        ({"input": "a", "embed_dtype": "int8"}, "literal_error", "body.embed_dtype"),
        ({"input": "a", "endianness": "middle"}, "literal_error", "body.endianness"),
        ({"input": "a", "priority": 2**63}, "less_than", "body.priority"),
        ({"input": "a", "cache_salt": ""}, "string_too_short", "body.cache_salt"),
        ({"input": "a", "cache_salt": "x" * 1025}, "string_too_long", "body.cache_salt"),
        ({"input": "a", "use_activation": "maybe"}, "bool_parsing", "body.use_activation"),
        ({"input": "a", "dimensions": 1.5}, "int_from_float", "body.dimensions"),
        ([], "model_attributes_type", "body"),
        ("text", "model_attributes_type", "body"),
        (b"", "missing", "body"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_refused_by_type(client: TestClient, body: Any, kind: str, param: str) -> None:
    found = error(client, body)
    assert (found["code"], found["type"], found["param"]) == (400, "Bad Request", param)
    count = found["message"].count("{'type': ")
    assert found["message"].startswith(f"{count} validation error{'s' if count > 1 else ''}:\n  {{'type': ")
    assert f"'type': '{kind}'" in found["message"]


def test_a_refusal_is_short_however_long_its_input(client: TestClient) -> None:
    message = error(client, {"input": [{"a" * 5000: 1}] * 50 + ["b" * 5000]})["message"]
    assert len(message.splitlines()) <= 11
    assert max(map(len, message.splitlines())) <= 1002
    assert error(client, {"input": ["b" * 100_000, None]})["message"].count("b") < 10_000


@pytest.mark.parametrize("body", [b'{"input": ', b"{'input': 'a'}", b"\xff\xfe", b"input=a"])
def test_malformed_json(client: TestClient, body: bytes) -> None:
    found = error(client, body)
    assert (found["code"], found["type"]) == (400, "Bad Request")
    assert found["message"].startswith("JSON decode error: ")
    assert found["param"].startswith("body.")


def test_the_place_of_a_json_error_is_told(client: TestClient) -> None:
    assert error(client, b'{"input": ')["param"] == "body.10"


def test_json_nested_too_deeply(client: TestClient) -> None:
    found = error(client, b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert (found["code"], found["type"], found["param"]) == (400, "Bad Request", "body")


@pytest.mark.parametrize(
    "field",
    ["encoding_format", "embed_dtype", "endianness", "priority", "add_generation_prompt", "continue_final_message",
     "return_tokens"],
)  # fmt: skip
def test_null_is_a_field_that_is_not_given(client: TestClient, field: str) -> None:
    answer = client.post(ROUTE, json={"input": "a", field: None})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == client.post(ROUTE, json={"input": "a"}).json()["data"]
    assert client.post(ROUTE, json={"input": "a", field: {}}).status_code == 400


@pytest.mark.parametrize("headers", [{}, {"Content-Type": ""}])
def test_json_may_come_without_a_content_type(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post(ROUTE, content=b'{"input": "a"}', headers=headers)
    assert answer.json()["data"] == client.post(ROUTE, json={"input": "a"}).json()["data"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_wrong_content_type(client: TestClient, kind: str) -> None:
    answer = client.post(ROUTE, content=b'{"input": "a"}', headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "Unsupported Media Type: Only 'application/json' is allowed",
        "type": "Bad Request",
        "param": None,
        "code": 400,
    }


def test_a_path_without_a_route_is_told_whatever_comes(client: TestClient) -> None:
    answer = client.post("/v1/files", files={"file": b"{}"}, data={"purpose": "batch"})
    assert (answer.status_code, answer.json()["message"]) == (404, "Not Found")
    assert client.post("/v1/models", files={"file": b"{}"}).status_code == 405


def test_content_type_may_have_parameters(client: TestClient) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert client.post(ROUTE, content=b'{"input": "a"}', headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize("path", [ROUTE, "/pooling"])
def test_unknown_model(client: TestClient, path: str) -> None:
    assert error(client, {"input": "a", "model": "other"}, path) == {
        "message": "The model `other` does not exist.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }


def test_messages_show_the_name_that_was_sent_and_no_broken_text(client: TestClient) -> None:
    assert error(client, {"input": "a", "model": "/srv/models/mine"})["message"] == (
        "The model `/srv/models/mine` does not exist."
    )
    assert error(client, {"input": "a", "model": "\ud800"})["message"] == "The model `?` does not exist."


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": "a", "dimensions": 3}, "'/models/bge-base'"),
        ({"input": "a", "prompt_name": "/of/mine"}, "'/of/mine'"),
        ({"input": {"a": "/of/mine"}}, "'/of/mine'"),
    ],
    ids=["served name", "name sent", "body sent"],
)
def test_names_that_look_like_paths_are_told(serve: Serve, body: dict[str, Any], words: str) -> None:
    name = "/models/bge-base"
    client = serve(info=replace(INFO, name=name), names=(name,))
    assert words in error(client, body)["message"]


def test_a_failure_shows_no_path_of_a_file(serve: Serve) -> None:
    client = serve(FakeEngine(INFO, failures=[EngineFailed("OSError: /usr/lib/torch/_ops.py of https://a.b/c/d")]))
    assert error(client, {"input": "a"})["message"] == "OSError: <path> of https://a.b/c/d"


@pytest.mark.parametrize("path", [ROUTE, "/v2/embed", "/pooling", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_wrong_method(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.json()["error"]["message"] == answer.json()["detail"] == "Method Not Allowed"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/none", "/v1", "/v1/embedding", "/v3/embed", "/health/live"])
def test_unknown_path(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path, headers=JSON)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == answer.json()["detail"] == "Not Found"


def test_body_too_large_as_declared(serve: Serve) -> None:
    client = serve(max_body_bytes=100)
    fits = json.dumps({"input": "hello"}).encode().ljust(100)
    assert client.post(ROUTE, content=fits, headers=JSON).status_code == 200
    assert error(client, fits + b" ") == {
        "message": "the request body has 101 bytes; at most 100 are allowed",
        "type": "BadRequestError",
        "param": None,
        "code": 413,
    }


def test_body_too_large_in_chunks(serve: Serve) -> None:
    """A body of unknown length is refused as soon as it is too long; it is not read to its end."""
    client = serve(max_body_bytes=100)

    def chunks(count: int) -> Iterator[bytes]:
        yield b'{"input": "hello"}'
        for _ in range(count):
            yield b" " * 41

    assert client.post(ROUTE, content=chunks(2), headers=JSON).status_code == 200
    answer = client.post(ROUTE, content=chunks(3), headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "the request body has more than the 100 bytes that are allowed"


def test_a_route_without_a_body_reads_none(serve: Serve) -> None:
    """Nor does it need a key, so that a body is nothing that a stranger could fill memory with."""
    client = serve(max_body_bytes=100, api_key=["secret"])

    def chunks() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 1000

    assert client.post("/ping", content=chunks()).status_code == 200
    assert client.post("/none", content=chunks()).status_code == 401


@pytest.mark.parametrize(
    "body",
    [{"input": ["a"] * 4}, {"input": [[5]] * 4}, {"messages": [SAID] * 4}],
    ids=["texts", "ids", "conversations"],
)
def test_too_many_inputs(serve: Serve, body: dict[str, list[Any]]) -> None:
    engine = FakeEngine(INFO)
    client = serve(engine, max_client_batch_size=3, chat_template="{{ messages[0].content }}")
    (key,) = body
    assert error(client, body) == {
        "message": "the request has 4 inputs; at most 3 are allowed",
        "type": "BadRequestError",
        "param": key,
        "code": 400,
    }
    assert not engine.submitted
    assert client.post(ROUTE, json={key: body[key][:3]}).status_code == 200


def test_inputs_are_counted_before_any_is_rendered(serve: Serve) -> None:
    client = serve(max_client_batch_size=3, chat_template="{{ raise_exception('rendered') }}")
    assert error(client, {"messages": [SAID] * 4})["message"] == "the request has 4 inputs; at most 3 are allowed"


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{{ raise_exception('no system role') }}", "no system role"), ("{% if %}", "Expected an expression")],
)
def test_a_chat_template_that_refuses(serve: Serve, template: str, reason: str) -> None:
    found = error(serve(chat_template=template), {"messages": SAID})
    assert (found["code"], found["type"], found["param"]) == (400, "BadRequestError", "messages")
    assert found["message"].startswith("the chat template refuses these messages: ")
    assert reason in found["message"]


PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        ({"role": "user", "content": PART}, "content", repr(PART)),
        ({"role": "user", "content": 5}, "content", "5"),
        ({"role": "user", "content": True}, "content", "True"),
        ({"role": "user", "content": None}, "content", "None"),
        ({"role": "assistant", "tool_calls": []}, "content", "None"),
        ({"role": "user"}, "content", "None"),
        ({"content": "x"}, "role", "None"),
        ({"role": 5, "content": "x"}, "role", "5"),
        ({}, "role", "None"),
    ],
    ids=repr,
)
def test_a_message_has_a_role_and_a_content(serve: Serve, message: dict[str, Any], field: str, value: str) -> None:
    found = error(serve(chat_template="{{ messages }}"), {"messages": [*SAID, message]})
    assert (found["code"], found["param"]) == (400, "messages")
    assert found["message"].startswith(f"got {value} as the `{field}` of a message, which must be a text")


def test_media_in_messages_is_refused(serve: Serve) -> None:
    content = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/cat.png"}}]
    found = error(serve(chat_template="x"), {"messages": [{"role": "user", "content": content}]})
    assert found["code"] == 400
    assert found["message"] == (
        "content parts of type 'image_url' are not supported by this model, only text: fake takes no images, only texts"
    )


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (EngineFailed("the forward pass failed: RuntimeError: boom"), 500, "InternalServerError"),
        (Closed("the engine is shutting down"), 503, "ServiceUnavailableError"),
        (Overloaded("the queue is full", retry_after=7), 429, "RateLimitError"),
        (BadRequest("not this", param="input"), 400, "BadRequestError"),
    ],
    ids=["failed", "closed", "overloaded", "bad request"],
)
def test_what_the_engine_refuses(serve: Serve, failure: CenoteError, status: int, kind: str) -> None:
    client = serve(FakeEngine(INFO, failures=[failure]))
    answer = client.post(ROUTE, json={"input": [5]})
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == ("7" if status == 429 else None)
    assert answer.json()["error"] == {
        "message": failure.message,
        "type": kind,
        "param": failure.param,
        "code": status,
    }
    (entry,) = client.post(ROUTE, json={"input": [5]}).json()["data"]
    assert floats(entry["embedding"]) == expected([5])


def test_a_bug_is_not_shown(serve: Serve) -> None:
    class Buggy(FakeEngine):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("secret")

    assert error(serve(Buggy(INFO)), {"input": "a"}) == {
        "message": "Internal server error",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }


FLOODS = {
    "nulls": (b'{"input": [' + b"null," * 200_000 + b"null]}", ROUTE),
    "fractions": (b'{"input": [' + b"1.5," * 200_000 + b"1.5]}", ROUTE),
    "one id each": (b'{"input": [' + b"[1]," * 200_000 + b"[1]]}", ROUTE),
    "objects": (b'{"input": [' + b"{}," * 200_000 + b"{}]}", "/classify"),
    "documents": (b'{"query": "a", "documents": [' + b"null," * 200_000 + b"null]}", "/rerank"),
    "messages": (b'{"messages": [' + b"null," * 200_000 + b"null]}", "/tokenize"),
    "wrong messages": (b'{"messages": [' + b"{}," * 4_000 + b"null]}", "/tokenize"),
    "texts": (b'{"texts": [' + b"null," * 200_000 + b"null]}", "/v2/embed"),
    "ids": (b'{"tokens": [' + b"1," * 1_100_000 + b"1]}", "/detokenize"),
    "a model's name": (b'{"input": "a", "model": "' + b"/" * 5_000_000 + b'"}', ROUTE),
    "digits": (b'{"input": "a", "priority": ' + b"1" * 5_000 + b"}", ROUTE),
    "digits among unknown fields": (b'{"input": "a", "x": ' + b"1" * 5_000 + b"}", ROUTE),
}


@pytest.mark.parametrize(("body", "path"), FLOODS.values(), ids=FLOODS)
def test_a_large_wrong_body_is_refused_by_a_short_report(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, body: bytes, path: str
) -> None:
    """No more is reported than is shown, and a long body is parsed on another thread than the event loop's."""
    report, parse = errors.validation, reading._parsed
    reported: list[int] = []
    threads: list[str] = []

    def validation(errors: Any) -> Any:
        reported.append(len(errors))
        return report(errors)

    def parsed(content: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return parse(content)

    monkeypatch.setattr(errors, "validation", validation)
    monkeypatch.setattr(reading, "_parsed", parsed)
    answer = serve(FakeEngine(CLASSIFIER)).post(path, content=body, headers=JSON)
    assert answer.status_code in (400, 404), answer.text[:300]
    assert len(answer.content) < 100_000
    assert all(count <= 6 for count in reported)
    (thread,) = threads
    assert thread.startswith("cenote-render") == (len(body) > app.LARGE_BODY)


@pytest.mark.parametrize("route", ["/v1/embeddings", "/pooling", "/classify", "/rerank", "/score", "/tokenize"])
def test_a_number_of_too_many_digits_is_the_request_s_fault(client: TestClient, route: str) -> None:
    found = error(client, b'{"input": "a", "x": ' + b"1" * 5_000 + b"}", route)
    assert (found["code"], found["type"]) == (400, "Bad Request")
    assert found["message"].startswith("JSON decode error: Exceeds the limit (4300 digits) for integer string")


def test_texts_that_are_tokenised_have_a_limit(serve: Serve) -> None:
    client = serve(max_tokenize_bytes=10)
    assert client.post("/tokenize", json={"prompt": "a" * 10}).status_code == 200
    found = error(client, {"prompt": "\u6c34" * 4}, "/tokenize")
    assert found["param"] == "prompt"
    assert found["message"].startswith("the text has 12 bytes; at most 10 are tokenised.")
    assert client.post("/detokenize", json={"tokens": [5] * 10}).status_code == 200
    found = error(client, {"tokens": [5] * 11}, "/detokenize")
    assert found["message"] == "the request has 11 token ids; at most 10 are allowed"


def test_a_conversation_that_is_tokenised_has_the_limit_of_its_text(serve: Serve) -> None:
    client = serve(max_tokenize_bytes=10, chat_template="{{ messages[0].content * 6 }}")
    assert client.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).status_code == 200
    found = error(client, {"messages": [{"role": "user", "content": "aa"}]}, "/tokenize")
    assert (found["param"], found["message"][:20]) == ("messages", "the text has 12 byte")
