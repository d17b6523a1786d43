"""Where a server listens: an address or a Unix socket, by HTTP or HTTPS, and the port of its metrics."""

from __future__ import annotations

import socket
import ssl
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cenote.errors import ConfigError

if TYPE_CHECKING:
    from cenote.config import ServerConfig


def bound(server: ServerConfig) -> list[socket.socket]:
    """Take the server's addresses, before the model is loaded, so that a port in use is told at once.

    Raises:
        ConfigError: one cannot be taken, or the certificate cannot be read.
    """
    _check_certificates(server)
    with ExitStack() as opened:
        listeners = [opened.enter_context(_listener(server))]
        if server.metrics_port is not None:
            listeners.append(opened.enter_context(_bound(server.host, server.metrics_port)))
        opened.pop_all()
    return listeners


def _listener(server: ServerConfig) -> socket.socket:
    if server.uds is None:
        return _bound(server.host, server.port)
    from cenote.engine.host import listening_at

    return listening_at(Path(server.uds))


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def certificates(server: ServerConfig) -> dict[str, Any]:
    """Return uvicorn's settings of HTTPS; none if there is no certificate."""
    if server.ssl_certfile is None:
        return {}
    files = {"ssl_certfile": server.ssl_certfile, "ssl_keyfile": server.ssl_keyfile}
    if server.ssl_ca_certs is None:
        return files
    return {**files, "ssl_ca_certs": server.ssl_ca_certs, "ssl_cert_reqs": ssl.CERT_REQUIRED}


def _check_certificates(server: ServerConfig) -> None:
    """Raise `ConfigError` for files of HTTPS that cannot be read, or do not belong together."""
    if server.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile)
        if server.ssl_ca_certs is not None:
            context.load_verify_locations(server.ssl_ca_certs)
    except OSError as error:  # also ssl.SSLError
        raise ConfigError(f"the files of HTTPS cannot be used: {error.strerror or error}") from error


def address(listener: socket.socket, server: ServerConfig) -> str:
    """Return the address of a listener, as a URL begins."""
    scheme = "http" if server.ssl_certfile is None else "https"
    if server.uds is not None:
        return f"{scheme} on {server.uds}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{host}:{port}"
