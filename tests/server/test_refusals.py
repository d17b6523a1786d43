"""Every error that is answered is counted once, by its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest, Closed, EngineFailed, EngineGone, Overloaded
from cenote.server.errors import reason_of
from tests.conftest import INFO, JSON

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from tests.conftest import Serve

ROUTE = "/v1/embeddings"
KEY = "secret"
OPTIONS = {"api_key": [KEY], "max_body_bytes": 2000, "max_client_batch_size": 2}
REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "unauthorized": (401, {"headers": {**JSON, "Authorization": "Bearer wrong"}}),
    "unsupported_media_type": (400, {"headers": {"Content-Type": "text/plain"}}),
    "body_too_large": (413, {"content": b"x" * 2001}),
    "bad_body": (400, {"content": b"{"}),
    "unreadable_body": (400, {"content": b"\xff\xfe\xfd"}),
    "too_long": (400, {"json": {"input": [5] * 65}}),
    "bad_request": (400, {"json": {"input": [-1]}}),
    "model_not_found": (404, {"json": {"input": "a", "model": "another"}}),
    "task_not_offered": (400, {"json": {"input": "a", "task": "classify"}, "url": "/pooling"}),
    "not_scored": (404, {"json": {"text_1": "a", "text_2": "b"}, "url": "/score"}),
    "path_not_found": (404, {"json": {}, "url": "/v1/nothing"}),
    "method_not_allowed": (405, {"method": "DELETE"}),
}


def counts(client: TestClient) -> dict[str, float]:
    """Return the errors by reason, as the server shows them."""
    text = client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["cenote_refusals"].samples
    return {s.labels["reason"]: s.value for s in samples if s.name.endswith("_total")}


def counted(client: TestClient, before: dict[str, float]) -> dict[str, float]:
    """Return the errors by reason since `before`."""
    changes = {reason: count - before.get(reason, 0) for reason, count in counts(client).items()}
    return {reason: change for reason, change in changes.items() if change}


@pytest.mark.parametrize("reason", REQUESTS)
def test_a_refusal_is_counted_by_its_reason(serve: Serve, reason: str) -> None:
    client = serve(**OPTIONS)
    status, request = REQUESTS[reason]
    headers = {"Authorization": f"Bearer {KEY}", **JSON, **request.get("headers", {})}
    before = counts(client)
    for _ in range(3):
        answer = client.request(**{"method": "POST", "url": ROUTE, **request, "headers": headers})
        assert answer.status_code == status, answer.text
    assert counted(client, before) == {reason: 3}


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (EngineFailed("boom"), "engine_failed"),
        (EngineGone("gone"), "engine_gone"),
        (Closed("closing"), "closed"),
        (Overloaded("full"), "queue"),
        (BadRequest("not this"), "bad_request"),
        (RuntimeError("a defect"), "internal_error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_of_the_engine_is_counted_too(serve: Serve, failure: Exception, reason: str) -> None:
    client = serve(FakeEngine(INFO, failures=[failure]))
    before = counts(client)
    assert client.post(ROUTE, json={"input": [5]}).status_code >= 400
    assert client.post(ROUTE, json={"input": [5]}).status_code == 200
    assert counted(client, before) == {reason: 1}


def test_names_that_requests_choose_are_no_labels(serve: Serve) -> None:
    client = serve()
    before = counts(client)
    for number in range(20):
        assert client.post(ROUTE, json={"input": "a", "model": f"m{number}"}).status_code == 404
        assert client.post(f"/v1/r{number}", json={}).status_code == 404
    assert counted(client, before) == {"model_not_found": 20, "path_not_found": 20}


def test_reasons_of_classes() -> None:
    class _NoSuchThing(BadRequest):
        pass

    assert reason_of(_NoSuchThing("x")) == "no_such_thing"
    assert reason_of(KeyError("x")) == "internal_error"
