"""`cenote serve`: resolve, load, report, listen."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import cenote
from cenote.config import EngineConfig, ModelConfig, ServerConfig, resolve
from cenote.errors import CenoteError, ConfigError

if TYPE_CHECKING:
    from cenote.service import Service

log = logging.getLogger("cenote")


def run(arguments: dict[str, Any]) -> int:
    """Run the command that `cenote.cli.flags.parse` understood."""
    command = arguments.pop("command")
    if command == "version":
        print(cenote.__version__)
    elif command == "serve":
        _serve(arguments)
    return 0


def _serve(arguments: dict[str, Any]) -> None:
    began = time.monotonic()
    (model, engine, server), notes = resolve(arguments)
    assert isinstance(model, ModelConfig)
    assert isinstance(engine, EngineConfig)
    assert isinstance(server, ServerConfig)
    logging.basicConfig(level=server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for note in notes:
        log.info(note)

    import uvicorn

    from cenote.server.app import build
    from cenote.service import Service

    listener = _bind(server)
    try:
        service = Service.load(model, engine)
    except CenoteError:
        listener.close()
        raise
    for line in report(service, engine, server):
        log.info(line)
    config = uvicorn.Config(
        build([service], server),
        log_config=None,
        log_level=server.log_level,
        access_log=server.log_level == "debug",
        timeout_keep_alive=75,
    )
    listener.listen(config.backlog)  # who reads the line below may connect at once
    port = listener.getsockname()[1]
    log.info("serving http://%s:%s, %.1f s after start", server.host, port, time.monotonic() - began)
    # uvicorn shuts down in order and then raises the signal again; by default that would be the exit status.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.Server(config).run(sockets=[listener])


def _bind(server: ServerConfig) -> socket.socket:
    """The server's address, taken before the model is loaded, so that a port in use is told at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {server.host}:{server.port}: {error.strerror or error}") from error
    return listener


def report(service: Service, engine: EngineConfig, server: ServerConfig) -> list[str]:
    """What was resolved, a line each, and what a user would want to be warned of."""
    info = service.info
    revision = f" at revision {info.revision}" if info.revision else ""
    activation = "normalised" if info.use_activation else "not normalised"
    lines = [
        f"model: {info.name}{revision} ({info.architecture}), served as {', '.join(service.names)}",
        f"runs: {info.dtype} on {info.device}, {info.layout}",
        f"tasks: {', '.join(info.tasks)}; default {info.default_task}",
        f"pooling: {info.pooling}, {activation}, dimension {info.dimension}"
        + (f", Matryoshka {list(info.matryoshka) or 'any'}" if info.matryoshka is not None else ""),
        f"limits: {info.max_model_len} tokens an input, {server.max_client_batch_size} inputs and "
        f"{server.max_body_bytes} bytes a request, {engine.max_queued_seqs} inputs waiting",
    ]
    if service.renderer.default_prompt:
        lines.append(f"prompt before every input: {service.renderer.default_prompt!r}")
    if server.host not in ("127.0.0.1", "localhost", "::1") and not server.api_key:
        lines.append(f"warning: {server.host} may be reached by others, and no --api-key is set")
    return lines + [f"warning: {warning}" for warning in info.warnings]
