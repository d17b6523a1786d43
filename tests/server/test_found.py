"""Single faults that generated requests have found (`tests.server.fuzz`)."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.conftest import JSON, Serve, error

LONG = "a water hole " * 2000
"""A text that is tokenised in part where it is cut."""


@pytest.mark.parametrize("declared", ["²", "-1", "9" * 5000, "", "1_0"])
def test_a_length_that_is_no_number_is_no_fault_of_the_server(client: TestClient, declared: str) -> None:
    headers = {**JSON, "Content-Length": declared.encode("latin-1")}
    answer = client.post("/v1/embeddings", content=b'{"input": "a"}', headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == (413 if declared.isdecimal() else 200)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", [LONG + "\ud800", "\udfff" + LONG, LONG + "\ud83d" + LONG])
def test_a_lone_surrogate_is_refused_also_where_the_text_is_cut(serve: Serve, text: str, side: str) -> None:
    client = serve()
    bodies: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": text, "truncate_prompt_tokens": -1, "truncation_side": side},
        "/v2/embed": {"texts": [text], "truncate": {"left": "START", "right": "END"}[side]},
    }
    for path, body in bodies.items():
        fault = error(client, body, path)
        assert fault["message"] == "text must be valid Unicode, without lone surrogates", path
