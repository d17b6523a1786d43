"""`cenote bench`: texts a second of a model or a running server, and the latency of a text.

Everything is measured in rounds: in each, every measurement is made once, so that other work of the machine meets all
alike. Rates are medians over the rounds; percentiles are over the requests of all rounds.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

import cenote
from cenote.cli.load import MOST_UNDER_WAY, Sample, closed, opened
from cenote.cli.targets import Local, Remote
from cenote.config import BenchConfig, EngineConfig, ModelConfig, ServerConfig
from cenote.core import UNLIMITED
from cenote.engine.engine import DEFAULT_BATCH_TOKENS
from cenote.errors import CenoteError, ConfigError
from cenote.pipeline.calibration import read_texts
from cenote.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from collections.abc import Sequence as Seq

    import torch

    from cenote.cli.load import Ask
    from cenote.cli.targets import Target
    from cenote.core import ModelInfo
    from cenote.models.model import PoolingModel

    Figures = dict[str, Any]
    Source = Callable[[], list[str]]
    Products = Callable[[Callable[[], object]], "_Gemm | None"]

MIXED = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256)
"""Tokens of the texts, in equal parts, without `input_len`."""

LENGTHS = (16, 64, 256)
"""Tokens of the texts whose latency is measured, without `input_len`."""

CLIENTS = (1, 4, 16)
WARM_UP = 8
"""Requests that each measurement sends beforehand."""

PERCENTILES = (50, 95, 99)

TRIES = 16
"""Numbers of words that are tried for a text of a given number of tokens."""

# All of five letters, so that tokenizers of letters and bytes give every text of so many words as many tokens.
_SOME = (
    "above after again along among begin below black board bread break bring brown build carry catch cause chair "
    "child claim class clean clear close coast could count cover cross dance doubt dream dress drink drive early "
    "earth eight enemy enjoy enter equal event every field fight final first floor force forty found fresh front "
    "fruit glass grass great green group guard guess happy heart heavy horse hotel house human judge large laugh "
    "learn leave level light local lunch major match maybe metal might money month mouth music never night noise "
    "north novel occur offer often order other owner paint paper party peace phone piece place plain plane plant "
    "point power press price proud quick quiet quite radio raise range reach ready right river round scale scene "
    "score sense serve seven shall shape share sharp shore short shown sight since skill sleep small smile solid "
    "sound south space speak speed spend sport staff stage stand start state steel stone store storm story study "
    "sugar table taken teach thank their theme there thick thing think third those three throw title today total "
    "touch tower track trade train treat trial truth twice under union until upper usual value visit voice waste "
    "watch water wheel where which while white whole whose woman world worry would write wrong young"
)
WORDS = _SOME.split()
"""Words of the texts: a token each in most vocabularies."""


@dataclass
class Measurement:
    """One line of the table.

    Attributes:
        kind: throughput, latency, batches or load.
        value: tokens of a text, texts of a request, clients, or texts a second: the x axis of the plot.
        label: in the table.
        source: makes the texts of a sample.
        texts: number of texts of a sample.
        size: texts of a request.
        clients: that wait for their answers.
        samples: one for each round.
    """

    kind: str
    value: float
    label: str
    source: Source
    texts: int
    size: int = 1
    clients: int = 1
    samples: list[Sample] = field(default_factory=list)

    @property
    def warm_up_texts(self) -> int:
        """Texts that are run beforehand."""
        return min(self.texts, WARM_UP * self.size)

    def requests(self) -> list[list[str]]:
        """Return the requests of a sample."""
        texts = self.source()
        return [texts[i : i + self.size] for i in range(0, len(texts), self.size)]

    def warm_up(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Send some requests.

        Raises:
            CenoteError: none of them is answered.
        """
        sample = closed(ask, self.requests()[:WARM_UP], clients=min(self.clients, WARM_UP), progress=tell)
        if sample.errors and not sample.texts:
            raise CenoteError(f"{self.label}: no request was answered: {sample.errors[0]}")

    def run(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Add a sample."""
        self.samples.append(closed(ask, self.requests(), clients=self.clients, progress=tell))

    def figures(self) -> Figures:
        """Return the entry of the JSON file. Rates and percentiles are `None` without an answer."""
        samples = self.samples
        total = Sample.of(samples)
        latencies, errors = total.latencies, total.errors
        figures = {
            "kind": self.kind,
            "value": self.value,
            "label": self.label,
            "requests": len(latencies) + len(errors),
            "errors": len(errors),
            "texts": total.texts,
            "tokens": total.tokens,
            **_rates(samples),
            **_percentiles(latencies),
            "seconds": [sample.seconds for sample in samples],
        }
        if errors:
            figures["first_error"] = errors[0]
        return figures

    def beside(self) -> Figures:
        """Return entries of the JSON file beside the measurements."""
        return {}


@dataclass
class Arrivals(Measurement):
    """Texts that arrive whether or not earlier ones are answered, with at most `clients` requests under way.

    Attributes:
        rate: texts a second.
    """

    rate: float = 0.0

    def run(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Add a sample."""
        seed = len(self.samples)
        sample = opened(ask, self.requests(), rate=self.rate, most=self.clients, seed=seed, progress=tell)
        self.samples.append(sample)


@dataclass
class Throughput(Measurement):
    """All texts in one request, and the time that the matrix products alone take.

    Attributes:
        products: counts the matrix products of some work, and runs it; see `_products`.
        gemm: the products; `None` = they are not known.
        limits: seconds that they take, one for each round.
    """

    products: Products = field(kw_only=True)
    gemm: _Gemm | None = None
    limits: list[float] = field(default_factory=list)

    def warm_up(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Send the request, and count its matrix products."""
        self.gemm = self.products(partial(ask, self.source()))
        tell(self.texts)

    def run(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Add a sample and a limit."""
        if self.gemm:
            self.limits.append(self.gemm.seconds())
        super().run(ask, tell)

    def figures(self) -> Figures:
        """Return the entry of the JSON file, in which percentiles are `None`."""
        figures = super().figures() | _percentiles([])
        if self.limits:
            shares = [limit / sample.seconds for limit, sample in zip(self.limits, self.samples, strict=True)]
            figures |= {"gemm_seconds": self.limits, "share_of_gemm_limit": statistics.median(shares)}
        return figures

    def beside(self) -> Figures:
        """Return the matrix products."""
        return {"gemm": self.gemm.figures()} if self.gemm else {}


def _rates(samples: Seq[Sample]) -> Figures:
    if not any(sample.latencies for sample in samples):
        return {"texts_per_second": None, "tokens_per_second": None}
    return {
        "texts_per_second": statistics.median(sample.texts / sample.seconds for sample in samples),
        "tokens_per_second": statistics.median(sample.tokens / sample.seconds for sample in samples),
    }


def _percentiles(latencies: Seq[float]) -> Figures:
    names = [f"p{part}_ms" for part in PERCENTILES]
    if not latencies:
        return dict.fromkeys(names)
    seconds: list[float] = np.percentile(latencies, PERCENTILES).tolist()
    return {name: 1000 * value for name, value in zip(names, seconds, strict=True)}


class Fit(NamedTuple):
    """A number of words, and the number of tokens that they make."""

    words: int
    tokens: int


class Texts:
    """Texts of given numbers of tokens, made of common words; new ones each time.

    Args:
        count: returns the tokens of a text.
        choosy: use only words of the most common number of tokens; each word is counted once.
    """

    def __init__(self, count: Callable[[str], int], *, choosy: bool = False) -> None:
        self._count = count
        self._vocabulary = WORDS
        if choosy:
            tokens = {word: count(f"{WORDS[0]} {word}") for word in WORDS}
            usual = statistics.mode(tokens.values())
            self._vocabulary = [word for word in WORDS if tokens[word] == usual]
        self._random = random.Random(0)
        self._fits: dict[int, Fit | None] = {}

    def of(self, fits: Seq[Fit]) -> list[str]:
        """Return a text of each size."""
        return [self._text(fit.words) for fit in fits]

    def fit(self, tokens: int) -> Fit | None:
        """Return the words for `tokens` tokens, or for the most below; `None` if even one word makes more."""
        if tokens not in self._fits:
            self._fits[tokens] = self._search(tokens)
        return self._fits[tokens]

    def fits(self, lengths: Iterable[int], longest: int) -> list[Fit]:
        """Return the fit of each of `lengths`, of at most `longest` tokens; without those that one word exceeds."""
        sizes = [min(length, longest) for length in lengths]
        return list(filter(None, map(self.fit, sizes)))

    def _search(self, tokens: int) -> Fit | None:
        one, three = self._line
        words = max(1, 1 + round(2 * (tokens - one) / max(1, three - one)))
        below: Fit | None = None
        for _ in range(TRIES):
            try:
                count = self._count(self._text(words))
            except CenoteError:  # too long
                count = tokens + 1
            if count == tokens:
                return Fit(words, count)
            if count < tokens:
                below = Fit(words, count)
                words += 1
                continue
            words -= 1
            if words == 0 or (below and below.words == words):
                break
        return below

    @cached_property
    def _line(self) -> tuple[int, int]:
        """The tokens of one word and of three."""
        return self._count(self._text(1)), self._count(self._text(3))

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(self._vocabulary, k=words))


def run(arguments: dict[str, Any], argv: Seq[str]) -> int:
    """Run the command: measure, print the table, write the files.

    Args:
        arguments: as `cenote.cli.flags.parse` understood `argv`.
        argv: for the record.

    Raises:
        CenoteError: an option is wrong, the model cannot be loaded, the server not be reached, or nothing is answered.
    """
    arguments.pop("command")
    (model, engine, _, bench), notes = resolve(arguments, (ModelConfig, EngineConfig, ServerConfig, BenchConfig))
    assert isinstance(model, ModelConfig)
    assert isinstance(engine, EngineConfig)
    assert isinstance(bench, BenchConfig)
    for note in notes:
        print(note)
    draw = _draw() if bench.plot else None
    texts = read_texts(Path(bench.texts)) if bench.texts else None
    if texts == []:
        raise ConfigError(f"{bench.texts} has no texts")
    if bench.url:
        about, figures = _measure_server(bench, texts, Remote(bench.url, model.model, bench.task, bench.api_key))
    else:
        about, figures = _measure_model(bench, texts, model, engine)
    options = bench.model_dump(exclude={"api_key"})
    result = _record(_command(argv, bench.api_key)) | {"model": about, "options": options} | figures
    print(table(result))
    if bench.save:
        Path(bench.save).write_text(json.dumps(result, indent=1) + "\n")
    if draw is not None and bench.plot:
        draw(result, table(result), Path(bench.plot))
    return 0


def _command(argv: Seq[str], secret: str) -> str:
    """Return the command line for the record, without `secret`."""
    words = [word.replace(secret, "***") for word in argv] if secret else argv
    return shlex.join(["cenote", *words])


def _measure_server(bench: BenchConfig, texts: list[str] | None, remote: Remote) -> tuple[Figures, Figures]:
    """Return a description of a server, and its figures."""
    try:
        about = {"name": remote.name, "url": bench.url, "server_version": remote.version()}
        return about, _measure(bench, texts, remote)
    finally:
        remote.close()


def _measure_model(
    bench: BenchConfig, texts: list[str] | None, model: ModelConfig, engine: EngineConfig
) -> tuple[Figures, Figures]:
    """Load a model, and return its description and its figures."""
    import torch

    from cenote.models.load import load
    from cenote.pipeline.pipeline import Service

    if engine.threads is not None:
        torch.set_num_threads(engine.threads)  # also for the GEMM limit, which is measured here
    pooling_model, checkpoint = load(model)
    service = Service.around(pooling_model, checkpoint, model, engine, max_queued=UNLIMITED)
    try:
        about = _about(service.info) | {"threads": torch.get_num_threads()}
        batch = engine.max_num_batched_tokens or DEFAULT_BATCH_TOKENS["cpu"]
        return about, _measure(bench, texts, Local(service, bench.task), pooling_model, batch)
    finally:
        service.engine.close()


def _about(info: ModelInfo) -> Figures:
    report = info.report
    return {
        "name": report.source,
        "architecture": info.architecture,
        "revision": report.revision,
        "dtype": report.dtype,
        "device": report.device,
        "layout": report.layout,
        "max_model_len": info.max_model_len,
    }


def _draw() -> Callable[[Figures, str, Path], None]:
    try:
        from cenote.cli.figures import draw
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib ({error}): pip install 'cenote[bench]'") from None
    return draw


def _measure(
    bench: BenchConfig, texts: list[str] | None, target: Target, model: PoolingModel | None = None, batch: int = 0
) -> Figures:
    """Warm up, measure in rounds, and return the figures.

    Args:
        bench: the measurements.
        texts: the user's; `None` = texts are made.
        target: the model or server that is measured.
        model: the model, if it is in this process.
        batch: tokens of its largest batches.
    """
    workload, groups = _made(bench, target) if texts is None else _repeated(bench, texts, target)
    plan = list(_plan(bench, workload, groups, partial(_products, model, batch)))
    with tqdm(unit="text", disable=None, dynamic_ncols=True, desc="warm-up") as bar:
        bar.total = sum(measurement.warm_up_texts + bench.rounds * measurement.texts for measurement in plan)
        for measurement in plan:
            measurement.warm_up(target.ask, bar.update)
        for _ in range(bench.rounds):
            for measurement in plan:
                bar.set_description(measurement.label)
                measurement.run(target.ask, bar.update)
    figures: Figures = {"task": target.task, "measurements": [measurement.figures() for measurement in plan]}
    for measurement in plan:
        figures |= measurement.beside()
    return figures


def _repeated(bench: BenchConfig, texts: list[str], target: Target) -> tuple[Source, dict[int, Source]]:
    """Return the texts of a measurement out of the user's, and groups of them by the maximum tokens of a text."""
    chosen = list(islice(cycle(texts), bench.requests))
    groups: dict[int, list[str]] = defaultdict(list)
    if "latency" in _kinds(bench):
        for text in chosen:
            groups[1 << (target.count(text) - 1).bit_length()].append(text)
    return partial(list, chosen), {bound: partial(list, groups[bound]) for bound in sorted(groups)}


def _made(bench: BenchConfig, target: Target) -> tuple[Source, dict[int, Source]]:
    """Return texts of mixed lengths for a measurement, and texts of one length by their tokens.

    Raises:
        ConfigError: texts of the lengths of `bench` cannot be made.
    """
    texts = Texts(target.count, choosy=isinstance(target, Local))
    for length in bench.input_len:
        if target.longest and length > target.longest:
            raise ConfigError(f"--input-len {length}: {target.name} reads at most {target.longest} tokens")
        if texts.fit(length) is None:
            raise ConfigError(f"--input-len {length}: for the task {target.task} even one word has more tokens")
    longest = target.longest or max(MIXED)
    mixed = texts.fits(bench.input_len or MIXED, longest)
    if not mixed:
        raise ConfigError(f"{target.name} reads no text of up to {longest} tokens; see --input-len")
    order = list(islice(cycle(mixed), bench.requests))
    random.Random(0).shuffle(order)
    lengths = dict.fromkeys(texts.fits(bench.input_len or LENGTHS, longest))
    return partial(texts.of, order), {fit.tokens: partial(texts.of, [fit] * bench.requests) for fit in lengths}


def _kinds(bench: BenchConfig) -> tuple[str, ...]:
    if bench.measure:
        return bench.measure
    return ("load",) if bench.url else ("throughput", "latency", "batches", "load")


def _plan(bench: BenchConfig, workload: Source, groups: dict[int, Source], products: Products) -> Iterator[Measurement]:
    """Yield the measurements, in order."""
    kinds, count = _kinds(bench), bench.requests
    if "throughput" in kinds:
        yield Throughput("throughput", count, "all texts, one request", workload, count, count, products=products)
    if "latency" in kinds:
        at_most = "up to " if bench.texts else ""
        for length, source in groups.items():
            yield Measurement("latency", length, f"one text of {at_most}{length} tokens", source, len(source()))
    if "batches" in kinds:
        for size in bench.batch_sizes:
            yield Measurement("batches", size, f"{size} texts a request", workload, count, size)
    if "load" in kinds:
        yield from _loads(bench, workload)


def _loads(bench: BenchConfig, workload: Source) -> Iterator[Measurement]:
    """Yield a measurement for each rate of arrivals, else for each number of clients."""
    count = bench.requests
    if not bench.rate:
        for clients in bench.concurrency or CLIENTS:
            yield Measurement("load", clients, _counted(clients, "client"), workload, count, clients=clients)
        return
    (under_way,) = bench.concurrency or (MOST_UNDER_WAY,)
    for rate in bench.rate:
        label = f"{rate:g} texts a second arrive"
        yield Arrivals("load", rate, label, workload, count, clients=under_way, rate=rate)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


class _Gemm:
    """The matrix products of a workload.

    Args:
        model: on a CPU.
        batch: tokens of its largest batches.
        work: runs the workload.
    """

    def __init__(self, model: PoolingModel, batch: int, work: Callable[[], object]) -> None:
        import torch

        from cenote.models import costs

        self._costs = costs
        self._dtype: torch.dtype = getattr(torch, model.info.report.dtype)
        self.products = costs.products(model.layout.backbone.model, work)
        self.rows = min(batch, max(self.products.values(), default=1))

    def seconds(self) -> float:
        """Return the seconds that they take now."""
        return self._costs.seconds(self.products, rows=self.rows, dtype=self._dtype)

    def figures(self) -> Figures:
        """Return their entry of the JSON file."""
        shapes = [{"out": out, "in": into, "rows": n} for (out, into), n in self.products.items()]
        dtype = str(self._dtype).removeprefix("torch.")
        return {"flop": self._costs.flop(self.products), "dtype": dtype, "rows": self.rows, "products": shapes}


def _products(model: PoolingModel | None, batch: int, work: Callable[[], object]) -> _Gemm | None:
    """Run a workload, and count its matrix products if the model is here and on a CPU."""
    if model is None or model.info.report.device != "cpu":
        work()
        return None
    gemm = _Gemm(model, batch, work)
    return gemm if gemm.products else None


def _record(command: str) -> Figures:
    """Return the record of a measurement: command, date, machine and versions."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {"cenote": cenote.__version__, **{name: metadata.version(name) for name in packages}},
    }


INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
"""Flags of a processor that its record names."""


def machine() -> Figures:
    """Return processor, cores, memory in GiB, system and Python."""
    processor, flags = _processor()
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "instructions": list(filter(flags.__contains__, INSTRUCTIONS)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _processor() -> tuple[str, list[str]]:
    """Return the name and the flags of the processor, as far as Linux tells them."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return "", []
    entries = [line.partition(":") for line in file.read_text().splitlines()]
    values = {name.strip(): value.strip() for name, _, value in entries}
    return values.get("model name", ""), values.get("flags", "").split()


COLUMNS = {
    "requests": ("requests", ",.0f"),
    "texts/s": ("texts_per_second", ",.1f"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "p50 ms": ("p50_ms", ",.2f"),
    "p95 ms": ("p95_ms", ",.2f"),
    "p99 ms": ("p99_ms", ",.2f"),
    "errors": ("errors", ",.0f"),
}
"""Columns of the table: field of a measurement and format."""


def table(result: Figures) -> str:
    """Return the figures as lines of text."""
    rows = result["measurements"]
    grid = [["", *COLUMNS], *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = _heading(result)
    for first, *others in grid:
        lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    for row in rows:
        lines += _remarks(row)
    return "\n".join(lines)


def _heading(result: Figures) -> list[str]:
    about, options = result["model"], result["options"]
    work = f"task {result['task']}, {options['requests']} texts of each kind a round, "
    work += _counted(options["rounds"], "round")
    if "url" in about:
        return [f"{about['name']} at {about['url']}", work]
    model = f"{about['name']} ({about['architecture']}), {about['dtype']} on {about['device']}, {about['layout']}"
    if about["device"] == "cpu":
        model += f", {_counted(about['threads'], 'thread')}"
    return [model, work]


def _cells(row: Figures) -> list[str]:
    return [row["label"], *(_cell(row[name], form) for name, form in COLUMNS.values())]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _remarks(row: Figures) -> list[str]:
    """Return the lines below the table about one of its rows."""
    lines = []
    if "share_of_gemm_limit" in row:
        lines.append(
            f"{row['share_of_gemm_limit']:.0%} of the GEMM limit: torch.nn.functional.linear takes "
            f"{statistics.median(row['gemm_seconds']):.2f} s for the products of the Linear layers, "
            f"all texts in one request {statistics.median(row['seconds']):.2f} s"
        )
    if row["errors"]:
        lines.append(f"{row['label']}: {row['errors']} of {row['requests']} failed, first: {row['first_error']}")
    return lines
