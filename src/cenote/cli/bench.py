"""`cenote bench`: what a model, or a running server, does in a second, and how long a text takes.

Everything is measured in rounds: in each, every measurement is made once, so that what else the machine does meets all
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cenote
from cenote.cli.load import MOST_UNDER_WAY, Sample, closed, opened
from cenote.cli.targets import Local, Remote
from cenote.config import BenchConfig, EngineConfig, ModelConfig, ServerConfig, resolve
from cenote.engine.engine import DEFAULT_BATCH_TOKENS
from cenote.errors import CenoteError, ConfigError
from cenote.pipeline.calibration import read_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as Seq

    import torch

    from cenote.cli.load import Ask
    from cenote.cli.targets import Target
    from cenote.core import ModelInfo
    from cenote.models.model import PoolingModel

    Figures = dict[str, Any]
    Source = Callable[[], list[str]]

MIXED = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256)
"""Tokens of the texts, in equal parts, where nothing else is asked for."""

LENGTHS = (16, 64, 256)
"""Tokens of the texts whose latency is measured, where nothing else is asked for."""

CLIENTS = (1, 4, 16)
WARM_UP = 8
"""Texts that each measurement runs beforehand."""

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
"""What texts are made of: a token each in most vocabularies."""


@dataclass
class Measurement:
    """One line of the table.

    Attributes:
        kind: throughput, latency, batches or load.
        value: tokens of a text, texts of a request, clients, or texts a second; what the plot draws over.
        label: what the table says.
        source: makes the texts of a sample.
        texts: how many those are.
        size: texts of a request.
        clients: that wait for their answers.
        rate: texts a second that arrive, instead of clients that wait; 0 = none.
        samples: one for each round.
        limits: throughput on a CPU: seconds that the matrix products alone take, one for each round.
    """

    kind: str
    value: float
    label: str
    source: Source
    texts: int
    size: int = 1
    clients: int = 1
    rate: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def requests(self) -> list[list[str]]:
        """The requests of a sample."""
        texts = self.source()
        return [texts[i : i + self.size] for i in range(0, len(texts), self.size)]

    def run(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Add a sample."""
        if self.rate:
            seed = len(self.samples)
            sample = opened(ask, self.requests(), rate=self.rate, most=self.clients, seed=seed, progress=tell)
        else:
            sample = closed(ask, self.requests(), clients=self.clients, progress=tell)
        self.samples.append(sample)

    def figures(self) -> Figures:
        """What the JSON says. Rates are `None` without an answer, percentiles also for throughput."""
        import numpy as np

        samples = self.samples
        latencies = [x for own in samples for x in own.latencies]
        rates = {
            f"{what}_per_second": statistics.median(getattr(own, what) / own.seconds for own in samples)
            if latencies
            else None
            for what in ("texts", "tokens")
        }
        parts = [float(x) * 1000 for x in np.percentile(latencies, (50, 95, 99))] if latencies else []
        known = parts and self.kind != "throughput"
        errors = [error for own in samples for error in own.errors]
        found = {
            "kind": self.kind,
            "value": self.value,
            "label": self.label,
            "requests": len(latencies) + len(errors),
            "errors": len(errors),
            "texts": sum(own.texts for own in samples),
            "tokens": sum(own.tokens for own in samples),
            **rates,
            **{f"p{p}_ms": x if known else None for p, x in zip((50, 95, 99), parts or [0.0] * 3, strict=True)},
            "seconds": [own.seconds for own in samples],
        }
        if self.limits:
            ratios = [limit / own.seconds for limit, own in zip(self.limits, samples, strict=True)]
            found |= {"gemm_seconds": self.limits, "share_of_gemm_limit": statistics.median(ratios)}
        if errors:
            found["first_error"] = errors[0]
        return found


class Fit(NamedTuple):
    """How many words make how many tokens."""

    words: int
    tokens: int


