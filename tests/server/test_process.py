"""`cenote serve` as a process with the embedded MiniLM: its report, its numbers, clients that leave, and its end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
import requests
import torch
from prometheus_client.parser import text_string_to_metric_families
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from cenote.models.hub import EMBEDDED_NAME, embedded
from tests import PATIENCE, checkpoints
from tests.forked import Forked, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOLERANCE = 1e-5
TEXTS = [
    "Hello, my name is",
    "a",
    "Cenotes are natural pits",
    "水 and naïve café",
    "one " * 60,
]
LARGE = {"input": [f"number {i} " + "of a very long list of words " * 12 for i in range(2000)]}
"""Many seconds of work."""


def started(*arguments: str) -> subprocess.Popen[str]:
    """`cenote`, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "cenote", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class Process:
    """A server that runs, and what it has logged.

    Args:
        flags: of `cenote serve`.
        forked: from a process that has imported Cenote.
    """

    def __init__(self, *flags: str, forked: bool = True) -> None:
        command = ("serve", "--port", "0", *flags)
        self.process = Forked("cenote", *command) if forked else started(*command)
        self.lines: list[str] = []
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._listens.wait(PATIENCE), self.log
        self.port = int(next(iter(re.findall(r"serving https?://127\.0\.0\.1:(\d+)", self.log)), 0))
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                self.lines.append(line)
                if "serving http" in line:
                    self._listens.set()
        self._listens.set()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def embed(self, given: Any, **fields: Any) -> list[list[float]]:
        answer = requests.post(f"{self.url}/v1/embeddings", json={"input": given, **fields}, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        return [entry["embedding"] for entry in answer.json()["data"]]

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(requests.get(f"{self.url}/metrics", timeout=PATIENCE).text)
        return sum(s.value for f in families for s in f.samples if s.name == name and s.labels == labels)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Ask again and again; every question is a round trip to the server."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.log

    def stop(self) -> int:
        """Ask it to end, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    """A server that the tests of this module share."""
    flags = ("--served-model-name", "minilm", "all-MiniLM-L6-v2", "--gpu-memory-utilization", "0.9")
    process = Process(*flags, forked=False)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return SentenceTransformer(str(embedded()), device="cpu")


def close_to(got: Any, wanted: Any) -> bool:
    return bool(np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64)).max() <= TOLERANCE)


def head(body: bytes, path: str = "/v1/embeddings") -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*lines, "", ""]).encode()


def test_start_says_what_was_resolved(server: Process) -> None:
    for line in (
        f"model: {EMBEDDED_NAME} (BertModel), served as minilm, all-MiniLM-L6-v2",
        "runs: float32 on cpu, packed; 256 tokens an input",
        "tasks: embed, token_embed; default embed",
        "pooling: mean, normalised, dimension 384",
        "scores pairs as: bi-encoder, late-interaction",
        "limits: 2048 inputs and 67108864 bytes a request, 10 s of waiting, 16384 inputs waiting",
    ):
        assert f"INFO cenote: {line}\n" in server.log
    assert "warning" not in server.log


@pytest.mark.parametrize("model", ["minilm", "all-MiniLM-L6-v2"])
def test_openai_client(server: Process, reference: SentenceTransformer, model: str) -> None:
    """The client asks for base64 unless told otherwise, and decodes it."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model=model, input=TEXTS)
        plain = client.embeddings.create(model=model, input=TEXTS, encoding_format="float")
        assert [card.id for card in client.models.list()] == ["minilm", "all-MiniLM-L6-v2"]
    assert close_to([entry.embedding for entry in answer.data], reference.encode(TEXTS))
    assert close_to([entry.embedding for entry in plain.data], reference.encode(TEXTS))
    assert answer.model == model
    assert answer.usage.prompt_tokens == sum(len(ids) for ids in reference.tokenizer(TEXTS)["input_ids"])


def test_openai_async_client(server: Process, reference: SentenceTransformer) -> None:
    async def ask() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(*(client.embeddings.create(model="minilm", input=t) for t in TEXTS))
        return [answer.data[0].embedding for answer in answers]

    assert close_to(asyncio.run(ask()), reference.encode(TEXTS))


def test_openai_client_raises_its_own_errors(server: Process) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="The model `gpt` does not exist"):
            client.embeddings.create(model="gpt", input="a")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as caught:
            client.embeddings.create(model="minilm", input="a " * 300)
    assert caught.value.param == "input_tokens"
    assert caught.value.type == "BadRequestError"


