"""What is wrong with a request is told in the shape that the clients of its dialect read, whatever is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from cenote.engine.fake import FakeEngine
from cenote.errors import Overloaded
from cenote.server.admission import Admission
from cenote.server.app import DIALECTS
from cenote.server.table import Table
from tests.conftest import CROSS_ENCODER

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.testclient import TestClient

    from tests.conftest import Serve

LONG = "deep " * 90


def superset(body: Any) -> str:
    """The message of an error that clients of OpenAI, Cohere, Jina, NVIDIA and others read, each at its key."""
    assert list(body) == ["error", "detail", "message"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["detail"] == body["message"] == body["error"]["message"]
    message: str = body["message"]
    return message


def detail(body: Any) -> str:
    """Voyage's: older clients fail where there is an `error`."""
    assert list(body) == ["detail"]
    return str(body["detail"])


def typed(body: Any) -> str:
    """That of Text Embeddings Inference, whose clients read a text at `error`."""
    assert list(body) == ["error", "error_type"]
    assert body["error_type"] in ("Unauthorized", "Overloaded", "Validation", "Backend", "Unhealthy")
    assert isinstance(body["error"], str)
    return str(body["error"])


def bare(body: Any) -> str:
    """That of Ollama, Weaviate and KServe."""
    assert list(body) == ["error"]
    assert isinstance(body["error"], str)
    return str(body["error"])


@dataclass(frozen=True)
class Case:
    """A route of a dialect.

    Attributes:
        prefix: of the dialect; empty = it has none.
        path: of the route.
        body: that it answers.
        source: field that it needs.
        read: checks the shape of an error and returns its message.
        long: fields with which an input is too long; `None` = it is always cut.
        shared: the path belongs to others too, so that the prefix alone tells whose an error without a body is.
    """

    prefix: str
    path: str
    body: dict[str, Any]
    source: str
    read: Callable[[Any], str]
    long: dict[str, Any] | None = field(default_factory=dict)
    shared: bool = False

    def paths(self) -> list[str]:
        """The path, behind the prefix of the dialect, of a model, and of both."""
        heads = [] if self.shared else ["", "/models/fake"]
        if self.prefix:
            heads += [f"/{self.prefix}", f"/models/fake/{self.prefix}", f"/{self.prefix}/models/fake"]
        return [head + self.path for head in heads]

    @property
    def id(self) -> str:
        """The prefix and the path."""
        return f"{self.prefix}:{self.path}"


