"""A server without torch in front of engines in other processes: its answers, and what becomes of it when one dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import requests
from starlette.testclient import TestClient

from cenote.adapters import LoraModule
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.engine.host import Host
from cenote.engine.remote import GONE, LOST
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import PATIENCE, checkpoints, pictured
from tests.forked import Forked
from tests.front import HEADER
from tests.server.test_lora import write_adapter
from tests.server.test_process import LARGE, head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cenote.server.table import Table

TOLERANCE = 1e-6
NER = ["O", "B-PER", "I-PER", "B-LOC"]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


class Process:
    """A `cenote` command that runs, and what it has logged."""

    def __init__(self, process: subprocess.Popen[str] | Forked, ready: str) -> None:
        self.process = process
        self.lines: list[str] = []
        self._ready = ready
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                self.lines.append(line)
                if self._ready in line:
                    self._is_ready.set()
        self._is_ready.set()

    def wait(self) -> None:
        """Until it is ready."""
        assert self._is_ready.wait(PATIENCE), self.log
        assert self.process.poll() is None, self.log

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def end(self, number: int = signal.SIGKILL) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status


def engine(path: Path, *flags: str) -> Process:
    """A process that runs the embedded MiniLM."""
    command = ("engine", "--listen", str(path), "--served-model-name", "minilm", *flags)
    return Process(Forked("cenote", *command), "listening")


class Front(Process):
    """A server in front of engines.

    Attributes:
        host: the process of the first one.
    """

    host: Process

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "tests.front", "--port", "0", *flags]
        super().__init__(subprocess.Popen(command, stderr=subprocess.PIPE, text=True), "serving http://")

    @property
    def url(self) -> str:
        self.wait()
        return re.findall(r"serving (http://\S+),", self.log)[0]

    def ask(self, method: str, path: str, body: Any = None) -> requests.Response:
        """An answer of a process that has imported no torch."""
        answer = requests.request(method, self.url + path, json=body, timeout=PATIENCE)
        assert answer.headers[HEADER] == "", f"{path} imports {answer.headers[HEADER]}"
        return answer

    def embed(self, text: Any) -> requests.Response:
        return self.ask("POST", "/v1/embeddings", {"input": text, "model": "minilm"})

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Service]:
    """Models of other tasks, in this process."""
    root = tmp_path_factory.mktemp("others")
    checkpoints.classifier(root / "ner", head="ForTokenClassification", id2label=dict(enumerate(NER)))
    checkpoints.classifier(root / "rater", num_labels=1)
    checkpoints.classifier(root / "splade", head="ForMaskedLM")
    checkpoints.bert(root / "chat")
    pictured.qwen_vl(root / "pages", "qwen3_vl")
    law = write_adapter(tmp_path_factory.mktemp("adapters") / "law", root / "chat", 0)
    options = {
        "splade": {"convert": "sparse"},
        "chat": {"chat_template": CHAT, "lora_modules": (LoraModule("law", str(law)),)},
        "rater": {"chat_template": CHAT},
    }
    return {
        folder.name: Service.open(
            ModelConfig(model=str(folder), served_model_name=(folder.name,), **options.get(folder.name, {})),  # type: ignore[arg-type]
            EngineConfig(),
        )
        for folder in sorted(root.iterdir())
    }


@pytest.fixture(scope="module")
def sockets(others: dict[str, Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Sockets of the engines of `others`."""
    root = tmp_path_factory.mktemp("sockets")
    hosts = []
    for name, service in others.items():
        assert service.facts is not None
        hosts.append(Host(service.engine, root / name, service.facts.plain()))
    yield [str(root / name) for name in others]
    for host in hosts:
        host.close()


