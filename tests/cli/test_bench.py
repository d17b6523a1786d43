"""`cenote bench`: its figures agree with each other and with what was run, here and over HTTP; what it refuses."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import uvicorn
from torch import nn
from transformers import AutoModel, AutoTokenizer

from cenote.cli import flags, main
from cenote.cli import load as load_module
from cenote.cli.bench import LENGTHS, MIXED
from cenote.cli.load import Sample, closed, opened
from cenote.cli.measurements import Measurement, Throughput
from cenote.cli.record import table
from cenote.cli.texts import WORDS, Fit, Texts
from cenote.config import BenchConfig, EngineConfig, ModelConfig, ServerConfig
from cenote.core import PoolingParams
from cenote.engine.fake import FakeEngine
from cenote.errors import CenoteError, EngineFailed
from cenote.models import costs
from cenote.models import load as loading
from cenote.models.passes.fuse import Remembered
from cenote.pipeline.options import TextOptions
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.app import build
from cenote.settings import resolve
from tests import PATIENCE, checkpoints
from tests.conftest import CROSS_ENCODER, INFO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as Seq
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

pytestmark = pytest.mark.full  # a tool for developers
LIMIT = INFO.max_model_len


def bench(*argv: str, folder: Path, status: int = 0) -> dict[str, Any]:
    """What `cenote bench` saves."""
    file = folder / "bench.json"
    assert main(["bench", *argv, "--save", str(file)]) == status
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def counts(result: dict[str, Any]) -> list[tuple[str, float, int, int, int, int]]:
    names = ("kind", "value", "requests", "errors", "texts", "tokens")
    return [tuple(row[name] for name in names) for row in result["measurements"]]


def check_rates(result: dict[str, Any]) -> None:
    """Rates and percentiles of a result without errors are those of its counts and seconds."""
    rounds = result["options"]["rounds"]
    for row in result["measurements"]:
        assert len(row["seconds"]) == rounds
        for what in ("texts", "tokens"):
            rates = [row[what] / rounds / seconds for seconds in row["seconds"]]
            assert row[f"{what}_per_second"] == pytest.approx(statistics.median(rates))
        if row["kind"] == "throughput":
            assert row["p50_ms"] is row["p95_ms"] is row["p99_ms"] is None
        else:
            assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= max(row["seconds"]) * 1000


# --- a model in this process ---------------------------------------------------------------------------------------


def test_the_default_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--requests", "6", "--rounds", "2", "--batch-sizes", "5", "--concurrency", "3", "--streams", "1")
    result = bench(*argv, folder=tmp_path)
    tokens = sum(MIXED[:6])
    assert counts(result) == [
        ("throughput", 6, 2, 0, 12, 2 * tokens),
        *[("latency", n, 12, 0, 12, 12 * n) for n in LENGTHS],
        ("batches", 5, 4, 0, 12, 2 * tokens),
        ("load", 3, 12, 0, 12, 2 * tokens),
    ]
    check_rates(result)

    products = {(p["out"], p["in"]): p["rows"] for p in result["gemm"]["products"]}
    pooled = 1  # BERT's pooler takes the first token of a forward, whoever reads it
    assert products == {(384, 384): 6 * 4 * tokens + pooled, (1536, 384): 6 * tokens, (384, 1536): 6 * tokens}
    assert result["gemm"]["flop"] == 2 * (tokens * 6 * 12 + pooled) * 384**2
    throughput = result["measurements"][0]
    shares = [limit / own for limit, own in zip(throughput["gemm_seconds"], throughput["seconds"], strict=True)]
    assert throughput["share_of_gemm_limit"] == pytest.approx(statistics.median(shares))
    assert throughput["share_of_gemm_limit"] > 0.05

    assert result["command"] == f"cenote bench {' '.join(argv)} --save {tmp_path / 'bench.json'}"
    assert result["task"] == "embed"
    assert result["model"]["architecture"] == "BertModel"
    assert result["model"]["threads"] == torch.get_num_threads()
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cores"] >= 1
    assert result["options"]["requests"] == 6

    shown = capsys.readouterr()
    assert shown.out.endswith(table(result) + "\n")
    for row in result["measurements"]:
        (line,) = (line for line in shown.out.splitlines() if line.startswith(f"{row['label']} "))
        cells = line.removeprefix(row["label"]).split()
        p50 = "-" if row["p50_ms"] is None else f"{row['p50_ms']:,.2f}"
        assert (cells[0], cells[1], cells[3]) == (str(row["requests"]), f"{row['texts_per_second']:,.1f}", p50)
    assert f"{throughput['share_of_gemm_limit']:.0%} of the GEMM limit" in shown.out
    assert shown.err == "", "a progress bar is for terminals"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.classifier(tmp_path_factory.mktemp("reranker"), num_labels=1)


@pytest.mark.parametrize("task", ["classify", "token_embed", "score"])
def test_a_task(task: str, reranker: Path, tmp_path: Path) -> None:
    """Its tokenizer makes five tokens of a word, so lengths are met from below; pairs bring the query's tokens."""
    argv = (str(reranker), "--task", task, "--input-len", "40", "48", "--requests", "2", "--rounds", "1")
    result = bench(*argv, "--measure", "latency", "load", "--concurrency", "1", folder=tmp_path)
    text = [2 + 5 * 7, 2 + 5 * 9]  # seven and nine words between two marks
    query = "how deep is the water"
    pair = len(AutoTokenizer.from_pretrained(reranker)(query)["input_ids"]) + 1
    if task == "score":
        text = [pair + 5 * ((n - pair) // 5) for n in (40, 48)]
    assert counts(result) == [
        *[("latency", n, 2, 0, 2, 2 * n) for n in text],
        ("load", 1, 2, 0, 2, sum(text)),
    ]
    assert "gemm" not in result, "the limit belongs to throughput"


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
def test_products_are_those_of_the_plain_model(pooling: str, kernels: bool, tmp_path: Path) -> None:
    """Fused or not, each Linear is counted for each token; with CLS pooling the last layer's for one token a text."""
    folder = checkpoints.bert(tmp_path / "model")
    options = {"pooler_config": {"pooling_type": pooling}, "native_kernels": kernels}
    config = ModelConfig(model=str(folder), **options)  # type: ignore[arg-type]
    model, checkpoint = loading.load(config)
    service = Service.around(model, checkpoint, config, EngineConfig(streams=1))
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    texts = ["the quick brown fox", "a", "one two three four five six"]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def run_plain() -> None:
        for text in texts:
            plain(**tokenizer(text, return_tensors="pt"))

    def run() -> None:
        sequences = service.renderer.render(texts, "embed", PoolingParams(), TextOptions())
        service.engine.submit(sequences).result(PATIENCE)

    try:
        found = costs.products(model.layout.backbone.model, run)
    finally:
        service.engine.close()
    wanted = costs.products(plain, run_plain)
    tokens, width, wide = sum(len(ids) for ids in tokenizer(texts)["input_ids"]), checkpoints.HIDDEN, 48
    assert wanted == {(width, width): 8 * tokens, (wide, width): 2 * tokens, (width, wide): 2 * tokens}
    wanted[width, width] += 1  # the pooler, once a forward
    if pooling == "MEAN":
        assert found == wanted
    else:
        assert found[wide, width] == found[width, wide] == tokens + len(texts)
        assert found[width, width] < wanted[width, width]
    assert costs.flop(found) == sum(2 * rows * a * b for (a, b), rows in found.items())


def test_products_of_layers_that_are_run_otherwise() -> None:
    """What is remembered costs nothing; what its block has taken is run as often as the block; the rest as it is."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taken = nn.Linear(4, 5)
            self.unused = nn.Linear(4, 6)
            self.taken.weight = nn.Parameter(torch.empty(5, 4, device="meta"))

        def forward(self, x: torch.Tensor, y: int = 0) -> torch.Tensor:
            raise NotImplementedError("it is replaced")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.idle, self.plain, self.fixed = Block(), Block(), nn.Linear(4, 7), nn.Linear(4, 8)
            for block in (self.block, self.idle):
                vars(block)["forward"] = lambda x, y=0: x
            self.x_12D = torch.ones(1, 2, 4)
            vars(self.fixed)["forward"] = Remembered(self.fixed.forward, self.x_12D)

        def forward(self, x: torch.Tensor) -> None:
            self.plain(self.block(y=1, x=x))
            self.plain(input=x[:, :1])
            self.fixed(self.x_12D)

    model = Model()
    found = costs.products(model, lambda: model(torch.ones(2, 3, 4)))
    assert found == {(5, 4): 6, (7, 4): 6 + 2}
    assert costs.flop(found) == 2 * (6 * 20 + 8 * 28)
    assert not any(x._forward_pre_hooks for x in model.modules())


def test_seconds_of_products_grow_with_their_rows() -> None:
    few = costs.seconds(Counter({(64, 32): 1000}), rows=100, dtype=torch.float32)
    many = costs.seconds(Counter({(64, 32): 1_000_000_000}), rows=100, dtype=torch.float32)
    assert 0 < few < many


def test_texts_of_a_file(tmp_path: Path) -> None:
    """They are taken in turn; latency is by the powers of two that hold their tokens."""
    texts = ["a", "a cat", "word " * 30, "word " * 100]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps(text) for text in texts) + "\n\n")
    argv = ("--texts", str(file), "--requests", "6", "--rounds", "1", "--batch-sizes", "6", "--concurrency", "2")
    result = bench(*argv, folder=tmp_path)
    tokens = 3 + 4 + 32 + 102 + 3 + 4
    assert counts(result) == [
        ("throughput", 6, 1, 0, 6, tokens),
        ("latency", 4, 4, 0, 4, 14),
        ("latency", 32, 1, 0, 1, 32),
        ("latency", 128, 1, 0, 1, 102),
        ("batches", 6, 1, 0, 6, tokens),
        ("load", 2, 6, 0, 6, tokens),
    ]
    assert [row["label"] for row in result["measurements"]][1:4] == [
        f"one text of up to {bound} tokens" for bound in (4, 32, 128)
    ]


def test_figures_of_three_rounds() -> None:
    """Rates are medians over rounds, percentiles are over all requests, errors are no answers."""
    own = Measurement("load", 2, "2 clients", list, 4)
    for seconds, latencies, errors in (
        (1.0, [0.1, 0.2], []),
        (10.0, [4.0, 5.0], ["late"]),
        (2.0, [0.3], ["first", "b"]),
    ):
        texts = 10 * len(latencies)
        own.samples.append(Sample(seconds, texts, 100 * texts, latencies, errors))
    assert own.figures() == {
        "kind": "load",
        "value": 2,
        "label": "2 clients",
        "requests": 8,
        "errors": 3,
        "first_error": "late",
        "texts": 50,
        "tokens": 5000,
        "texts_per_second": 5.0,
        "tokens_per_second": 500.0,
        "p50_ms": pytest.approx(300),
        "p95_ms": pytest.approx(4800),
        "p99_ms": pytest.approx(4960),
        "seconds": [1.0, 10.0, 2.0],
    }
    own.samples = [Sample(1.0, errors=["a"])]
    silent = own.figures()
    assert [silent[name] for name in ("texts_per_second", "tokens_per_second", "p50_ms", "p99_ms")] == [None] * 4
    own = Throughput("throughput", 4, "all", list, 4, products=lambda _: None, limits=[0.5, 1.0, 0.9])
    own.samples = [Sample(seconds, 4, 8, [seconds]) for seconds in (1.0, 10.0, 1.0)]
    assert own.figures()["share_of_gemm_limit"] == 0.5


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_word", "around", "wanted", "fit"),
    [
        (1, 2, 64, Fit(62, 64)),
        (1, 2, 3, Fit(1, 3)),
        (1, 2, 2, None),
        (6, 2, 64, Fit(10, 62)),
        (1, 0, 1, Fit(1, 1)),
        (3, 100, 256, Fit(52, 256)),
    ],
)
def test_numbers_of_words(per_word: int, around: int, wanted: int, fit: Fit | None) -> None:
    asked: list[int] = []

    def count(text: str) -> int:
        asked.append(len(text.split()))
        return around + per_word * asked[-1]

    texts = Texts(count)
    assert texts.fit(wanted) == fit
    assert texts.fit(wanted) == fit
    assert len(asked) <= 6


def test_what_is_too_long_is_not_needed() -> None:
    def count(text: str) -> int:
        tokens = 2 + len(text.split()) * 3 // 2
        if tokens > 64:
            raise CenoteError("too long")
        return tokens

    assert Texts(count).fit(64) == Fit(41, 63)


def test_texts_are_new_each_time(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = Texts(lambda text: len(tokenizer(text)["input_ids"]))
    fit = texts.fit(32)
    assert fit == Fit(30, 32)
    made = [*texts.of([fit] * 50), *texts.of([fit] * 50)]
    assert len(set(made)) == 100
    assert {len(tokenizer(text)["input_ids"]) for text in made} == {32}
    assert all(len(word) == 5 for word in WORDS)
    assert len(set(WORDS)) == len(WORDS)


# --- load ------------------------------------------------------------------------------------------------------------


class Asked:
    """Answers each text with its length, unless it is "bad"; remembers what was asked and how many at once.

    The first `together` requests wait for each other.
    """

    def __init__(self, seconds: float = 0.002, *, together: int = 1) -> None:
        self.seconds = seconds
        self._first = iter([threading.Barrier(together)] * together)
        self.texts: list[str] = []
        self.now = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, texts: Seq[str]) -> int:
        with self._lock:
            self.texts += texts
            self.now += 1
            self.most = max(self.most, self.now)
            together = next(self._first, None)
        if together is not None:
            together.wait(PATIENCE)
        time.sleep(self.seconds)
        with self._lock:
            self.now -= 1
        if "bad" in texts:
            raise EngineFailed("it is bad")
        return sum(map(len, texts))


REQUESTS = [["a", "bb"], ["bad"], ["ccc"], ["dddd"], ["bad"], ["e"]] * 4


@pytest.mark.parametrize("clients", [1, 3, 50])
def test_a_closed_loop_sends_each_request_once(clients: int) -> None:
    together = min(clients, len(REQUESTS))
    asked, told = Asked(together=together), list[int]()
    sample = closed(asked, REQUESTS, clients=clients, progress=told.append)
    assert Counter(asked.texts) == Counter(text for request in REQUESTS for text in request)
    assert asked.most == together
    assert (sample.texts, sample.tokens) == (4 * 5, 4 * 11)
    assert len(sample.latencies) == 4 * 4
    assert sample.errors == ["it is bad"] * 8
    assert sum(told) == len(asked.texts)
    assert all(0.002 <= latency <= sample.seconds for latency in sample.latencies)


def test_an_open_loop_sends_each_request_once() -> None:
    asked, told = Asked(), list[int]()
    sample = opened(asked, REQUESTS, rate=2000, progress=told.append)
    assert Counter(asked.texts) == Counter(text for request in REQUESTS for text in request)
    assert (sample.texts, sample.tokens, len(sample.latencies), len(sample.errors)) == (20, 44, 16, 8)
    assert sum(told) == len(asked.texts)


def test_in_an_open_loop_waiting_counts() -> None:
    """All arrive at once, one may be under way: the last has waited for all the others."""
    asked = Asked(0.005)
    sample = opened(asked, [["a"]] * 10, rate=1e9, most=1)
    assert asked.most == 1
    assert max(sample.latencies) >= 10 * 0.005
    assert sorted(sample.latencies) == sample.latencies


class Clock:
    """Stands still but for those who sleep; notes for how long they do."""

    def __init__(self) -> None:
        self.now, self.gaps = 100.0, list[float]()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.gaps.append(seconds)


def test_arrivals_are_as_many_a_second_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps are exponential, hence as wide as they are long on average, and those of the seed at any rate."""
    gaps = {}
    for rate, seed in ((400, 0), (400, 1), (4, 0)):
        clock = Clock()
        monkeypatch.setattr(load_module, "time", clock)
        opened(Asked(0.0), [["a"]] * 2000, rate=rate, seed=seed)
        gaps[rate, seed] = np.array(clock.gaps)
    for (rate, _), found in gaps.items():
        assert found.mean() == pytest.approx(1 / rate, rel=0.1)
        assert found.std() == pytest.approx(1 / rate, rel=0.1)
    np.testing.assert_allclose(gaps[4, 0], gaps[400, 0] * 100, rtol=1e-6)
    assert not np.allclose(gaps[400, 1], gaps[400, 0])


def test_a_closed_loop_takes_requests_one_by_one() -> None:
    """Requests may depend on the clock, so each is taken when a client is free, and never ahead."""
    asked, taken = Asked(), list[int]()

    def requests() -> Iterator[list[str]]:
        for number in range(20):
            assert number <= len(asked.texts) + 3
            taken.append(number)
            yield [str(number)]

    sample = closed(asked, requests(), clients=3)
    assert taken == list(range(20))
    assert (sample.texts, sorted(map(int, asked.texts))) == (20, taken)


def test_a_loop_that_is_broken_off_sends_no_more() -> None:
    asked = Asked()

    def broken(texts: Seq[str]) -> int:
        asked(texts)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        closed(broken, [["a"]] * 1000, clients=2)
    assert len(asked.texts) <= 4


# --- a server --------------------------------------------------------------------------------------------------------


@contextmanager
def serving(engine: FakeEngine, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Iterator[str]:
    """The address of a real server over an engine without a model."""
    app = build([Service(engine, Renderer(tokenizer, engine.info), ("fake", "other"))], ServerConfig(**options))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def received(engine: FakeEngine, sent: int) -> int:
    """Tokens of the last `sent` sequences that the engine got: those that were measured, and not to warm up."""
    return sum(len(sequence) for sequence in engine.submitted[-sent:])


def mixed(count: int) -> int:
    """Tokens of so many texts of the default lengths, cut to what the model reads."""
    return sum(min(MIXED[i % len(MIXED)], LIMIT) for i in range(count))


def test_clients_of_a_server(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    engine = FakeEngine(INFO)
    argv = ("--requests", "20", "--rounds", "2", "--concurrency", "1", "7")
    with serving(engine, tokenizer) as url:
        result = bench("--url", url, *argv, folder=tmp_path)
    assert counts(result) == [("load", n, 40, 0, 40, 2 * mixed(20)) for n in (1, 7)]
    check_rates(result)
    assert received(engine, 80) == 4 * mixed(20)
    assert {sequence.task for sequence in engine.submitted} == {"embed"}
    assert (result["task"], result["model"]["name"], result["model"]["url"]) == ("embed", "fake", url)
    assert result["model"]["server_version"] == result["versions"]["cenote"]
    assert "gemm" not in result


def test_all_that_can_be_measured_of_a_server(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    engine = FakeEngine(INFO)
    argv = ("--requests", "6", "--rounds", "1", "--batch-sizes", "4", "--concurrency", "2", "--task", "token_embed")
    with serving(engine, tokenizer) as url:
        result = bench("other", "--url", f"{url}/v1/", *argv, "--measure", *KINDS, folder=tmp_path)
    assert counts(result) == [
        ("throughput", 6, 1, 0, 6, mixed(6)),
        *[("latency", n, 6, 0, 6, 6 * n) for n in (16, 64)],
        ("batches", 4, 2, 0, 6, mixed(6)),
        ("load", 2, 6, 0, 6, mixed(6)),
    ]
    assert received(engine, 4 * 6 + 6) == 3 * mixed(6) + 6 * 16 + 6 * 64
    assert {sequence.task for sequence in engine.submitted} == {"token_embed"}
    assert result["model"]["name"] == "other"


KINDS = ("throughput", "latency", "batches", "load")


@pytest.mark.parametrize("task", ["classify", "score"])
def test_other_routes(task: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    engine = FakeEngine(CROSS_ENCODER)
    with serving(engine, tokenizer) as url:
        argv = ("--task", task, "--requests", "5", "--rounds", "1", "--concurrency", "2", "--input-len", "30")
        result = bench("--url", url, *argv, folder=tmp_path)
    assert counts(result) == [("load", 2, 5, 0, 5, 150)]
    assert {sequence.task for sequence in engine.submitted} == {"classify"}
    pairs = [sequence.type_ids is not None and 1 in sequence.type_ids for sequence in engine.submitted]
    assert set(pairs) == {task == "score"}


def test_arrivals_at_a_server_and_its_key(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(INFO)
    argv = ("--requests", "20", "--rounds", "2", "--rate", "300", "900", "--input-len", "9")
    with serving(engine, tokenizer, api_key=("se cret",)) as url:
        result = bench("--url", url, "--api-key", "se cret", *argv, folder=tmp_path)
        assert main(["bench", "--url", url]) == 2
    assert "401" in capsys.readouterr().err
    assert counts(result) == [("load", rate, 40, 0, 40, 40 * 9) for rate in (300, 900)]
    assert received(engine, 80) == 80 * 9
    assert "cret" not in json.dumps(result), "the key is not written"


class Failing(FakeEngine):
    """Fails every third request after the first eleven."""

    seen = 0

    def submit(self, sequences: Any, *, progress: Callable[[int], None] | None = None) -> Any:
        self.seen += 1
        if self.seen > 11 and (self.seen - 11) % 3 == 0:
            self.failures.append(EngineFailed("the device is hot"))
        return super().submit(sequences, progress=progress)


def test_errors_of_a_server_are_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Failing(INFO)
    argv = ("--requests", "30", "--rounds", "2", "--concurrency", "1", "--input-len", "9")
    with serving(engine, tokenizer) as url:  # one word, three words, nine tokens; eight texts to warm up
        result = bench("--url", url, *argv, folder=tmp_path)
    assert counts(result) == [("load", 1, 60, 20, 40, 40 * 9)]
    assert len(engine.submitted) == 11 + 60
    row = result["measurements"][0]
    assert row["first_error"] == "POST /v1/embeddings was answered with 500: the device is hot"
    assert "1 client: 20 of 60 failed, first: POST /v1/embeddings was answered with 500" in capsys.readouterr().out
    assert row["texts_per_second"] == pytest.approx(statistics.median(20 / s for s in row["seconds"]))


def test_a_server_that_only_fails(tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(INFO, failures=[EngineFailed("the device is hot")] * 1000)
    with serving(engine, tokenizer) as url:
        assert main(["bench", "--url", url]) == 2
        assert main(["bench", "missing", "--url", url]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "cenote: POST /v1/embeddings was answered with 500: the device is hot",
        f"cenote: {url} does not serve 'missing', but fake, other",
    ]
    assert main(["bench", "--url", url]) == 2
    assert f"no model can be had at {url}: ConnectionRefusedError: Connection refused" in capsys.readouterr().err


# --- options ---------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[list[str], str]] = {
    "flag": (["--concurency", "3"], "unknown flag '--concurency'; did you mean '--concurrency'?"),
    "the server's flag": (["--port", "3"], "unknown flag '--port'"),
    "task": (["--task", "embedding"], "task: unknown task 'embedding'; did you mean 'embed'?"),
    "task of others": (
        ["tiny", "--task", "classify"],
        "Unsupported task: 'classify' Supported tasks: ('embed', 'token_embed')",
    ),
    "measure": (["--measure", "speed"], "measure.0: Input should be 'throughput', 'latency', 'batches' or 'load'"),
    "no requests": (["--requests", "0"], "requests: Input should be greater than or equal to 1"),
    "no rate": (["--rate", "0"], "rate.0: Input should be greater than 0"),
    "endless rate": (["--rate", "inf"], "rate.0: Input should be a finite number"),
    "limits of a rate": (["--rate", "9", "--concurrency", "1", "2"], "with `rate`, `concurrency` is one number"),
    "two sources": (["--texts", "a.txt", "--input-len", "9"], "`texts` cannot be combined with `input_len`"),
    "no such texts": (["--texts", "missing.txt"], "cannot read the texts of missing.txt"),
    "form of texts": (["--texts", "a.csv"], "texts: a file ending in .txt or .jsonl, got 'a.csv'"),
    "form of figures": (["--save", "a.txt"], "save: a file ending in .json, got 'a.txt'"),
    "form of the plot": (["--plot", "a.gif"], "plot: a file ending in .png or .svg or .pdf or .html, got 'a.gif'"),
    "no such folder": (["--save", "missing/a.json"], "save: there is no folder 'missing'"),
    "too long": (
        ["tiny", "--input-len", "8", "300"],
        "--input-len 300: tiny reads at most 64",
    ),
    "too short": (["tiny", "--input-len", "2"], "--input-len 2: for the task embed even one word has more tokens"),
    "address": (["--url", "localhost:8000"], "url: an address begins with http:// or https://, got 'localhost:8000'"),
    "port": (["--url", "http://localhost:x"], "no model can be had at http://localhost:x: InvalidURL"),
    "options of the model": (
        ["--url", "http://localhost:1", "--dtype", "float16"],
        "--dtype has no effect with --url: the server was started with options of its own",
    ),
    "two models": (["a", "--model", "b"], "the model is given twice: 'a' and --model 'b'"),
}


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny`."""
    root = tmp_path_factory.mktemp("beside")
    checkpoints.bert(root / "tiny")
    return root


@pytest.mark.parametrize(("argv", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(
    argv: list[str], sentence: str, beside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(beside)
    assert main(["bench", *argv]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert sentence in shown[0]


def parsed(*argv: str) -> BenchConfig:
    found = flags.parse(["bench", *argv])
    assert found.pop("command") == "bench"
    (*_, own), _ = resolve(found, (ModelConfig, EngineConfig, ServerConfig, BenchConfig))
    assert isinstance(own, BenchConfig)
    return own


def test_spellings_of_vllm() -> None:
    theirs = "--base-url http://a --num-prompts 7 --max-concurrency 3 --request-rate 2.5 --random-input-len 9"
    ours = "--url http://a --requests 7 --concurrency 3 --rate 2.5 --input-len 9"
    assert parsed(*theirs.split()) == parsed(*ours.split())
    assert parsed(*ours.split()) == BenchConfig(
        url="http://a", requests=7, concurrency=(3,), rate=(2.5,), input_len=(9,)
    )


def test_lists_name_things_once() -> None:
    assert parsed("--input-len", "9", "8", "9", "--input-len", "7").input_len == (9, 8, 7)


def test_the_file_of_a_server_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the server's own has no effect; the key is sent, and `task` is what is measured."""
    file = tmp_path / "server.yaml"
    file.write_text("port: 9000\nthreads: 2\napi-key: [a, b]\nrequests: 5\n")
    found = flags.parse(["bench", "--config", str(file), "--task", "token_embed"])
    assert found.pop("command") == "bench"
    (_, engine, _, own), notes = resolve(found, (ModelConfig, EngineConfig, ServerConfig, BenchConfig))
    assert isinstance(own, BenchConfig)
    assert isinstance(engine, EngineConfig)
    assert (own.api_key, own.requests, own.task, engine.threads, notes) == ("a", 5, "token_embed", 2, [])
    monkeypatch.setenv("CENOTE_API_KEY", "c,d")
    assert parsed().api_key == "c"


def test_every_option_has_a_flag_with_its_help() -> None:
    commands = flags.parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    text = commands["bench"].format_help()  # type: ignore[index, call-overload]
    for layer in (ModelConfig, EngineConfig, BenchConfig):
        for name in layer.model_fields:
            assert f"--{name.replace('_', '-')} " in text or f"--{name.replace('_', '-')}," in text, name
    assert "--port" not in text
    assert "(default: 8 32)" in text


def test_threads_are_those_of_the_limit_too(reranker: Path, tmp_path: Path) -> None:
    mine = torch.get_num_threads()
    try:
        result = bench(str(reranker), "--threads", "2", "--requests", "1", "--rounds", "1", folder=tmp_path)
        assert result["model"]["threads"] == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(mine)


def test_the_bar_ends_where_the_work_ends(
    reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    argv = ("--requests", "20", "--rounds", "2", "--batch-sizes", "6", "--concurrency", "2", "--input-len", "12")
    bench(str(reranker), *argv, folder=tmp_path)
    # Four measurements of 20 texts in each round; before them all 20 as one request, and 8 requests of each other kind.
    assert f"100%|##########| {2 * 4 * 20 + 20 + 8 + 20 + 8}/216 " in capsys.readouterr().err.replace("█", "#")


# --- the plot --------------------------------------------------------------------------------------------------------


def test_a_plot_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "cenote.cli.figures", raising=False)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("it is told before anything is done"))
    assert main(["bench", "--plot", str(tmp_path / "a.png")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("cenote: --plot needs matplotlib")
    assert message.endswith("pip install 'cenote[bench]'\n")


def test_plots(reranker: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    from cenote.cli.figures import picture

    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype html>"}
    argv = (str(reranker), "--requests", "3", "--rounds", "1", "--input-len", "12", "22")  # five tokens a word
    for suffix, start in starts.items():
        file = tmp_path / f"plot.{suffix}"
        result = bench(*argv, "--plot", str(file), folder=tmp_path)
        assert file.read_bytes().startswith(start)
    page = file.read_text()
    assert "<svg" in page
    assert table(result).splitlines()[-2] in page

    rows: dict[str, list[dict[str, Any]]] = {}
    for row in result["measurements"]:
        rows.setdefault(row["kind"], []).append(row)
    left, right = picture(result, "title").axes
    drawn = {line.get_label(): line for axes in (left, right) for line in axes.lines}
    for part in ("p50", "p95", "p99"):
        assert [*drawn[part].get_xdata()] == [12, 22]
        assert [*drawn[part].get_ydata()] == [row[f"{part}_ms"] for row in rows["latency"]]
    assert [*drawn["one text a request"].get_xdata()] == [1, 4, 16]
    assert [*drawn["one text a request"].get_ydata()] == [row["texts_per_second"] for row in rows["load"]]
    assert drawn["all texts, one request"].get_ydata()[0] == rows["throughput"][0]["texts_per_second"]
