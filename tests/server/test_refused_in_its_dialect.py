"""Requests that are refused before their body is read: a small body still tells the dialect of the error."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from cenote.server.gate import LINGER, PEEKED
from tests.conftest import JSON
from tests.server.test_connections import REQUEST, answer, head, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Serve
    from tests.server.test_connections import Running

__all__ = ["run"]

VOYAGE = {
    "input": ["a"], "model": "fake", "input_type": None, "truncation": True, "output_dtype": None,
    "output_dimension": None,
}  # fmt: skip
"""Body of voyageai, whose releases before 0.4 fail on an `error` that is an object."""
MESSAGE = "missing or wrong API key"
DETAIL = {"detail": MESSAGE}
AS_TEXT = {"error": MESSAGE}
TEI = {"error": MESSAGE, "error_type": "Unauthorized"}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/embeddings", VOYAGE, DETAIL),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_k": None, "truncation": True}, DETAIL),
        ("/rerank", {"query": "a", "texts": ["b"]}, TEI),
        ("/rerank", {"query": "a", "documents": ["b"], "property": ""}, AS_TEXT),
        ("/models/fake/rerank", {"query": "a", "texts": ["b"]}, TEI),
    ],
    ids=str,
)
def test_without_a_key(serve: Serve, path: str, body: dict[str, Any], expected: dict[str, Any]) -> None:
    client = serve(api_key=["secret"])
    refused = client.post(path, json=body, headers={"Authorization": "Bearer wrong"})
    assert (refused.status_code, refused.json()) == (401, expected)


LARGE = {"input": ["x" * PEEKED], "output_dtype": None, "output_dimension": None}


@pytest.mark.parametrize(
    "request_of",
    [
        {"json": {"input": "a", "encoding_format": "float"}},
        {"json": {"input": '"output_dtype": null, "output_dimension": null'}},
        {"json": LARGE},
        {"content": b'{"output_dtype": null, "output_dimension": null', "headers": JSON},
        {"content": b"", "headers": JSON},
    ],
    ids=["keys of nobody", "keys in a text", "large", "not JSON", "empty"],
)
def test_else_all_clients_can_read_it(serve: Serve, request_of: dict[str, Any]) -> None:
    refused = serve(api_key=["secret"]).post("/v1/embeddings", **request_of)
    assert refused.status_code == 401
    assert refused.json()["error"]["message"] == refused.json()["detail"] == MESSAGE


def test_a_body_that_does_not_come_is_not_waited_for(run: Callable[..., Running]) -> None:
    server = run(100, api_key=["secret"])
    began = time.monotonic()
    status, _, body = answer(server.connect(head(length=20)))
    assert (status, body["error"]["message"]) == (401, MESSAGE)
    assert time.monotonic() - began < LINGER / 2


@pytest.mark.parametrize("option", ["max_connections", "max_header_count"])
def test_by_its_connection(run: Callable[..., Running], option: str) -> None:
    server = run(100, max_connections=1, max_header_count=16)
    content = json.dumps(VOYAGE).encode()
    headers = [f"X-{i}: a" for i in range(20)] if option == "max_header_count" else []
    if option == "max_connections":
        assert answer(server.connect(REQUEST))[0] == 200
    status, _, body = answer(server.connect(head(*headers, length=len(content)) + content))
    assert (status, [*body]) == (503 if option == "max_connections" else 431, ["detail"])
    assert option.replace("_", "-") in body["detail"]


def test_a_body_that_its_connection_refuses_is_not_waited_for(run: Callable[..., Running]) -> None:
    server = run(100, max_header_count=16)
    began = time.monotonic()
    status, _, body = answer(server.connect(head(*[f"X-{i}: a" for i in range(20)], length=20)))
    assert (status, "--max-header-count" in body["error"]["message"]) == (431, True)
    assert time.monotonic() - began < LINGER / 2


def test_a_refused_connection_takes_the_next_request(run: Callable[..., Running]) -> None:
    client = run(100, api_key=["secret"]).connect()
    for keys, expected in ((b'"output_dtype": 1, "output_dimension": 1', DETAIL), (b'"encoding_format": 1', None)):
        content = b"{" + keys + b"}"
        client.sendall(head(length=len(content)) + content)
        status, _, body = answer(client)
        assert status == 401
        assert (body == DETAIL) == (expected == DETAIL)
