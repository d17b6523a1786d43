"""`/v1/embeddings` over a fake engine: every form of input, every encoding, and the ids that reach the engine."""

from __future__ import annotations

import base64
import itertools
import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.conftest import INFO, error, expected, floats, usage

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

ROUTE = "/v1/embeddings"
CLS, SEP, PAD = 101, 102, 0
HELLO, WORLD, ONE, TWO, THREE, FOUR = 7592, 2088, 2028, 2048, 2093, 2176
COUNT = "one two three four"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ tone }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def embed(client: TestClient, **body: Any) -> Any:
    answer = client.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def vectors(client: TestClient, **body: Any) -> list[list[float]]:
    return [floats(entry["embedding"]) for entry in embed(client, **body)["data"]]


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("hello world", [[CLS, HELLO, WORLD, SEP]]),
        (["hello", "world"], [[CLS, HELLO, SEP], [CLS, WORLD, SEP]]),
        (["world"], [[CLS, WORLD, SEP]]),
        ("", [[CLS, SEP]]),
        (["1", "2"], [[CLS, 1015, SEP], [CLS, 1016, SEP]]),
        ([HELLO, WORLD], [[HELLO, WORLD]]),
        ([[HELLO], [WORLD, HELLO]], [[HELLO], [WORLD, HELLO]]),
        ([INFO.vocab_size - 1, 0], [[INFO.vocab_size - 1, 0]]),
    ],
    ids=["text", "texts", "one text in a list", "empty text", "texts of digits", "ids", "lists of ids", "edge ids"],
)
def test_text_and_ids(client: TestClient, given: Any, ids: list[list[int]]) -> None:
    answer = embed(client, input=given)
    tokens = sum(map(len, ids))
    assert [floats(entry.pop("embedding")) for entry in answer["data"]] == [expected(i) for i in ids]
    assert answer["data"] == [{"index": i, "object": "embedding"} for i in range(len(ids))]
    assert answer["usage"] == usage(tokens)
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert (answer["object"], answer["model"]) == ("list", "fake")


TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize("key", ["messages", "input"])
@pytest.mark.parametrize(
    ("conversations", "options", "texts"),
    [
        (TURNS, {}, ["system: be kind\nuser: hello\n"]),
        ([TURNS, said("world")], {}, ["system: be kind\nuser: hello\n", "user: world\n"]),
        ([said("world")], {}, ["user: world\n"]),
        (said("hello"), {"add_generation_prompt": True}, ["user: hello\nassistant:"]),
        (said("hello"), {"continue_final_message": True}, ["user: hello"]),
        (said("hello"), {"chat_template_kwargs": {"tone": "!"}}, ["user: hello!\n"]),
        ([{"role": "critic", "content": "hello"}], {}, ["critic: hello\n"]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "hello"}, "world"]}],
            {},
            ["user: hello\nworld\n"],
        ),
    ],
    ids=["one", "several", "list of one", "generation", "continued", "kwargs", "any role", "content parts"],
)
def test_conversations(
    serve: Serve,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    conversations: list[Any],
    options: dict[str, Any],
    texts: list[str],
) -> None:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    client = serve(chat_template=TEMPLATE)
    answer = embed(client, **{key: conversations}, **options)
    assert [floats(entry["embedding"]) for entry in answer["data"]] == [expected(i) for i in ids]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_a_trusted_request_brings_its_own_template(serve: Serve) -> None:
    client = serve(chat_template=TEMPLATE, trust_request_chat_template=True)
    got = vectors(client, messages=said("world"), chat_template="hello {{ messages[0].content }}")
    assert got == [expected([HELLO, WORLD])]


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        ({"input": "hello", "add_special_tokens": False}, [HELLO]),
        ({"input": "hello", "add_special_tokens": None}, [CLS, HELLO, SEP]),
        ({"messages": said("world"), "add_special_tokens": True}, [CLS, HELLO, WORLD, SEP]),
        ({"messages": said("world")}, [HELLO, WORLD]),
    ],
    ids=["text without", "text by default", "chat with", "chat by default"],
)
def test_special_tokens(serve: Serve, body: dict[str, Any], ids: list[int]) -> None:
    client = serve(chat_template="hello {{ messages[0].content }}")
    assert vectors(client, **body) == [expected(ids)]


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        ({"input": COUNT, "truncate_prompt_tokens": 4}, [CLS, ONE, TWO, SEP]),
        ({"input": COUNT, "truncate_prompt_tokens": 4, "truncation_side": "right"}, [CLS, ONE, TWO, THREE]),
        ({"input": COUNT, "truncate_prompt_tokens": 4, "truncation_side": "left"}, [TWO, THREE, FOUR, SEP]),
        ({"input": COUNT, "truncate_prompt_tokens": 3, "add_special_tokens": False}, [ONE, TWO, THREE]),
        ({"input": COUNT, "truncate_prompt_tokens": 6}, [CLS, ONE, TWO, THREE, FOUR, SEP]),
        ({"input": COUNT, "truncate_prompt_tokens": 64, "truncation_side": "left"}, [CLS, ONE, TWO, THREE, FOUR, SEP]),
        ({"input": COUNT, "truncation_side": "left"}, [CLS, ONE, TWO, THREE, FOUR, SEP]),
        ({"input": [5, 6, 7], "truncate_prompt_tokens": 2}, [5, 6]),
        ({"input": [5, 6, 7], "truncate_prompt_tokens": 2, "truncation_side": "left"}, [6, 7]),
        ({"input": "one " * 90, "truncate_prompt_tokens": -1}, [CLS, *[ONE] * 62, SEP]),
        ({"input": "one " * 90, "truncate_prompt_tokens": -1, "truncation_side": "left"}, [*[ONE] * 63, SEP]),
        ({"input": "one " * 20_000, "truncate_prompt_tokens": 5}, [CLS, ONE, ONE, ONE, SEP]),
        ({"input": [5] * 90, "truncate_prompt_tokens": -1}, [5] * 64),
        ({"input": "hello", "padding": "do_not_pad"}, [CLS, HELLO, SEP]),
        ({"input": "hello", "padding": "max_length"}, [CLS, HELLO, SEP, *[PAD] * 61]),
        ({"input": "hello", "padding": "max_length", "truncate_prompt_tokens": 5}, [CLS, HELLO, SEP, PAD, PAD]),
        ({"input": COUNT, "padding": "max_length", "truncate_prompt_tokens": 4}, [CLS, ONE, TWO, SEP]),
        ({"input": [5], "padding": "max_length", "truncate_prompt_tokens": 3}, [5, PAD, PAD]),
    ],
    ids=lambda value: " ".join(map(str, value.values()))[-40:] if isinstance(value, dict) else "",
)
def test_truncation_and_padding(client: TestClient, body: dict[str, Any], ids: list[int]) -> None:
    answer = embed(client, **body)
    assert floats(answer["data"][0]["embedding"]) == expected(ids)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == len(ids)


