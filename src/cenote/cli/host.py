"""`cenote engine`: load a model and run it for servers in other processes, until the process is told to end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from cenote import signals
from cenote.cli.garbage import collections_by_the_clock, no_full_collections
from cenote.cli.serve import log_to_stderr, report, share_cores
from cenote.config import EngineConfig, HostConfig, ModelConfig, ServerConfig, time_of_requests
from cenote.errors import ConfigError
from cenote.settings import resolve

if TYPE_CHECKING:
    from cenote.engine.host import Host

log = logging.getLogger("cenote")


def run(arguments: dict[str, Any]) -> int:
    """Run the command, with the options that `cenote.cli.flags.parse` understood."""
    began = time.monotonic()
    # Variables and files that are shared with servers may hold their options, too.
    (model, engine, _, options), notes = resolve(arguments, (ModelConfig, EngineConfig, ServerConfig, HostConfig))
    assert isinstance(model, ModelConfig)
    assert isinstance(engine, EngineConfig)
    assert isinstance(options, HostConfig)
    if not options.listen:
        raise ConfigError("an engine needs a socket; name its path with --listen PATH")
    if model.io_processor_plugin is not None:
        raise ConfigError("io_processor_plugin has no effect here: plugins run in the server's process, with the model")
    log_to_stderr(options.log_level, notes, options.log_format)
    share_cores()
    with no_full_collections():
        host = _start(model, engine, options)
    ended = threading.Event()
    defaults = {number: signal.signal(number, lambda *_: ended.set()) for number in signals.heard()}
    log.info("listening on %s, %.1f s after start", options.listen, time.monotonic() - began)
    with collections_by_the_clock():
        host.wait(ended)
    for number, default in defaults.items():  # a second signal ends the process at once
        signal.signal(number, default)
    if not host.close(time_of_requests(options.shutdown_timeout)):
        logging.shutdown()
        os._exit(1)
    return 0


def _start(model: ModelConfig, engine: EngineConfig, options: HostConfig) -> Host:
    from cenote.engine.host import Host, check_path
    from cenote.pipeline.pipeline import Service

    check_path(options.listen)  # before the model is loaded
    service = Service.open(model, engine)
    for line in report(service):
        log.info(line)
    if service.plugin is not None:
        log.warning("requests with `data` are refused: plugin %s needs the model in its process", service.plugin.name)
    assert service.facts is not None
    try:
        return Host(service.engine, options.listen, service.facts.plain())
    except ConfigError:
        service.engine.close()
        raise
