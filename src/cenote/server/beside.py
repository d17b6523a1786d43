"""A second listener, whose thread, event loop and socket the load of the first one does not touch."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cenote.server import connections

if TYPE_CHECKING:
    from collections.abc import Iterator
    from socket import socket

    from cenote.server.app import Application
    from cenote.server.connections import Limits

log = logging.getLogger(__name__)


END = 5.0
"""Seconds that the thread has to end."""


@contextmanager
def beside(app: Application, listener: socket, limits: Limits) -> Iterator[None]:
    """Serve `app` on a thread of its own during the block.

    The thread ends before the interpreter does, which an event loop written in C would not survive.

    Args:
        app: see `Application.operations`.
        listener: bound to its address.
        limits: of its connections.
    """
    config = connections.configured(app, limits, access_log=False, lifespan="off")
    server = connections.Server(config)
    listener.listen(config.backlog)
    log.info("health and metrics on http://%s:%s", *listener.getsockname()[:2])
    thread = threading.Thread(target=server.run, args=([listener],), name="cenote-beside", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        thread.join(END)