def test_a_server_that_truncates_by_default(serve: Serve) -> None:
    client = serve(auto_truncate=True)
    assert vectors(client, input="one " * 90) == [expected([CLS, *[ONE] * 62, SEP])]
    assert vectors(client, input=COUNT, truncate_prompt_tokens=3) == [expected([CLS, ONE, SEP])]


@pytest.mark.parametrize(("asked", "norm"), [(True, 1.0), (None, 1.0), (False, None)])
def test_use_activation(client: TestClient, asked: bool | None, norm: float | None) -> None:
    (got,) = vectors(client, input="hello", use_activation=asked)
    assert got == expected([CLS, HELLO, SEP], use_activation=asked)
    length = float(np.linalg.norm(got))
    assert length == pytest.approx(norm, abs=1e-6) if norm else abs(length - 1) > 0.1


@pytest.mark.parametrize(
    ("matryoshka", "dimensions", "fault"),
    [
        (None, 4, "Model 'fake' does not support Matryoshka embeddings; dimensions must be unset "
                  "(received dimensions=4)."),
        (None, 8, None),
        (None, 0, None),
        ((), 1, None),
        ((), 8, None),
        ((), 9, "Model 'fake' only supports dimensions in range [1, 8], got 9."),
        ((), 0, None),
        ((), -1, "Model 'fake' only supports dimensions in range [1, 8], got -1."),
        ((2, 4), 4, None),
        ((2, 4), 3, "Model 'fake' only supports Matryoshka dimensions [2, 4], got 3."),
        ((2, 4), 8, None),
    ],
)  # fmt: skip
def test_dimensions(serve: Serve, matryoshka: tuple[int, ...] | None, dimensions: int, fault: str | None) -> None:
    client = serve(info=replace(INFO, matryoshka=matryoshka))
    answer = client.post(ROUTE, json={"input": "hello", "dimensions": dimensions})
    if fault is None:
        (entry,) = answer.json()["data"]
        assert len(entry["embedding"]) == (dimensions or 8), "0 asks for no other size"
        assert floats(entry["embedding"]) == expected([CLS, HELLO, SEP], dimensions=dimensions or None)
    else:
        assert answer.status_code == 400
        assert answer.json()["error"] == {
            "message": fault,
            "type": "BadRequestError",
            "param": "dimensions",
            "code": 400,
        }


TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
INPUTS = ([CLS, HELLO, SEP], [CLS, WORLD, HELLO, SEP])


def decoded(raw: bytes, dtype: str, endianness: str) -> list[float]:
    """What a client makes of raw bytes: swap into this machine's order, then reinterpret."""
    size = TORCH_DTYPES[dtype].itemsize
    if endianness not in ("native", sys.byteorder):
        raw = b"".join(raw[i : i + size][::-1] for i in range(0, len(raw), size))
    values: list[float] = torch.frombuffer(bytearray(raw), dtype=TORCH_DTYPES[dtype]).float().tolist()
    return values


