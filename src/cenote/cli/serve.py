"""`cenote serve`: resolve, load, report, listen."""

from __future__ import annotations

import logging
import os
import textwrap
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote import tokenizer
from cenote.cli.flags import OF_ENGINES
from cenote.cli.garbage import collections_by_the_clock, no_full_collections
from cenote.cli.lines import set_format
from cenote.cli.listening import address, bound, certificates
from cenote.cli.logs import Writer
from cenote.config import EngineConfig, ModelConfig, ServerConfig, time_of_requests
from cenote.core import Similarity
from cenote.errors import ConfigError, plural
from cenote.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pydantic import BaseModel

    from cenote.config import LogFormat
    from cenote.core import ModelInfo, Report
    from cenote.pipeline.pipeline import Service
    from cenote.pipeline.prompts import Prompts
    from cenote.server.connections import Limits

log = logging.getLogger("cenote")

LONG = 300
"""Most characters of a line about a checkpoint's files."""
MANY_REQUESTS = 200
"""Requests under way with which a server puts off what stops it for the longer the more there are."""
ANY_NAME = "*"
"""As a served name: `any_model_name`."""
OF_FASTDEPLOY = {"engine_worker_queue_port", "cache_queue_port", "graph_optimization_config", "load_choices"}
"""Options of FastDeploy alone, whose servers answer to any name."""


def run(arguments: dict[str, Any]) -> int:
    """Serve until a signal, with the options that `cenote.cli.flags.parse` understood, and return the exit status."""
    began = time.monotonic()
    arguments = _with_any_name(arguments)
    plan = _remote_models(arguments) if arguments.get("engine") else _local_models(arguments)
    server = plan.server
    log_to_stderr(server.log_level, plan.notes, server.log_format)
    share_cores()
    with no_full_collections():
        if plan.engine is None:
            tokenizer.import_without_torch()
        from cenote.server.app import build
        from cenote.server.beside import beside
        from cenote.server.connections import configured
        from cenote.server.ending import Server, ignore_signals

        services: list[Service] = []
        with ExitStack() as opened:
            listener, *others = map(opened.enter_context, bound(server))
            for source in plan.sources:
                service = source()
                opened.callback(service.engine.close)
                services.append(service)
                _log_all(report(service))
            opened.pop_all()  # all of them serve from now on
        _log_all(limits(plan.engine, server))
        app = build(services, server)
        allowed = _connections(server)
        config = configured(
            app,
            allowed,
            log_level=server.log_level,
            access_log=server.log_level == "debug",
            **certificates(server),
        )
    listener.listen(config.backlog)  # a reader of the line below may connect at once
    with ExitStack() as running:
        running.enter_context(collections_by_the_clock(is_busy=lambda: app.under_way.count > MANY_REQUESTS))
        for other in others:
            running.enter_context(beside(app.operations(), other, allowed))
        running.callback(ignore_signals)  # so that a late one does not change the exit status
        web = Server(config, app, time_of_requests(server.shutdown_timeout))
        web.take_signals()
        log.info("serving %s, %.1f s after start", address(listener, server), time.monotonic() - began)
        web.run(sockets=[listener])
    return web.status


