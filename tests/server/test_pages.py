"""Requests of pages in browsers: which origins may send them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cenote.cli import flags
from cenote.config import ServerConfig
from cenote.settings import LAYERS, resolve

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from tests.conftest import Serve

ORIGIN = "https://app.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
ALLOWED = "access-control-allow-origin"
ROUTE = "/v1/embeddings"


def _asked(client: TestClient, **headers: str) -> Any:
    return client.options(ROUTE, headers={**PREFLIGHT, **headers})


def test_by_default_no_page_may(client: TestClient) -> None:
    answer = _asked(client)
    assert (answer.status_code, ALLOWED in answer.headers) == (405, False)
    assert ALLOWED not in client.post(ROUTE, json={"input": "a"}, headers={"Origin": ORIGIN}).headers


def test_a_page_of_an_allowed_origin_asks_without_a_key(serve: Serve) -> None:
    client = serve(allowed_origins=[ORIGIN], api_key=["secret"])
    answer = _asked(client)
    assert (answer.status_code, answer.headers[ALLOWED]) == (200, ORIGIN)
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    other = _asked(client, Origin="https://other.example")
    assert (other.status_code, ALLOWED in other.headers) == (400, False)


def test_answers_and_refusals_are_readable(serve: Serve) -> None:
    client = serve(allowed_origins=["*"], api_key=["secret"])
    refused = client.post(ROUTE, json={"input": "a"}, headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers[ALLOWED]) == (401, "*")
    headers = {"Origin": ORIGIN, "Authorization": "Bearer secret"}
    answer = client.post(ROUTE, json={"input": "a"}, headers=headers)
    assert (answer.status_code, answer.headers[ALLOWED]) == (200, "*")
    assert answer.headers["access-control-expose-headers"] == "X-Request-Id, Retry-After"


def test_methods_headers_and_credentials_can_be_narrowed(serve: Serve) -> None:
    client = serve(
        allowed_origins=[ORIGIN], allowed_methods=["GET"], allowed_headers=["content-type"], allow_credentials=True
    )
    assert _asked(client).text == "Disallowed CORS method, headers"
    narrow = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "content-type"}
    answer = _asked(client, **narrow)
    assert (answer.status_code, answer.headers["access-control-allow-credentials"]) == (200, "true")


@pytest.mark.parametrize(
    ("words", "origins"),
    [
        (["--allowed-origins", '["https://a", "https://b"]'], ("https://a", "https://b")),
        (["--allowed-origins", "https://a", "https://b"], ("https://a", "https://b")),
        (["--allowed-origins", "https://a", "--allowed-origins", '["*"]'], ("https://a", "*")),
        ([], ()),
    ],
)
def test_flags_are_those_of_vllm(words: list[str], origins: tuple[str, ...]) -> None:
    values = flags.parse(["serve", *words])
    values.pop("command")
    configs, _ = resolve(values, LAYERS)
    (config,) = (config for config in configs if isinstance(config, ServerConfig))
    assert (config.allowed_origins, config.allowed_methods, config.allow_credentials) == (origins, ("*",), False)
