"""Generated requests at a server of four tiny models.

No 5xx but where a model fails, no hang, no answer that is not JSON of its dialect, memory by the size of the bodies,
nothing held afterwards. `make fuzz` sends more of them, others each time.
"""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings

from cenote import metrics
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.models.load import load
from cenote.pipeline.pipeline import Service
from cenote.server.app import DIALECTS, Application, build
from cenote.server.describe import openapi
from cenote.server.dialects import cenote, cohere, fastdeploy, openai, scoring, vllm, voyage
from tests import PATIENCE, checkpoints
from tests.server.fuzz import MODELS, POISON, Request, bursts, by_description

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq
    from pathlib import Path

    from starlette.types import Message

    from cenote.core import Sequence as Tokens
    from cenote.models.model import PoolingModel
    from cenote.server.routes import Dialect

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "2000"))
"""Requests that are sent at least."""
SOME = 200
"""Requests of `make test`."""
AT_ONCE = 8
"""Requests that are sent at the same time."""
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
LARGE = 20_000
"""Bytes of a body from which on memory is measured."""
PER_BYTE, BESIDE = 100, 16 << 20
"""Bytes of memory that a body may take for each of its own, and besides."""


class Failing:
    """A model that runs as the one inside, but for batches with some ids in a row."""

    def __init__(self, inner: PoolingModel, poison: list[int]) -> None:
        self._inner = inner
        self._poison = poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def launch(self, sequences: Seq[Tokens]) -> Any:
        if any(self._has_poison(list(sequence.ids)) for sequence in sequences):
            raise RuntimeError("poison")
        return self._inner.launch(sequences)

    def _has_poison(self, ids: list[int]) -> bool:
        size = len(self._poison)
        return any(ids[i : i + size] == self._poison for i in range(len(ids) - size + 1))


def folder_of(name: str, folder: Path) -> Path:
    """Write the checkpoint of one of the models."""
    tokenizer = checkpoints.wordpiece(chat_template=TEMPLATE)
    if name == "vectors":
        return checkpoints.bert(folder, tokenizer=tokenizer)
    head = "ForTokenClassification" if name == "tokens" else "ForSequenceClassification"
    return checkpoints.classifier(folder, head=head, tokenizer=tokenizer, num_labels=1 if name == "pairs" else 3)


def opened(name: str, folder: Path) -> Service:
    """Load one of the models, and let it fail on `POISON`."""
    options = ModelConfig(model=str(folder_of(name, folder)), served_model_name=(name,))
    model, checkpoint = load(options)
    failing: Any = Failing(model, checkpoint.tokenizer(POISON, add_special_tokens=False)["input_ids"])
    return Service.around(failing, checkpoint, options, EngineConfig())


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """The body. orjson takes neither NaN nor lone surrogates, and no bytes that are not UTF-8."""
        return orjson.loads(self.content)


async def sent(app: Any, request: Request) -> Answer:
    """Send a request as uvicorn does, and return its answer."""
    size = 1 << 16
    chunks = [request.content[i : i + size] for i in range(0, len(request.content), size)] or [b""]
    coming: list[Message] = [
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1} for i, chunk in enumerate(chunks)
    ]
    if request.leaves:
        coming.append({"type": "http.disconnect"})
    answer: list[Message] = []

    async def receive() -> Message:
        return coming.pop(0) if coming else await asyncio.Future()

    async def send(message: Message) -> None:
        answer.append(message)

    scope = {
        "type": "http",
        "method": request.method,
        "path": request.path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in request.headers.items()],
    }
    await asyncio.wait_for(app(scope, receive, send), PATIENCE)
    start, *bodies = answer
    headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], headers, b"".join(message.get("body", b"") for message in bodies))