def _with_any_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the name that stands for all as an option of its own."""
    names = _names(arguments.get("served_model_name"))
    if ANY_NAME not in names and OF_FASTDEPLOY.isdisjoint(arguments):
        return arguments
    real = tuple(name for name in names if name != ANY_NAME)
    return {"any_model_name": True, **arguments, "served_model_name": real}


def _names(names: Sequence[str] | None) -> Sequence[str]:
    """Return the served names of the command line, or of an environment variable with commas between them."""
    return names.split(",") if isinstance(names, str) else names or ()


def _connections(server: ServerConfig) -> Limits:
    """Return the limits of connections, and warn of a system that allows fewer."""
    from cenote.server.connections import Limits, descriptors

    limits = Limits.of(server, descriptors())
    if limits.connections < server.max_connections:
        log.warning(
            "max_connections is %d, and not %d: the system allows this process too few open files (ulimit -n)",
            limits.connections,
            server.max_connections,
        )
    return limits


def log_to_stderr(level: str, notes: Iterable[str], kind: LogFormat = "text") -> None:
    """Log from now on, beginning with `notes`."""
    logging.basicConfig(level=level.upper(), handlers=[Writer()])
    set_format(kind)
    for name in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _log_all(notes)


def _log_all(lines: Iterable[str]) -> None:
    for line in lines:
        log.info(line)


class _Plan(NamedTuple):
    """A server to start.

    Attributes:
        sources: each loads a model, or connects to one.
        engine: options of the engines in this process; `None` = they are in others.
        notes: on options without effect.
    """

    server: ServerConfig
    sources: Sequence[Callable[[], Service]]
    engine: EngineConfig | None
    notes: list[str]


def _local_models(arguments: dict[str, Any]) -> _Plan:
    from cenote.pipeline.pipeline import Service

    configs, notes = models_of(arguments)
    _, engine, server = configs[0]
    return _Plan(server, [partial(Service.open, model, engine) for model, *_ in configs], engine, notes)


def _remote_models(arguments: dict[str, Any]) -> _Plan:
    from cenote.pipeline.pipeline import Service

    model, server, notes = engines_of(arguments)
    names: list[tuple[str, ...]] = [(name,) for name in model.served_model_name]
    sources = [
        partial(Service.connect, path, names=served, trust_remote_code=model.trust_remote_code)
        for path, served in zip(server.engine, names or [()] * len(server.engine), strict=True)
    ]
    return _Plan(server, sources, None, notes)


def engines_of(arguments: dict[str, Any]) -> tuple[ModelConfig, ServerConfig, list[str]]:
    """Return the options of a server in front of engines, and notes on options without effect.

    Raises:
        ConfigError: an option of the model or the engine is given, or there are not as many names as engines.
    """
    idle = OF_ENGINES & arguments.keys()
    if idle:
        raise ConfigError(
            f"{min(idle)} has no effect with --engine: each engine was started with a model and options of its own"
        )
    layers, notes = resolve(arguments)
    model, _, server = _layers(layers)
    names = model.served_model_name
    if names and len(names) != len(server.engine):
        raise ConfigError(f"{len(server.engine)} engines need as many names: --served-model-name gives {len(names)}")
    return model, server, notes


def share_cores() -> None:
    """Let threads that wait for long sleep. Call it before torch is imported; variables that the user has set stay.

    OpenMP's threads spin while they wait for each other. Within a forward that saves waking them at every layer, half
    the time of a short one, and from one forward to the next if it comes at once. Longer they would keep others from
    the cores: the event loop, and other processes.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "200000")  # milliseconds
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def models_of(arguments: dict[str, Any]) -> tuple[list[tuple[ModelConfig, EngineConfig, ServerConfig]], list[str]]:
    """Return the configs of each model of `arguments`, and notes on options without effect.

    Raises:
        ConfigError: an option is wrong, or there are not as many served names as models.
    """
    models = arguments.pop("models", None)
    if models is None:
        layers, notes = resolve(arguments)
        return [_layers(layers)], notes
    names = _names(arguments.pop("served_model_name", None)) or models
    if len(names) != len(models):
        raise ConfigError(f"{len(models)} models need as many names: --served-model-name gives {len(names)}")
    repeated = Counter(names) - Counter(set(names))
    if repeated:
        raise ConfigError(f"two models cannot both be served as {min(repeated)!r}; see --served-model-name")
    configs = []
    for folder, name in zip(models, names, strict=True):
        layers, notes = resolve({**arguments, "model": folder, "served_model_name": (name,)})
        model, engine, server = _layers(layers)
        configs.append((_with_own_adapters(model, names), engine, server))
    return configs, notes


def _with_own_adapters(model: ModelConfig, names: Sequence[str]) -> ModelConfig:
    """Return the options of one of several models with the adapters that name it alone.

    Raises:
        ConfigError: an adapter names none of them.
    """
    bases = set(map(attrgetter("base_model_name"), model.lora_modules))
    if not bases <= set(names):
        raise ConfigError(
            f"an adapter changes one of {', '.join(names)}, got the base_model_name {min(bases, key=str)!r}; "
            "--lora-modules takes JSON"
        )
    modules = tuple(filter(lambda module: module.base_model_name in model.served_model_name, model.lora_modules))
    return model.model_copy(update={"lora_modules": modules})


def _layers(layers: list[BaseModel]) -> tuple[ModelConfig, EngineConfig, ServerConfig]:
    model, engine, server = layers
    assert isinstance(model, ModelConfig)
    assert isinstance(engine, EngineConfig)
    assert isinstance(server, ServerConfig)
    return model, engine, server