@pytest.mark.parametrize(
    ("encoding", "dtype", "endianness"),
    [*itertools.product(("base64", "bytes", "bytes_only"), TORCH_DTYPES, ("native", "big", "little"))],
)
def test_encodings(client: TestClient, encoding: str, dtype: str, endianness: str) -> None:
    rounded = [torch.tensor(expected(ids)).to(TORCH_DTYPES[dtype]).float().tolist() for ids in INPUTS]
    answer = client.post(
        ROUTE,
        json={"input": INPUTS, "encoding_format": encoding, "embed_dtype": dtype, "endianness": endianness},
        headers={"X-Request-Id": "r1"},
    )
    assert answer.status_code == 200
    if encoding == "base64":
        body = answer.json()
        got = [decoded(base64.b64decode(entry["embedding"]), dtype, endianness) for entry in body["data"]]
        assert got == rounded
        assert body["usage"]["prompt_tokens"] == 7
        return
    assert answer.headers["content-type"] == "application/octet-stream"
    size = TORCH_DTYPES[dtype].itemsize * INFO.dimension
    assert decoded(answer.content, dtype, endianness) == rounded[0] + rounded[1]
    if encoding == "bytes_only":
        assert "metadata" not in answer.headers
        return
    described = json.loads(answer.headers["metadata"])
    assert described.pop("created") == pytest.approx(time.time(), abs=60)
    assert described == {
        "id": "embd-r1",
        "model": "fake",
        "data": [
            {
                "index": i,
                "embed_dtype": dtype,
                "endianness": endianness,
                "start": i * size,
                "end": (i + 1) * size,
                "shape": [INFO.dimension],
            }
            for i in range(2)
        ],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


def test_rounding_shows_the_dtype() -> None:
    """The dtypes differ on these vectors, so that no test above passes by giving another one."""
    rounded = [torch.tensor(expected(INPUTS[0])).to(dtype).float().tolist() for dtype in TORCH_DTYPES.values()]
    assert all(a != b for a, b in itertools.combinations(rounded, 2))


def test_float_is_exact_and_ignores_the_dtype_of_bytes(client: TestClient) -> None:
    got = vectors(client, input=INPUTS, encoding_format="float", embed_dtype="fp8_e5m2", endianness="big")
    assert got == [expected(ids) for ids in INPUTS]


@pytest.mark.parametrize(
    ("header", "field", "want"),
    [
        ("from-header", None, "from-header"),
        (None, "from-body", "from-body"),
        ("from-header", "from-body", "from-header"),
    ],
)
def test_request_id(client: TestClient, header: str | None, field: str | None, want: str) -> None:
    answer = client.post(
        ROUTE, json={"input": "hello", "request_id": field}, headers={"X-Request-Id": header} if header else {}
    )
    assert answer.json()["id"] == f"embd-{want}"
    assert not header or answer.headers["x-request-id"] == header


def test_ids_are_new_and_created_is_now(client: TestClient) -> None:
    before = int(time.time())
    first, second = embed(client, input="hello"), embed(client, input="hello")
    assert first["id"].startswith("embd-")
    assert first["id"] != second["id"]
    assert before <= first["created"] <= second["created"] <= time.time()


def test_a_request_id_that_no_header_can_hold(client: TestClient) -> None:
    body = {"input": "hello", "encoding_format": "bytes", "request_id": "水\n\ud800"}
    answer = client.post(ROUTE, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert json.loads(answer.headers["metadata"])["id"] == "embd-水\n?"


@pytest.mark.parametrize(
    ("asked", "answered"), [("first", "first"), ("second", "second"), (None, "first"), ("", "first")]
)
def test_model_names(serve: Serve, asked: str | None, answered: str) -> None:
    client = serve(names=("first", "second"))
    assert embed(client, input="hello", model=asked)["model"] == answered


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "someone"},
        {"priority": -(2**63)},
        {"priority": 2**63 - 1},
        {"cache_salt": "x" * 128},
        {"no_such_field": {"nested": [1]}},
        {"metadata": None, "store": True},
        {"mm_processor_kwargs": {}},
    ],
    ids=str,
)
def test_fields_that_change_nothing(client: TestClient, extra: dict[str, Any]) -> None:
    assert vectors(client, input="hello", **extra) == [expected([CLS, HELLO, SEP])]


def test_a_large_answer_is_as_right_as_a_small_one(serve: Serve) -> None:
    """Answers with many numbers are encoded on another thread."""
    client = serve(info=replace(INFO, dimension=40_000))
    got = vectors(client, input=[[5], [6]])
    wide = [np.random.default_rng([i]).standard_normal(40_000).astype(np.float32) for i in (5, 6)]
    assert got == [(row / np.linalg.norm(row)).tolist() for row in wide]


def test_the_short_path_is_the_same_route(client: TestClient) -> None:
    got = client.post("/embeddings", json={"input": "hello"}).json()["data"]
    assert got == client.post(ROUTE, json={"input": "hello"}).json()["data"]


@pytest.mark.parametrize("normalized", [True, False])
def test_normalized_is_another_name(client: TestClient, normalized: bool) -> None:
    (entry,) = client.post(ROUTE, json={"input": [5, 6], "normalized": normalized}).json()["data"]
    (plain,) = client.post(ROUTE, json={"input": [5, 6], "use_activation": normalized}).json()["data"]
    assert entry == plain
    refused = error(client, {"input": "a", "return_multivector": True})
    assert refused["param"] == "body.return_multivector"