def check(request: Request, answer: Answer) -> None:
    """Assert that an answer is one that this request may get."""
    assert answer.status < 500 or (answer.status == 500 and request.may_fail), (request, answer)
    if request.is_valid and not request.may_fail:
        assert answer.status == 200, (request, answer)
    is_of_others = request.method == "POST" and (request.path.rstrip("/") or "/") in OF_OTHERS
    if request.is_of_a_vendor or is_of_others:
        assert not answer.content or answer.json is not None
    elif answer.status == 200:
        check_content(request, answer)
    elif request.method != "HEAD":
        check_error(answer)


def _paths(dialect: Dialect) -> set[str]:
    return {path for route in dialect.routes for path in (route.path, *route.aliases)}


SHARING = (
    openai.DIALECT,
    vllm.DIALECT,
    scoring.DIALECT,
    cohere.DIALECT,
    voyage.DIALECT,
    fastdeploy.DIALECT,
    cenote.DIALECT,
)
OF_OTHERS = {"/v1/contextualizedembeddings"} | set().union(*map(_paths, DIALECTS)) - set().union(*map(_paths, SHARING))
"""Paths of dialects whose answers and errors have forms of their own."""


def check_error(answer: Answer) -> None:
    """Assert that an error has the common body, or that of a dialect which the keys of the body give away."""
    content = answer.json
    if [*content] in OWN_FORMS:
        assert all(isinstance(value, str) and value for value in content.values())
        return
    assert [*content] == ["error", "detail", "message"]
    fault = content["error"]
    assert [*fault] == ["message", "type", "param", "code"]
    assert fault["code"] == answer.status
    assert fault["message"]
    assert isinstance(fault["message"], str)
    assert content["detail"] == content["message"] == fault["message"]
    assert isinstance(fault["param"], (str, type(None)))


OWN_FORMS = (["detail"], ["error", "error_type"])
"""Keys of the errors of Voyage and of TEI, which share paths with others."""


def check_content(request: Request, answer: Answer) -> None:
    """Assert that an answer has the form of its route."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if request.method == "POST" and kind == "application/octet-stream":
        assert answer.content
    elif request.method == "POST" and answer.content:
        ANSWERS[request.path.rstrip("/").rpartition("/")[2]](answer.json)
    elif request.method == "GET" and kind == "application/json":
        assert isinstance(answer.json, dict)


def listed(field: str) -> Callable[[Any], None]:
    """Return the check of an answer with `data`, a list of entries with `field`."""

    def checked(content: Any) -> None:
        assert content["object"] in ("list", "object")
        assert content["model"]
        assert [entry["index"] for entry in content["data"]] == [*range(len(content["data"]))]
        for entry in content["data"]:
            check_finite(entry[field])
        usage = content["usage"]
        assert usage["prompt_tokens"] == usage["total_tokens"] > 0

    return checked


def check_finite(value: Any) -> None:
    """Assert that there are only finite numbers in lists of numbers."""
    if isinstance(value, list) and value and isinstance(value[0], (int, float)):
        assert np.isfinite(np.asarray(value)).all()


def ranked(content: Any) -> None:
    """Check an answer of documents, the best one first."""
    results = content["results"] if "results" in content else content["data"]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert len({result["index"] for result in results}) == len(results)


def tokenized(content: Any) -> None:
    """Check an answer of token ids; llama.cpp's, which a body with `content` gets, has nothing else."""
    if [*content] == ["tokens"]:
        assert all(isinstance(token, int) for token in content["tokens"])
        return
    assert content["count"] == len(content["tokens"])
    assert content["token_strs"] is None or len(content["token_strs"]) == content["count"]


def detokenized(content: Any) -> None:
    """Check an answer of text."""
    assert isinstance(content["prompt"], str)


def by_type(content: Any) -> None:
    """Check Cohere's answer."""
    assert content["response_type"] in ("embeddings_by_type", "embeddings_floats")
    embeddings = content["embeddings"]
    columns = embeddings.values() if isinstance(embeddings, dict) else [embeddings]
    assert len({len(rows) for rows in columns}) == 1
    assert content["meta"]["billed_units"]["input_tokens"] > 0