class Texts:
    """Texts of wanted numbers of tokens, made of common words; new ones each time.

    Args:
        count: tokens of a text.
        choosy: use only words of equally many tokens, as most have; each is counted once.
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
        """A text of each size."""
        return [self._text(fit.words) for fit in fits]

    def fit(self, tokens: int) -> Fit | None:
        """The words that make `tokens` tokens, or as many as can be below; `None` if even one word makes more."""
        if tokens not in self._fits:
            self._fits[tokens] = self._search(tokens)
        return self._fits[tokens]

    def _search(self, tokens: int) -> Fit | None:
        one, three = self._line
        number = max(1, 1 + round(2 * (tokens - one) / max(1, three - one)))
        below: Fit | None = None
        for _ in range(TRIES):
            try:
                found = self._count(self._text(number))
            except CenoteError:  # too long
                found = tokens + 1
            if found == tokens:
                return Fit(number, found)
            if found < tokens:
                below = Fit(number, found)
            elif number == 1 or (below and below.words == number - 1):
                break
            number += 1 if found < tokens else -1
        return below

    @cached_property
    def _line(self) -> tuple[int, int]:
        """Tokens of one word and of three."""
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
    given = read_texts(Path(bench.texts)) if bench.texts else None
    if given == []:
        raise ConfigError(f"{bench.texts} has no texts")
    if bench.url:
        remote = Remote(bench.url, model.model, bench.task, bench.api_key)
        try:
            about = {"name": remote.name, "url": bench.url, "server_version": remote.version()}
            result = _measure(bench, given, remote)
        finally:
            remote.close()
    else:
        import torch

        from cenote.models.load import load
        from cenote.pipeline.pipeline import Service

        if engine.threads is not None:
            torch.set_num_threads(engine.threads)  # also for the GEMM limit, which is measured here
        pooling_model, checkpoint = load(model)
        service = Service.around(pooling_model, checkpoint, model, engine, max_queued=1 << 40)
        try:
            about = _about(service.info) | {"threads": torch.get_num_threads()}
            batch = engine.max_num_batched_tokens or DEFAULT_BATCH_TOKENS["cpu"]
            result = _measure(bench, given, Local(service, bench.task), pooling_model, batch)
        finally:
            service.engine.close()
    hidden = [word.replace(bench.api_key, "***") if bench.api_key else word for word in argv]
    options = bench.model_dump(exclude={"api_key"})
    result = _record(shlex.join(["cenote", *hidden])) | {"model": about, "options": options} | result
    print(table(result))
    if bench.save:
        Path(bench.save).write_text(json.dumps(result, indent=1) + "\n")
    if draw is not None and bench.plot:
        draw(result, table(result), Path(bench.plot))
    return 0


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
    bench: BenchConfig, given: list[str] | None, target: Target, model: PoolingModel | None = None, batch: int = 0
) -> Figures:
    """Warm up, measure in rounds, and return the figures.

    Args:
        bench: what.
        given: texts of the user's.
        target: of what.
        model: the one that is measured, if it is in this process.
        batch: tokens of its largest batches.
    """
    from tqdm import tqdm

    workload, groups = _workload(bench, given, target)
    plan = list(_plan(bench, workload, groups))
    gemm = None
    with tqdm(unit="text", disable=None, dynamic_ncols=True, desc="warm-up") as bar:
        bar.total = bench.rounds * sum(own.texts for own in plan)
        bar.total += sum(own.texts if own.kind == "throughput" else min(own.texts, WARM_UP * own.size) for own in plan)
        for own in plan:
            if own.kind == "throughput":
                gemm = _products(model, batch, partial(target.ask, own.source()))
                bar.update(own.texts)
                continue
            sample = closed(
                target.ask, own.requests()[:WARM_UP], clients=min(own.clients, WARM_UP), progress=bar.update
            )
            if sample.errors and not sample.texts:
                raise CenoteError(f"{own.label}: no request was answered: {sample.errors[0]}")
        for _ in range(bench.rounds):
            for own in plan:
                bar.set_description(own.label)
                if own.kind == "throughput" and gemm:
                    own.limits.append(gemm.seconds())
                own.run(target.ask, bar.update)
    rows = [own.figures() for own in plan]
    found: Figures = {"task": target.task, "measurements": rows}
    return found | ({"gemm": gemm.figures()} if gemm else {})


def _workload(bench: BenchConfig, given: list[str] | None, target: Target) -> tuple[Source, dict[int, Source]]:
    """The texts of a measurement, and those of a measurement of one length by the most tokens of a text.

    Raises:
        ConfigError: texts of the lengths wanted cannot be made.
    """
    if given:
        chosen = [given[i % len(given)] for i in range(bench.requests)]
        groups: dict[int, list[str]] = defaultdict(list)
        for text in chosen if "latency" in _kinds(bench) else ():
            groups[1 << (target.count(text) - 1).bit_length()].append(text)
        return lambda: chosen, {bound: partial(list, groups[bound]) for bound in sorted(groups)}
    texts = Texts(target.count, choosy=isinstance(target, Local))
    longest = target.longest or max(MIXED)
    for length in bench.input_len:
        if target.longest and length > target.longest:
            raise ConfigError(f"--input-len {length}: {target.name} reads at most {target.longest} tokens")
        if texts.fit(length) is None:
            raise ConfigError(f"--input-len {length}: for the task {target.task} even one word has more tokens")

    def fits(wanted: Seq[int]) -> list[Fit]:
        return [fit for n in wanted if (fit := texts.fit(min(n, longest)))]

    mixed = fits(bench.input_len or MIXED)
    if not mixed:
        raise ConfigError(f"{target.name} reads no text of up to {longest} tokens; see --input-len")
    order = [mixed[i % len(mixed)] for i in range(bench.requests)]
    random.Random(0).shuffle(order)
    lengths = dict.fromkeys(fits(bench.input_len or LENGTHS))
    return lambda: texts.of(order), {fit.tokens: partial(texts.of, [fit] * bench.requests) for fit in lengths}


def _kinds(bench: BenchConfig) -> tuple[str, ...]:
    return bench.measure or (("load",) if bench.url else ("throughput", "latency", "batches", "load"))


def _plan(
    bench: BenchConfig, workload: Callable[[], list[str]], groups: dict[int, Callable[[], list[str]]]
) -> Iterator[Measurement]:
    """The measurements, in order."""
    kinds, count = _kinds(bench), bench.requests
    if "throughput" in kinds:
        yield Measurement("throughput", count, "all texts, one request", workload, count, count)
    if "latency" in kinds:
        most = "up to " if bench.texts else ""
        for length, source in groups.items():
            yield Measurement("latency", length, f"one text of {most}{length} tokens", source, len(source()))
    if "batches" in kinds:
        for size in bench.batch_sizes:
            yield Measurement("batches", size, f"{size} texts a request", workload, count, size)
    if "load" not in kinds:
        return
    for rate in bench.rate:
        (under_way,) = bench.concurrency or (MOST_UNDER_WAY,)
        label = f"{rate:g} texts a second arrive"
        yield Measurement("load", rate, label, workload, count, clients=under_way, rate=rate)
    for clients in () if bench.rate else bench.concurrency or CLIENTS:
        label = f"{clients} client{'s' if clients > 1 else ''}"
        yield Measurement("load", clients, label, workload, count, clients=clients)


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
        """What they take now."""
        return self._costs.seconds(self.products, rows=self.rows, dtype=self._dtype)

    def figures(self) -> Figures:
        """What the JSON says."""
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
    """Where, when and with what."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {"cenote": cenote.__version__, **{name: metadata.version(name) for name in packages}},
    }