def test_token_vectors(server: Process, reference: SentenceTransformer) -> None:
    """Each row is the last layer's state of its token, normalised."""
    body = {"input": TEXTS[0], "task": "token_embed"}
    answer = requests.post(f"{server.url}/pooling", json=body, timeout=PATIENCE).json()
    wanted = reference.encode(TEXTS[0], output_value="token_embeddings").numpy()
    assert close_to(answer["data"][0]["data"], wanted / np.linalg.norm(wanted, axis=1, keepdims=True))


def test_chunked_request_by_hand(server: Process, reference: SentenceTransformer) -> None:
    body = json.dumps({"input": TEXTS[0]}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    connection.request("POST", "/v1/embeddings", iter([body[:5], body[5:]]), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.getheader("Content-Type") == "application/json"
    assert close_to(json.load(answer)["data"][0]["embedding"], reference.encode(TEXTS[0]))
    connection.close()


def test_one_connection_carries_many_requests(server: Process) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    seen = set()
    for status, body in ((200, '{"input": "a"}'), (400, '{"input": '), (200, '{"input": "a"}')):
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
        seen.add(connection.sock.getsockname())
    assert len(seen) == 1
    connection.close()


def test_32_requests_at_once_get_each_their_own_answer(server: Process, reference: SentenceTransformer) -> None:
    texts = [[f"text {i} " + "word " * (i * 7 % 50), f"second of {i}"][: 1 + i % 2] for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        answers = [*pool.map(server.embed, texts)]
    for got, given in zip(answers, texts, strict=True):
        assert close_to(got, reference.encode(given))


def test_a_client_that_leaves_drops_its_work(server: Process, reference: SentenceTransformer) -> None:
    before = server.metric("cenote_sequences_total", outcome="dropped")
    body = json.dumps(LARGE).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(body) + body)
        server.wait_until(lambda: server.metric("cenote_queued_sequences") > 0)
    server.wait_until(lambda: server.metric("cenote_sequences_total", outcome="dropped") > before)
    assert server.metric("cenote_sequences_total", outcome="dropped") - before > len(LARGE["input"]) / 2
    assert server.metric("cenote_queued_sequences") == 0
    assert close_to(server.embed(TEXTS[0]), [reference.encode(TEXTS[0])])
    assert requests.get(f"{server.url}/load", timeout=PATIENCE).json() == {"server_load": 0}


@pytest.mark.full
def test_a_client_that_is_killed_drops_its_work(server: Process, reference: SentenceTransformer) -> None:
    before = server.metric("cenote_sequences_total", outcome="dropped")
    body = json.dumps(LARGE).encode()
    program = (
        "import socket, sys\n"
        f"connection = socket.create_connection(('127.0.0.1', {server.port}))\n"
        "connection.sendall(sys.stdin.buffer.read())\n"
        "connection.recv(1)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    assert client.stdin is not None
    client.stdin.write(head(body) + body)
    client.stdin.close()
    server.wait_until(lambda: server.metric("cenote_queued_sequences") > 0)
    client.kill()
    assert client.wait(PATIENCE) == -signal.SIGKILL
    server.wait_until(lambda: server.metric("cenote_sequences_total", outcome="dropped") > before)
    assert close_to(server.embed(TEXTS[0]), [reference.encode(TEXTS[0])])


def test_a_client_that_leaves_while_it_sends_leaves_nothing(server: Process) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(b"x" * 1000) + b"x" * 10)
        server.wait_until(lambda: server.metric("cenote_running_requests") == 1)
    server.wait_until(lambda: server.metric("cenote_running_requests") == 0)
    assert server.embed("a")


def test_a_small_request_does_not_wait_for_a_large_one(server: Process, reference: SentenceTransformer) -> None:
    body = json.dumps(LARGE).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(body) + body)
        server.wait_until(lambda: server.metric("cenote_queued_sequences") > 0)
        assert close_to(server.embed(TEXTS[0]), [reference.encode(TEXTS[0])])
        assert requests.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
        assert server.metric("cenote_queued_sequences") > 0, "the large request was answered first"


def test_sigterm_finishes_what_was_accepted(reference: SentenceTransformer) -> None:
    process = Process("--shutdown-timeout", str(PATIENCE))
    try:
        given = LARGE["input"][:100]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(process.embed, given)
            process.wait_until(lambda: process.metric("cenote_queued_sequences") > 0)
            assert process.stop() == 0
            rows = answer.result(PATIENCE)
            assert len(rows) == len(given)
            assert close_to(rows[::5], reference.encode(given[::5]))
    finally:
        process.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", process.port))


@pytest.fixture
def ending() -> Iterator[Callable[..., Process]]:
    """Starts servers that a test ends."""
    processes: list[Process] = []

    def start(*flags: str) -> Process:
        processes.append(Process(*flags))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def connected(process: Process, content: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(content)
    return connection


def everything(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.full
def test_clients_that_send_or_read_half_do_not_keep_the_server_from_ending(ending: Callable[..., Process]) -> None:
    process = ending("--shutdown-timeout", "1")
    body = json.dumps({"input": ["never sent whole"]}).encode()
    sends_half = connected(process, head(body) + body[:10])
    matrices = json.dumps({"input": ["a text of several words " * 10] * 64, "task": "token_embed"}).encode()
    reads_nothing = connected(process, head(matrices, "/pooling") + matrices)  # of an answer of 15 MB
    process.wait_until(lambda: process.metric("cenote_requests_total", route="/pooling", status="200") == 1)
    assert process.stop() == 0
    answer = everything(sends_half)
    sends_half.close()
    assert answer.startswith(b"HTTP/1.1 503 "), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the server is shutting down"
    assert "1 requests were not done in time and are answered 503" in process.log
    reads_nothing.close()


def test_a_second_signal_ends_requests_at_once(ending: Callable[..., Process]) -> None:
    process = ending("--shutdown-timeout", "3600")
    body = json.dumps(LARGE).encode()
    works = connected(process, head(body) + body)
    process.wait_until(lambda: process.metric("cenote_batch_sequences_count") > 0)
    process.process.send_signal(signal.SIGTERM)
    process.wait_until(lambda: "Waiting for connections to close" in process.log)
    assert process.stop() == 0
    answer = everything(works)
    works.close()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert "Traceback" not in process.log


def test_a_second_port_tells_how_the_server_does(ending: Callable[..., Process]) -> None:
    """It answers while the first port ends, too, and says then that the server is not ready."""
    process = ending("--metrics-port", "0", "--shutdown-timeout", "3600")
    (port,) = re.findall(r"health and metrics on http://127\.0\.0\.1:(\d+)", process.log)
    url = f"http://127.0.0.1:{port}"

    def statuses() -> list[int]:
        return [requests.get(url + path, timeout=PATIENCE).status_code for path in ("/livez", "/readyz", "/health")]

    assert statuses() == [200, 200, 200]
    assert "cenote_waiting_seconds 0.0" in requests.get(f"{url}/metrics", timeout=PATIENCE).text
    assert requests.post(f"{url}/v1/embeddings", json={"input": "a"}, timeout=PATIENCE).status_code == 404
    body = json.dumps(LARGE).encode()
    works = connected(process, head(body) + body)
    process.wait_until(lambda: process.metric("cenote_batch_sequences_count") > 0)
    process.process.send_signal(signal.SIGTERM)
    process.wait_until(lambda: "Waiting for connections to close" in process.log)
    assert statuses() == [200, 503, 200]
    assert process.stop() == 0
    works.close()


def test_two_models(tmp_path: Path) -> None:
    """An embedder and a reranker in one process, each under its own name."""
    embedder = checkpoints.bert(tmp_path / "embedder")
    reranker = checkpoints.classifier(tmp_path / "reranker", num_labels=1)
    query, documents = "natural pits", ["the lazy dog", "water and stone", "a"]
    tokenizer = AutoTokenizer.from_pretrained(embedder)
    with torch.inference_mode():
        model = AutoModel.from_pretrained(embedder, dtype=torch.float32).eval()
        state = model(**tokenizer(query, return_tensors="pt")).last_hidden_state[0, 0]
        rates = AutoModelForSequenceClassification.from_pretrained(reranker, dtype=torch.float32).eval()
        pairs = [tokenizer(query, document, return_tensors="pt") for document in documents]
        scores = [float(rates(**pair).logits.sigmoid()) for pair in pairs]
    process = Process(str(embedder), str(reranker), "--served-model-name", "a", "b")
    try:
        for line in (
            f"model: {embedder} (BertModel), served as a",
            f"model: {reranker} (BertForSequenceClassification), served as b",
            "head: BertForSequenceClassification; 1 label, sigmoid",
        ):
            assert f"INFO cenote: {line}\n" in process.log
        cards = requests.get(f"{process.url}/v1/models", timeout=PATIENCE).json()["data"]
        assert [card["id"] for card in cards] == ["a", "b"]
        for fields in ({}, {"model": "a"}):
            assert close_to(process.embed(query, **fields), [state / state.norm()])
        body = {"model": "b", "query": query, "documents": documents}
        results = requests.post(f"{process.url}/v1/rerank", json=body, timeout=PATIENCE).json()["results"]
        assert close_to([entry["relevance_score"] for entry in results], sorted(scores, reverse=True))
        assert [entry["index"] for entry in results] == sorted(range(3), key=lambda i: -scores[i])
        answer = requests.post(f"{process.url}/v1/rerank", json={**body, "model": "c"}, timeout=PATIENCE)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "The model `c` does not exist."
        assert process.stop() == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--max-model-length", "5"], {}, "unknown flag '--max-model-length'; did you mean '--max-model-len'?"),
        (
            ["--pooler-config.pooling_typ", "MEAN"],
            {},
            "pooler_config: unknown pooler config field 'pooling_typ'; did you mean 'pooling_type'?",
        ),
        ([], {"CENOTE_PROT": "9"}, "environment variable CENOTE_PROT: unknown option 'prot'; did you mean 'port'?"),
        (
            ["--runner", "generate"],
            {},
            "runner: Cenote runs pooling models only and does not generate text; use runner 'pooling'",
        ),
        (["--port", "70000"], {}, "port: Input should be less than or equal to 65535"),
        (
            ["one", "two", "--served-model-name", "a"],
            {},
            "2 models need as many names: --served-model-name gives 1",
        ),
        (
            ["one", "two", "--served-model-name", "a", "a"],
            {},
            "two models cannot both be served as 'a'; see --served-model-name",
        ),
    ],
    ids=["flag", "dotted", "environment", "runner", "port", "too few names", "a name twice"],
)
def test_a_wrong_option_is_one_line(flags: list[str], environment: dict[str, str], message: str) -> None:
    program = "import sys; from cenote.cli import main; sys.exit(main())"
    result = run(program, "serve", *flags, environment={**os.environ, **environment})
    assert (result.returncode, result.stderr, result.stdout) == (2, f"cenote: {message}\n", "")


def test_a_port_in_use_is_one_line(server: Process) -> None:
    process = Forked("cenote", "serve", "--port", str(server.port), "--log-level", "error")
    with process.stderr:
        log = process.stderr.read()
    assert process.wait(PATIENCE) == 2
    assert log.splitlines()[-1] == f"cenote: cannot listen on 127.0.0.1:{server.port}: Address already in use"
    assert "Traceback" not in log
    assert server.embed("a"), "the first server goes on"