ANSWERS: dict[str, Callable[[Any], None]] = {
    "embeddings": listed("embedding"),
    "pooling": listed("data"),
    "classify": listed("probs"),
    "score": listed("score"),
    "rerank": ranked,
    "token_classify": listed("entities"),
    "tokenize": tokenized,
    "detokenize": detokenized,
    "embed": by_type,
    "reward": listed("score"),
}
"""Checks of answers, by the end of the path."""


def held(app: Application) -> dict[str, float]:
    """Return all that is held for requests under way."""
    serving = app._serving
    return {
        "running": metrics.running_requests._value.get(),
        "computed": serving.running,
        "bytes": metrics.pending_bytes.collect()[0].samples[0].value,
        "rendering": app.admission.rendering.amount,
        "tokens": sum(line.amount + sum(line._tokens) for line in app.admission.lines),
    }


class Site:
    """A server, and an event loop to send it requests.

    Attributes:
        counts: requests by kind.
        good: those that were answered 200.
    """

    def __init__(self, app: Application) -> None:
        self.app = app
        self.counts: Counter[str] = Counter()
        self.good = 0
        self.loop = asyncio.new_event_loop()

    def fire(self, burst: Sequence[Request]) -> None:
        """Send requests at the same time, and check their answers and that nothing is held afterwards."""
        size = sum(len(request.content) for request in burst)
        if size > LARGE:
            tracemalloc.start()
        try:
            answers = self.loop.run_until_complete(self.answers(burst))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        for request, answer in zip(burst, answers, strict=True):
            self.counts[request.kind] += 1
            self.good += answer.status == 200
            check(request, answer)
        assert peak < PER_BYTE * size + BESIDE, (peak, burst)
        assert {*held(self.app).values()} == {0}, (held(self.app), burst)

    async def answers(self, burst: Sequence[Request]) -> list[Answer]:
        """Send requests at the same time, and return their answers."""
        return await asyncio.gather(*(sent(self.app, request) for request in burst))

    def check_rest(self) -> None:
        """Assert that the server is well, and that nothing waits."""
        (health,) = self.loop.run_until_complete(self.answers([Request("health", "/health", b"", "GET", {})]))
        assert health.status == 200
        assert metrics.queued_sequences.collect()[0].samples[0].value == 0
        assert metrics.queued_tokens.collect()[0].samples[0].value == 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server of all models."""
    services = [opened(name, tmp_path_factory.mktemp(name)) for name in MODELS]
    site = Site(build(services, ServerConfig(token_ids="native")))
    yield site
    site.loop.close()
    for service in services:
        service.engine.close()


@pytest.mark.full
def test_generated_requests(site: Site) -> None:
    """More of them, others each time, by `make fuzz`."""
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    fire_all(site, seed, REQUESTS)
    print(f"seed {seed}: {site.counts.total()} requests, {site.good} answered 200: {dict(site.counts)}")  # noqa: T201


@pytest.mark.full
def test_some_generated_requests(site: Site) -> None:
    """Others than the first ones of `test_generated_requests`."""
    fire_all(site, 1, SOME)


def fire_all(site: Site, seed: int, count: int) -> None:
    """Send generated requests, of which a third at least is answered 200."""
    before, good = site.counts.total(), site.good
    for number, burst in enumerate(islice(bursts(seed, AT_ONCE), -(-count // AT_ONCE))):
        try:
            site.fire(burst)
        except Exception as error:
            error.add_note(f"seed {seed}, burst {number}")
            raise
    site.check_rest()
    total = site.counts.total() - before
    assert total >= count
    assert 3 * (site.good - good) >= total


@given(request=by_description(openapi(DIALECTS, ServerConfig())))
@settings(
    max_examples=max(200, REQUESTS // 10),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_requests_by_the_description_of_the_api(site: Site, request: Request) -> None:
    site.fire([request])