def report(service: Service) -> list[str]:
    """Return how a model was understood, runs and is served, a line each, and its warnings."""
    info = service.info
    lines = [_source(service), _running(info)]
    if info.report.linears:
        lines.append(f"Linear layers: {info.report.linears}")
    lines += [f"tasks: {', '.join(info.tasks)}; default {info.default_task}", _pooling(info)]
    if info.report.head:
        lines.append(_head(info))
    if info.score_types:
        lines.append(_scoring(info))
    if service.pair_template:
        source = service.pair_template.source or "the checkpoint's chat template"
        lines.append(f"pairs are rendered by: {source[:200]!r}{'...' if len(source) > 200 else ''}")
    if service.plugin:
        lines.append(f"requests with `data` go to the plugin {service.plugin.name}")
    if service.ranges:
        lines.append("int8 and uint8 embeddings: by calibrated ranges")
    lines += _prompting(service.renderer.prompts)
    lines += map(_adapter, service.views[1:])
    lines += _files(info.report)
    return lines + [f"warning: {warning}" for warning in info.report.warnings]


def _files(report: Report) -> list[str]:
    """Return the lines about entries of the checkpoint's files, cut; `cenote info` shows them in full."""
    lists = (("read of the checkpoint", report.used), ("left, without effect", report.left))
    return [f"{title}: {textwrap.shorten('; '.join(map(str, entries)), LONG)}" for title, entries in lists if entries]


def _adapter(service: Service) -> str:
    return f"adapter {service.adapter}: {service.root}, by the name of the model"


def _source(service: Service) -> str:
    info = service.info
    revision = f" at revision {info.report.revision}" if info.report.revision else ""
    kind = f"{info.architecture}, {info.report.family}" if info.report.family else info.architecture
    return f"model: {info.report.source}{revision} ({kind}), served as {', '.join(service.names)}"


def _running(info: ModelInfo) -> str:
    report = info.report
    clauses = [f"{report.dtype} on {report.device}", report.layout]
    if report.streams > 1:
        clauses.append(f"{report.streams} batches at a time")
    if report.shares_prefixes:
        clauses.append("common prefixes once")
    clauses += filter(None, [report.company])
    length = f"{info.max_model_len} tokens an input"
    if info.limit("embed") > info.max_model_len:
        length += ", embed takes longer ones in blocks"
    return f"runs: {', '.join(clauses)}; {length}"


def _pooling(info: ModelInfo) -> str:
    activation = "normalised" if info.use_activation else "not normalised"
    line = f"pooling: {info.report.pooling}, {activation}, dimension {info.dimension}"
    if info.report.token_dimension not in (0, info.dimension):
        line += f" ({info.report.token_dimension} for each token)"
    if info.matryoshka is None:
        return line
    return f"{line}, Matryoshka {list(info.matryoshka) or 'any'}"


def _head(info: ModelInfo) -> str:
    line = f"head: {info.report.head}"
    if not info.num_labels:
        return line
    labels = f"{info.num_labels} {plural('label', info.num_labels)}"
    activation = info.activation if info.classifies else f"raw ({info.activation} on request)"
    steps = ", one row per step" if info.step else ""
    return f"{line}; {labels}, {activation}{steps}"


def _scoring(info: ModelInfo) -> str:
    usual = asdict(replace(Similarity(), is_apart=info.similarity.is_apart))
    unusual = [f"; {kind} by {name}" for kind, name in asdict(info.similarity).items() if name != usual[kind]]
    return f"scores pairs as: {', '.join(info.score_types)}{''.join(unusual)}"


def _prompting(prompts: Prompts) -> list[str]:
    """Return the lines about prompts, and about the adapters that prompts may choose."""
    default = prompts.choose()
    lines = []
    if prompts.named:
        lines.append(f"prompts: {', '.join(sorted(prompts.named))}")
    if prompts.adapters:
        lines.append(f"adapters: {', '.join(prompts.adapters)}; default {default.adapter or 'none'}")
    if default.text:
        lines.append(f"prompt before every input: {default.text!r}")
    return lines


def limits(engine: EngineConfig | None, server: ServerConfig) -> list[str]:
    """Return the limits of requests, and a warning if strangers may send some.

    Args:
        engine: options of the engine; `None` = it runs in another process, with options of its own.
        server: options of the server.
    """
    line = f"limits: {server.max_client_batch_size} inputs and {server.max_body_bytes} bytes a request"
    line += f", {server.max_waiting_time:g} s of waiting"
    lines = [line if engine is None else f"{line}, {engine.max_queued_seqs} inputs waiting"]
    if server.host not in ("127.0.0.1", "localhost", "::1") and not server.api_key:
        lines.append(f"warning: {server.host} may be reached by others, and no --api-key is set")
    return lines
