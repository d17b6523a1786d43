"""`cenote bench`: texts a second of a model or a running server, and the latency of a text.

Everything is measured in rounds: in each, every measurement is made once, so that other work of the machine meets all
alike. Rates are medians over the rounds; percentiles are over the requests of all rounds.
"""

from __future__ import annotations

import json
import random
import shlex
from collections import defaultdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cenote.cli.load import MOST_UNDER_WAY
from cenote.cli.measurements import Arrivals, Measurement, Throughput, products_of
from cenote.cli.record import counted, record, table
from cenote.cli.targets import Local, Remote
from cenote.cli.texts import Texts
from cenote.config import BenchConfig, EngineConfig, ModelConfig, ServerConfig
from cenote.core import UNLIMITED
from cenote.errors import ConfigError
from cenote.pipeline.calibration import read_texts
from cenote.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as Seq

    from cenote.cli.measurements import Figures, Products, Source
    from cenote.cli.targets import Target
    from cenote.core import ModelInfo
    from cenote.models.model import PoolingModel

MIXED = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256)
"""Tokens of the texts, in equal parts, without `input_len`."""

LENGTHS = (16, 64, 256)
"""Tokens of the texts whose latency is measured, without `input_len`."""

CLIENTS = (1, 4, 16)


def run(arguments: dict[str, Any], argv: Seq[str]) -> int:
    """Run the command: measure, print the table, write the files.

    Args:
        arguments: options, as `cenote.cli.flags.parse` understood `argv`.
        argv: for the record.

    Raises:
        CenoteError: an option is wrong, the model cannot be loaded, the server not be reached, or nothing is answered.
    """
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
    result = record(_command(argv, bench.api_key)) | {"model": about, "options": options} | figures
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
        batch = service.info.report.batch_tokens
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
    plan = list(_plan(bench, workload, groups, partial(products_of, model, batch)))
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
            yield Measurement("load", clients, counted(clients, "client"), workload, count, clients=clients)
        return
    (under_way,) = bench.concurrency or (MOST_UNDER_WAY,)
    for rate in bench.rate:
        label = f"{rate:g} texts a second arrive"
        yield Arrivals("load", rate, label, workload, count, clients=under_way, rate=rate)