RANK = {"query": "a", "documents": ["a", "b"]}
WHOLE = {"documents": [LONG], "truncate": False}
TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES"}
CASES = [
    Case("openai", "/v1/embeddings", {"input": "a"}, "input", superset, {"input": LONG}),
    Case("vllm", "/pooling", {"input": "a", "task": "embed"}, "input", superset, {"input": LONG}),
    Case("vllm", "/classify", {"input": "a"}, "input", superset, {"input": LONG}),
    Case("jina", "/score", {"queries": "a", "documents": "b"}, "documents", superset, {"documents": LONG}),
    Case("jina", "/rerank", RANK, "documents", superset, WHOLE),
    Case("fastdeploy", "/v1/chat/reward", {"prompt_token_ids": [5]}, "prompt_token_ids", superset,
         {"prompt_token_ids": [5] * 90}),
    Case("cohere", "/v2/embed", {"texts": ["a"]}, "texts", superset, {"texts": [LONG], "truncate": "NONE"}),
    Case("cohere", "/v2/rerank", RANK, "documents", superset, WHOLE),
    Case("voyage", "/v1/embeddings", {"input": "a"}, "input", detail, {"input": LONG, "truncation": False}, True),
    Case("voyage", "/v1/rerank", RANK, "documents", detail, WHOLE, True),
    Case("voyage", "/v1/contextualizedembeddings", {"inputs": [["a"]]}, "inputs", detail, {"inputs": [[LONG]]}),
    Case(
        "voyage",
        "/v1/multimodalembeddings",
        {"inputs": [{"content": [{"type": "text", "text": "a"}]}]},
        "inputs",
        detail,
        {"inputs": [{"content": [{"type": "text", "text": LONG}]}], "truncation": False},
    ),
    Case("tei", "/embed", {"inputs": "a"}, "inputs", typed, {"inputs": LONG}),
    Case("tei", "/embed_all", {"inputs": "a"}, "inputs", typed, {"inputs": LONG}),
    Case("tei", "/predict", {"inputs": "a"}, "inputs", typed, {"inputs": LONG}),
    Case("tei", "/rerank", {"query": "a", "texts": ["a"]}, "texts", typed, {"texts": [LONG], "truncate": False}, True),
    Case("tei", "/tokenize", {"inputs": "a"}, "inputs", typed, None, True),
    Case("ollama", "/api/embed", {"input": "a"}, "input", bare, {"input": LONG, "truncate": False}),
    Case("ollama", "/api/embeddings", {"prompt": "a"}, "prompt", bare, {"prompt": LONG, "truncate": False}),
    Case("nim", "/v1/ranking", {"query": {"text": "a"}, "passages": [{"text": "b"}]}, "passages", superset,
         {"passages": [{"text": LONG}], "truncate": "NONE"}),
    Case("infinity", "/embeddings", {"input": "a"}, "input", superset, {"input": LONG}),
    Case("infinity", "/rerank", RANK, "documents", superset, WHOLE),
    Case("infinity", "/classify", {"input": ["a"]}, "input", superset, {"input": [LONG]}),
    Case("weaviate", "/vectors", {"text": "a"}, "text", bare, None),
    Case("weaviate", "/rerank", RANK, "documents", bare, WHOLE, True),
    Case("mixedbread", "/v1/reranking", {"query": "a", "input": ["b"]}, "input", superset,
         {"input": [LONG], "truncate": False}),
    Case("llamacpp", "/embedding", {"content": "a"}, "content", superset, {"content": LONG}),
    Case("kserve", "/v2/models/fake/infer", {"inputs": [{**TENSOR, "data": ["a"]}]}, "inputs", bare,
         {"inputs": [{**TENSOR, "data": [LONG]}]}),
    Case("sagemaker", "/invocations", {"inputs": "a"}, "inputs", superset, {"inputs": LONG}),
    Case("vertex", "/vertex", {"instances": [{"inputs": "a"}]}, "instances", typed, {"instances": [{"inputs": LONG}]}),
    Case("elasticsearch", "/", {"inputs": "a"}, "inputs", typed, {"inputs": LONG}),
]  # fmt: skip
PATHS = [pytest.param(case, path, id=path) for case in CASES for path in case.paths()]
KEY = {"Authorization": "Bearer secret", "Content-Type": "application/json"}


class Full(FakeEngine):
    """An engine whose queue is full."""

    def submit(self, *arguments: Any, **options: Any) -> Any:
        """Refuse."""
        raise Overloaded("16384 sequences wait already", retry_after=3)


@pytest.fixture(scope="module")
def client(serve_all: Serve) -> TestClient:
    """A server of a reranker, which also embeds, with a key and small bodies."""
    return serve_all(info=CROSS_ENCODER, api_key=["secret"], max_body_bytes=5000)


def _refused(client: TestClient, case: Case, path: str, body: Any, status: int, **headers: str) -> str:
    """The message of a refusal, once its status, type and shape are right."""
    answer = client.post(path, content=json.dumps(body), headers={**KEY, **headers})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return case.read(answer.json())


@pytest.mark.parametrize(("case", "path"), PATHS)
def test_a_right_request_is_answered(client: TestClient, case: Case, path: str) -> None:
    answer = client.post(path, json=case.body, headers=KEY)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("case", "path"), PATHS)
def test_wrong_bodies(client: TestClient, case: Case, path: str) -> None:
    without = {name: value for name, value in case.body.items() if name != case.source}
    missing = _refused(client, case, path, without, 400)
    assert "required" in missing or "must be given" in missing or "must be provided" in missing
    assert "validation error" in _refused(client, case, path, case.body | {case.source: 5}, 400)
    assert "JSON" in case.read(client.post(path, content=b"{", headers=KEY).json())
    if case.long is not None:
        assert "maximum context length is 64 tokens" in _refused(client, case, path, case.body | case.long, 400)


@pytest.mark.parametrize(("case", "path"), PATHS)
def test_wrong_places(client: TestClient, case: Case, path: str) -> None:
    if "/models/" not in path and "reward" not in path:  # which takes any name
        message = _refused(client, case, path, case.body | {"model": "other"}, 404)
        assert message == "The model `other` does not exist."
    answer = client.get(path, headers=KEY)
    if path.endswith("/infer"):  # "fake/infer" may be the name of a model
        assert (answer.status_code, case.read(answer.json())) == (404, "The model `fake/infer` does not exist.")
    elif answer.status_code != 200:  # a card, or whether it is healthy
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert case.read(answer.json()) == "Method Not Allowed"
    heads = [head for head in (f"/{case.prefix}", f"/models/fake/{case.prefix}") if case.prefix]
    for head in heads:
        assert _refused(client, case, f"{head}/no/such/path", case.body, 404) == "Not Found"