def machine() -> Figures:
    """Processor, cores, memory in GiB, system and Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if name in flags]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "instructions": sets,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


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
    """The figures, as lines of text."""
    rows = result["measurements"]
    cells = [["", *COLUMNS]]
    for row in rows:
        values = [(row[name], how) for name, how in COLUMNS.values()]
        cells.append([row["label"], *("-" if value is None else format(value, how) for value, how in values)])
    first = max(len(line[0]) for line in cells)
    widths = [max(len(line[i]) for line in cells) for i in range(1, len(cells[0]))]
    lines = [
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], widths, strict=True))])
        for line in cells
    ]
    options = result["options"]
    about = result["model"]
    if "url" in about:
        head = f"{about['name']} at {about['url']}"
    else:
        head = f"{about['name']} ({about['architecture']}), {about['dtype']} on {about['device']}, {about['layout']}"
        head += f", {about['threads']} thread{'s' if about['threads'] > 1 else ''}" if about["device"] == "cpu" else ""
    rounds = f"{options['rounds']} round{'s' if options['rounds'] > 1 else ''}"
    lines[:0] = [head, f"task {result['task']}, {options['requests']} texts of each kind a round, {rounds}"]
    for row in rows:
        if "share_of_gemm_limit" in row:
            lines.append(
                f"{row['share_of_gemm_limit']:.0%} of the GEMM limit: torch.nn.functional.linear takes "
                f"{statistics.median(row['gemm_seconds']):.2f} s for the products of the Linear layers, "
                f"all texts in one request {statistics.median(row['seconds']):.2f} s"
            )
        if row["errors"]:
            lines.append(f"{row['label']}: {row['errors']} of {row['requests']} failed, first: {row['first_error']}")
    return "\n".join(lines)