@pytest.fixture(scope="module")
def front(sockets: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A server in front of MiniLM in a process of its own, and of `others`."""
    path = tmp_path_factory.mktemp("engine") / "minilm.sock"
    host = engine(path)
    made = Front("--enable-tokenizer-info-endpoint", "--engine", str(path), *sockets)
    made.host = host
    made.wait()
    yield made
    made.end()
    host.end()


@pytest.fixture(scope="module")
def here(others: dict[str, Service]) -> Iterator[TestClient]:
    """The same models in one process."""
    minilm = Service.open(ModelConfig(served_model_name=("minilm",)), EngineConfig())
    config = ServerConfig(enable_tokenizer_info_endpoint=True)
    with TestClient(build([minilm, *others.values()], config)) as client:
        yield client


TEXT = "The cenote is deep."
DOCUMENTS = ["Water fills the cave.", "a", "naïve 水 🦊 " * 9]
PAIRS = {"query": TEXT, "documents": DOCUMENTS}
MESSAGES = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "How deep?"}]
REWARDED = {"model": "rater", "prompt_token_ids": [2, 7, 8, 3]}

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/embeddings": [
        {"input": [TEXT, *DOCUMENTS]},
        {"input": [[101, 7592, 102]], "encoding_format": "base64"},
        {"input": TEXT, "encoding_format": "bytes", "embed_dtype": "bfloat16"},
        {"input": TEXT, "encoding_format": "base64", "embed_dtype": "fp8_e4m3", "endianness": "big"},
        {"input": TEXT, "encoding_format": "bytes_only", "embed_dtype": "fp8_e5m2"},
        {"input": TEXT, "output_dtype": "int8"},
        {"input": TEXT, "embedding_type": ["ubinary", "base64"]},
        {"input": "word " * 500},
        {"input": "word " * 500, "truncate_prompt_tokens": -1},
        {"input": TEXT, "late_chunking_params": {"chunk_size": 3}},
        {"input": TEXT, "dimensions": 8},
        {"model": "chat", "messages": MESSAGES},
        {"model": "splade", "input": TEXT, "embedding_types": ["sparse"], "return_tokens": True},
        {"messages": MESSAGES},
        {"model": "nobody", "input": TEXT},
        {"input": []},
        {},
    ],
    "/embeddings": [{"input": TEXT}],
    "/pooling": [
        {"input": TEXT, "task": "token_embed"},
        {"model": "splade", "input": TEXT},
        {"model": "ner", "input": TEXT, "task": "token_classify"},
        {"input": TEXT, "task": "classify"},
        {"data": {"a": 1}},
    ],
    "/v1/embed": [{"texts": [TEXT]}],
    "/v2/embed": [{"texts": [TEXT, "a"], "embedding_types": ["float", "int8", "binary"]}],
    "/classify": [{"model": "rater", "input": [TEXT, "a"]}, {"input": TEXT}],
    "/v1/classify": [{"model": "rater", "input": TEXT}],
    "/token_classify": [{"model": "ner", "input": TEXT}],
    "/v1/token_classify": [
        {"model": "ner", "input": [TEXT, "hello"], "aggregation_strategy": "simple"},
        {"model": "ner", "input": [TEXT, "hello"], "aggregation_strategy": "max"},
        {"model": "minilm", "input": TEXT},
    ],
    "/score": [
        {"text_1": TEXT, "text_2": DOCUMENTS},
        {"text_1": TEXT, "text_2": DOCUMENTS, "score_type": "late-interaction"},
        {"model": "rater", "text_1": TEXT, "text_2": DOCUMENTS},
        {"model": "splade", "text_1": TEXT, "text_2": DOCUMENTS},
        {"model": "ner", "text_1": TEXT, "text_2": DOCUMENTS},
    ],
    "/v1/score": [{"queries": TEXT, "documents": DOCUMENTS}],
    "/rerank": [PAIRS, {**PAIRS, "model": "rater", "top_n": 2}],
    "/v1/rerank": [PAIRS],
    "/v2/rerank": [{**PAIRS, "model": "rater"}],
    "/v1/reward": [REWARDED, {**REWARDED, "model": "minilm"}],
    "/v1/chat/reward": [{"model": "rater", "messages": MESSAGES}],
    "/tokenize": [{"prompt": TEXT, "return_token_strs": True}, {"model": "chat", "messages": MESSAGES}],
    "/v1/tokenize": [{"prompt": TEXT}],
    "/detokenize": [{"tokens": [101, 7592, 102]}, {"tokens": [99_999_999]}],
    "/v1/detokenize": [{"tokens": [7592]}],
    "/ping": [{}],
    **{key: [{"input": TEXT}] for key in ("/deployments/{model}/embeddings", "/v1/deployments/{model}/embeddings")},
    **{
        key: [{"inputs": TEXT}] for key in ("/", "/embed", "/pipeline/feature-extraction", "/embed_all", "/invocations")
    },
    "/endpoints/{model}/invocations": [{"inputs": TEXT}],
    "/embed_sparse": [{"model": "splade", "inputs": TEXT}],
    **{key: [{"model": "rater", "inputs": TEXT}] for key in ("/predict", "/pipeline/text-classification")},
    "/pipeline/token-classification": [{"model": "ner", "inputs": TEXT}],
    **{
        key: [{"inputs": {"source_sentence": TEXT, "sentences": ["a"]}}]
        for key in ("/similarity", "/pipeline/sentence-similarity")
    },
    "/pipeline/text-ranking": [{"model": "rater", "query": TEXT, "texts": ["a", TEXT]}],
    "/decode": [{"ids": [101, 7592, 102]}],
    "/api/embed": [{"input": TEXT}],
    "/api/embeddings": [{"prompt": TEXT}],
    "/api/show": [{"model": "minilm"}],
    **{
        key: [{"model": "rater", "query": {"text": TEXT}, "passages": [{"text": "a"}, {"text": TEXT}]}]
        for key in ("/ranking", "/v1/ranking", "/v1/retrieval/{model}/reranking")
    },
    "/vectors": [{"text": TEXT}],
    **{key: [{**PAIRS, "model": "rater"}] for key in ("/reranking", "/v1/reranking")},
    "/embedding": [{"content": TEXT}],
    "/v2/models/{model}/infer": [
        {"model": "minilm", "inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": [TEXT]}]}
    ],
    **{
        key: [{"model": "minilm", "inputs": [[TEXT, "a"]]}]
        for key in ("/contextualizedembeddings", "/v1/contextualizedembeddings")
    },
    **{
        key: [{"model": "minilm", "inputs": [{"content": [{"type": "text", "text": TEXT}]}]}]
        for key in ("/multimodalembeddings", "/v1/multimodalembeddings")
    },
    **{
        key: [{"model": "minilm", "instances": [{"inputs": TEXT}, {"inputs": "a"}]}]
        for key in ("/vertex", "/v1/models/{model}:predict")
    },
}
"""Bodies of every route with the method POST; the first one is answered with 200."""
PAGE = [{"type": "image_url", "image_url": {"url": pictured.url(pictured.noise(90, 130))}}]
RATED = {**PAIRS, "model": "rater"}
MARKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": TEXT, "output_dtype": "int8", "output_dimension": None}),
    *((path, {"input": [TEXT], "modality": "text"}) for path in ("/v1/embeddings", "/embeddings")),
    ("/fastdeploy/v1/embeddings", {"input": TEXT, "normalize": False}),
    ("/embeddings", {"content": TEXT}),
    ("/v1/rerank", {**RATED, "documents": [{"text": text} for text in DOCUMENTS], "rank_fields": ["text"]}),
    *((path, {**RATED, "top_k": 2, "truncation": True}) for path in ("/rerank", "/v1/rerank")),
    *((path, {**RATED, "raw_scores": True}) for path in ("/rerank", "/v1/rerank")),
    *((path, {"model": "rater", "query": TEXT, "input": DOCUMENTS}) for path in ("/v1/rerank", "/v1/reranking")),
    *(
        (path, {"model": "rater", "query": TEXT, "texts": DOCUMENTS})
        for path in ("/", "/rerank", "/reranking", "/v1/reranking", "/invocations", "/elasticsearch/rerank")
    ),
    ("/elasticsearch", RATED),
    ("/elasticsearch", {"model": "splade", "inputs": TEXT}),
    ("/rerank", {**RATED, "property": ""}),
    *((path, {"model": "rater", "input": [TEXT], "raw_scores": True}) for path in ("/classify", "/v1/classify")),
    ("/v1/tokenize", {"text": TEXT}),
    *(("/tokenize", {key: TEXT}) for key in ("inputs", "content")),
    ("/predict", {"model": "rater", "instances": [{"inputs": TEXT}]}),
    ("/invocations", {"model": "rater", "text_1": TEXT, "text_2": DOCUMENTS}),
    ("/invocations", RATED),
    ("/invocations", {"input": TEXT}),
    ("/endpoints/rater/invocations", {"text_1": TEXT, "text_2": DOCUMENTS}),
    ("/endpoints/rater/invocations", PAIRS),
    ("/endpoints/rater/invocations", {"query": TEXT, "texts": DOCUMENTS}),
    ("/endpoints/minilm/invocations", {"input": TEXT}),
    *((path, {"model": "law", "input": TEXT}) for path in ("/v1/embeddings", "/pooling")),
    ("/v1/embeddings", {"model": "pages", "messages": [{"role": "user", "content": PAGE}]}),
    ("/v1/multimodalembeddings", {"model": "pages", "inputs": [{"content": PAGE}]}),
    ("/rerank", {"model": "pages", "query": TEXT, "documents": [{"content": PAGE}, {"content": [*PAGE, *PAGE]}]}),
    ("/tokenize", {"model": "pages", "messages": [{"role": "user", "content": PAGE}]}),
]
"""Bodies told apart on paths of several dialects, of an adapter, and with pictures; all are answered by 200."""

GETS = (
    "/health",
    "/livez",
    "/readyz",
    "/ping",
    "/models",
    "/v1/models",
    "/load",
    "/version",
    "/tokenizer_info",
    "/openapi.json",
    "/docs",
    "/redoc",
    "/",
    "/info",
    "/meta",
    "/api/tags",
    "/api/version",
    "/v1/health/live",
    "/v1/health/ready",
    "/.well-known/live",
    "/.well-known/ready",
    "/v1/models/{model}",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/{model}",
    "/v2/models/{model}/ready",
    "/infinity/models",
    "/infinity/v1/models",
    "/infinity/health",
)
OF_A_PROCESS = ("id", "created", "created_at", "uptime", "unix", "request_id", "total_duration", "modified_at")
"""Fields that differ from answer to answer."""


def same(a: Any, b: Any) -> bool:
    """Whether two answers are equal: numbers to rounding, all else by the letter."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(key in OF_A_PROCESS or same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= TOLERANCE
    return bool(a == b)


def row(table: Table, method: str, path: str, body: Any = None) -> Any:
    """The row of the table that answers a request."""
    match = table.match(method, path)
    assert match is not None, path
    entry = match.entry(body)
    return method, match.path, entry.dialect.name, entry.route.handler


def test_every_route_is_asked(here: TestClient) -> None:
    """Each row of the table, also where several dialects have one path."""
    table: Table = here.app.table  # type: ignore[attr-defined]
    posts = [*((path, body) for path, bodies in BODIES.items() for body in bodies), *MARKED]
    asked = {row(table, "POST", path, body) for path, body in posts}
    asked |= {row(table, "GET", path) for path in (*GETS, "/metrics")}
    known = {
        (method, path, entry.dialect.name, entry.route.handler)
        for (method, path), entries in table.routes.items()
        for entry in entries
        if method != "HEAD"
    }
    assert asked == known


@pytest.mark.parametrize(
    ("path", "number"), [(path, number) for path, bodies in BODIES.items() for number in range(len(bodies))]
)
def test_a_route_answers_as_in_one_process(front: Front, here: TestClient, path: str, number: int) -> None:
    status = compare(front, here, path, BODIES[path][number])
    assert number or status == 200


@pytest.mark.parametrize(("path", "body"), MARKED, ids=[f"{path}-{','.join(body)}" for path, body in MARKED])
def test_a_body_of_each_dialect(front: Front, here: TestClient, path: str, body: dict[str, Any]) -> None:
    assert compare(front, here, path, body) == 200


def compare(front: Front, here: TestClient, path: str, body: dict[str, Any]) -> int:
    """Both answers are equal; the status is returned."""
    got, expected = front.ask("POST", path, body), here.post(path, json=body)
    assert got.status_code == expected.status_code, got.text
    if "json" not in got.headers.get("content-type", ""):
        assert got.headers.get("content-type") == expected.headers.get("content-type")
        mine, theirs = (np.frombuffer(answer.content, np.uint8).astype(int) for answer in (got, expected))
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max(initial=0) <= 1  # a rounding apart
    else:
        assert same(got.json(), expected.json()), (got.text, expected.text)
    return got.status_code


@pytest.mark.parametrize("path", GETS)
def test_what_is_only_looked_at(front: Front, here: TestClient, path: str) -> None:
    got, expected = front.ask("GET", path), here.get(path)
    assert got.status_code == expected.status_code == (204 if "well-known" in path else 200)
    if "json" in expected.headers.get("content-type", ""):
        assert same(got.json(), expected.json()), f"{got.text}\n{expected.text}"


def test_metrics_and_the_report(front: Front) -> None:
    assert "cenote_requests_total" in front.ask("GET", "/metrics").text
    for line in (
        "runs: float32 on cpu, packed; 256 tokens an input",
        "tasks: embed, token_embed; default embed",
        "limits: 2048 inputs and 67108864 bytes a request, 10 s of waiting\n",
    ):
        assert f"INFO cenote: {line}" in front.log
    assert "PyTorch was not found" not in front.log


def test_many_requests_at_once_get_each_their_own_answer(front: Front, here: TestClient) -> None:
    texts = [[f"text {i} " + "word " * (i * 7 % 50), f"second of {i}"][: 1 + i % 2] for i in range(48)]
    with ThreadPoolExecutor(24) as pool:
        answers = [*pool.map(front.embed, texts)]
    for got, given in zip(answers, texts, strict=True):
        expected = here.post("/v1/embeddings", json={"input": given}).json()
        assert same(got.json()["data"], expected["data"])


def processor_seconds(process: subprocess.Popen[str] | Forked) -> float:
    """Time that a process has had the processor."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_a_client_that_leaves_takes_its_work(front: Front) -> None:
    """The engine computes less than half of what was asked for."""
    part = LARGE["input"][:100]
    before = processor_seconds(front.host.process)
    assert front.embed(part).status_code == 200
    whole = (processor_seconds(front.host.process) - before) * len(LARGE["input"]) / len(part)
    body = requests.Request("POST", front.url, json=LARGE).prepare().body
    assert isinstance(body, bytes)
    port = int(front.url.rpartition(":")[2])
    before = processor_seconds(front.host.process)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(body) + body)
        front.until(lambda: processor_seconds(front.host.process) > before + whole / 50)
    front.until(lambda: front.ask("GET", "/load").json() == {"server_load": 0})
    assert front.embed("a").status_code == 200  # after what was launched
    assert processor_seconds(front.host.process) - before < whole / 2
    time.sleep(1)
    assert processor_seconds(front.host.process) - before < whole / 2


def test_an_engine_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    """All that it had accepted is answered once: with vectors, or with a 503 that says when to ask again."""
    path = tmp_path / "engine.sock"
    host, front = engine(path), Front("--engine", str(path))
    try:
        front.wait()
        before = front.embed(TEXT).json()["data"][0]["embedding"]
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(front.embed, [f"{i} {j} " + "word " * 200 for j in range(40)]) for i in range(8)]
            front.until(lambda: front.ask("GET", "/load").json() == {"server_load": 8})
            time.sleep(0.2)
            host.end()
            outcomes = [answer.result(PATIENCE) for answer in answers]
        assert {outcome.status_code for outcome in outcomes} <= {200, 503}
        lost = [outcome for outcome in outcomes if outcome.status_code == 503]
        assert lost, "everything was done before the engine was killed"
        assert {outcome.headers["Retry-After"] for outcome in lost} == {"1"}
        told = {outcome.json()["error"]["message"] for outcome in lost}
        assert LOST in told
        assert told <= {LOST, GONE}, "gone for those that the server was still reading"
        refused = front.embed(TEXT)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        assert front.ask("GET", "/health").status_code == 503
        assert front.ask("POST", "/tokenize", {"prompt": TEXT}).status_code == 200, "it needs no engine"
        host = engine(path)
        front.until(lambda: front.ask("GET", "/health").status_code == 200)
        assert same(front.embed(TEXT).json()["data"][0]["embedding"], before)
        assert front.end(signal.SIGTERM) == 0
        assert host.end(signal.SIGTERM) == 0
        assert not path.exists()
    finally:
        front.process.kill()
        host.process.kill()
