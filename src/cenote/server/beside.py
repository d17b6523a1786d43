"""A second listener, whose thread, event loop and socket the load of the first one does not touch."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from socket import socket

    from cenote.server.app import Application

log = logging.getLogger(__name__)


def listen_beside(app: Application, listener: socket) -> None:
    """Serve `app` on a thread of its own, as long as the process lives.

    Args:
        app: see `Application.operations`.
        listener: bound to its address.
    """
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75)
    server = uvicorn.Server(config)
    listener.listen(config.backlog)
    log.info("health and metrics on http://%s:%s", *listener.getsockname()[:2])
    threading.Thread(target=server.run, args=([listener],), name="cenote-beside", daemon=True).start()