@pytest.mark.parametrize(("case", "path"), PATHS)
def test_refusals_at_the_gate(client: TestClient, case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client.post(path, json=case.body, headers={"Authorization": "Bearer wrong"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert case.read(answer.json()) == "missing or wrong API key"
    large = _refused(client, case, path, case.body | {"extra": "a" * 5000}, 413)
    assert "at most 5000 are allowed" in large
    assert "application/json" in _refused(client, case, path, case.body, 400, **{"Content-Type": "text/plain"})

    def full(*_: Any) -> None:
        raise Overloaded("a new request would wait for 20 s", retry_after=7)

    monkeypatch.setattr(Admission, "check", full)
    answer = client.post(path, json=case.body, headers=KEY)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert case.read(answer.json()) == "a new request would wait for 20 s"


@pytest.fixture(scope="module")
def full(serve_all: Serve) -> TestClient:
    """A server whose engine takes nothing more."""
    return serve_all(Full(CROSS_ENCODER))


@pytest.mark.parametrize(("case", "path"), [param for param in PATHS if param.values[0].path != "/tokenize"])  # type: ignore[attr-defined]
def test_overload_behind_the_gate(full: TestClient, case: Case, path: str) -> None:
    answer = full.post(path, json=case.body)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert case.read(answer.json()) == "16384 sequences wait already"


@pytest.fixture(scope="module")
def keyless(serve_all: Serve) -> TestClient:
    """A server of a reranker without a key."""
    return serve_all(info=CROSS_ENCODER)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_a_field_that_is_null_is_not_there(keyless: TestClient, case: Case) -> None:
    """Also where it would tell the dialect; but Voyage's client names all of its fields, which tells its requests."""
    path = f"/{case.prefix}{case.path}"
    table = Table(DIALECTS, ())
    match = table.match("POST", path)
    assert match is not None
    shared = table.match("POST", case.path)
    names = {name for found in (match, shared) if found for entry in found.entries for name in entry.fields}
    plain = keyless.post(path, json=case.body)
    assert plain.status_code == 200, plain.text
    for name in sorted(names - case.body.keys()):
        answer = keyless.post(path, json={**case.body, name: None})
        assert (answer.status_code, _lasting(answer.json())) == (200, _lasting(plain.json())), name


def _lasting(value: Any) -> Any:
    """An answer without numbers and times of its own."""
    if isinstance(value, dict):
        return {key: _lasting(part) for key, part in value.items() if key not in PASSING}
    return [*map(_lasting, value)] if isinstance(value, list) else value


PASSING = {"id", "created", "total_duration", "load_duration"}


def test_a_model_in_the_path_may_be_none(client: TestClient) -> None:
    answer = client.post("/v2/models/other/infer", json={"inputs": [{**TENSOR, "data": ["a"]}]}, headers=KEY)
    assert (answer.status_code, answer.json()) == (404, {"error": "The model `other` does not exist."})
    assert superset(client.post("/models/other/no/route", json={}, headers=KEY).json()) == "Not Found"


ONE_NAME = [case for case in CASES if not case.path.endswith(("/infer", "/reward"))]
"""Routes but those that have a name of their own, or take any."""


@pytest.mark.parametrize("name", ["other", "owner/other"])
@pytest.mark.parametrize("case", ONE_NAME, ids=[case.id for case in ONE_NAME])
def test_a_model_before_the_path_may_be_none(client: TestClient, case: Case, name: str) -> None:
    """Clients that know a model by its URL alone read which one is missing, as its dialect tells it."""
    for head in [f"/models/{name}/{case.prefix}", f"/{case.prefix}/models/{name}"]:
        path = f"{head}{case.path}".rstrip("/")
        message = _refused(client, case, path, case.body, 404)
        assert message == f"The model `{name}` does not exist."
    card = client.get(f"/models/{name}", headers=KEY)
    assert (card.status_code, superset(card.json())) == (404, f"The model `{name}` does not exist.")


def test_every_dialect_with_a_prefix_has_a_case() -> None:
    assert {case.prefix for case in CASES if case.prefix} == {dialect.prefix for dialect in DIALECTS if dialect.prefix}
    assert not [pair for pair in product(CASES, CASES) if pair[0] is not pair[1] and pair[0].id == pair[1].id]
