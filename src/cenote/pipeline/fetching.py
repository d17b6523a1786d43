"""Pictures behind `http:` and `https:` URLs: from allowed hosts alone, at the very addresses that were checked.

Every hop is checked anew: the URL, then each address that its host resolves to. A host is resolved once, and the
connection goes to that address, while TLS and the `Host` header keep the name. Proxies of the environment are not used.
"""

from __future__ import annotations

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from cenote.errors import BadRequest, Unfetched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from ipaddress import IPv6Address

    from httpcore import Response

PARAM = "image"
HOPS = 3
"""Redirects that are followed."""
PORTS = {"http": 80, "https": 443}
REDIRECTS = frozenset((301, 302, 303, 307, 308))
HEADERS = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "cenote")]
ANY = "*"

PLAIN = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]*[a-z0-9_-])(:(?P<port>[0-9]{1,5}))?([/?#][!-\[\]-~]*)?",
    re.IGNORECASE | re.ASCII,
)
"""URLs that all parsers read alike: no user, no backslash, blank or control character, no dot behind the host."""

EMBEDDED: tuple[tuple[IPv6Network, int | None], ...] = (
    (IPv6Network("::/127"), None),
    (IPv6Network("::/96"), 0),
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("2002::/16"), 80),
)
"""Networks whose addresses hold an IPv4 one, and the bits behind it."""
TRANSLATED_HERE = IPv6Network("64:ff9b:1::/48")
NEAR = tuple(map(ip_network, ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")))
"""Networks that are dialled where private addresses are allowed; where clouds serve their secrets is not among them."""
RESOLVERS = ThreadPoolExecutor(8, thread_name_prefix="cenote-resolve")
"""Threads that wait for the resolver, which takes no time limit."""


_arrived: ContextVar[Mapping[str, bytes] | None] = ContextVar("arrived", default=None)


class Unarrived(Exception):
    """Pictures behind URLs are to be fetched before a request can be rendered: an order, and not an error.

    Attributes:
        urls: of the pictures.
        fetch: returns the bytes behind one of them.
    """

    def __init__(self, urls: list[str], fetch: Callable[[str], bytes]) -> None:
        super().__init__(urls)
        self.urls = urls
        self.fetch = fetch


@contextmanager
def with_arrived(files: Mapping[str, bytes]) -> Iterator[None]:
    """Let nothing be fetched in this context: pictures behind URLs are in `files`, or `Unarrived` is raised."""
    token = _arrived.set(files)
    try:
        yield
    finally:
        _arrived.reset(token)


def arrived(sources: Iterable[Any], fetch: Callable[[str], bytes]) -> list[Any]:
    """Return `sources` with files in the places of the URLs that were fetched for this context.

    Raises:
        Unarrived: some were not, and nothing is fetched here.
    """
    files = _arrived.get()
    listed = list(sources)
    if files is None:
        return listed
    missing = sorted(set(filter(is_url, listed)) - files.keys())
    if missing:
        raise Unarrived(missing, fetch)
    return [files[source] if is_url(source) else source for source in listed]


def is_url(source: Any) -> bool:
    """Return whether a picture is named by an `http:` or `https:` URL."""
    return isinstance(source, str) and source[:16].partition(":")[0].lower() in PORTS


def resolved(host: str, port: int) -> list[str]:
    """Return the addresses of a host, by the system's resolver."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


@dataclass(frozen=True)
class Hosts:
    """Hosts from which pictures may be fetched, and how.

    Attributes:
        domains: names of hosts, with a port (`name:8080`) where it is not 80 or 443; `*` = all names; `None` = all
            names and ports.
        allows_private: also at private and loopback addresses; never at link-local ones, where clouds serve secrets.
        seconds: time of a fetch in all, redirects included.
        resolve: returns the addresses of a host and port.
    """

    domains: frozenset[str] | None = frozenset()
    allows_private: bool = False
    seconds: float = 10.0
    resolve: Callable[[str, int], list[str]] = resolved

    def check(self, url: str) -> None:
        """Raise `BadRequest` unless `url` is a plain one of an allowed host."""
        match = _plain(url)
        if match is None:
            raise BadRequest(
                f"got {url[:60]!r} for a picture; expected a plain http: or https: URL in ASCII, without a user, "
                "blanks or a dot behind its host",
                param=PARAM,
            )
        host = match["host"].strip("[]").lower()
        port = int(match["port"] or PORTS[match["scheme"].lower()])
        names = {f"{host}:{port}"}
        if port in PORTS.values():
            names |= {host, ANY}
        if self.domains is not None and names.isdisjoint(self.domains):
            raise BadRequest(
                f"pictures are not fetched from {host[:100]!r}, port {port}: --allowed-media-domains does not name it; "
                "send them as data: URLs, data:image/png;base64,...",
                param=PARAM,
            )

    def addresses(self, host: str, port: int, seconds: float) -> list[str]:
        """Return the addresses of a host, all of which may be dialled.

        Raises:
            BadRequest: one of them may not.
            Unfetched: there are none, or the resolver takes longer than `seconds`.
        """
        try:
            addresses = RESOLVERS.submit(self.resolve, host, port).result(timeout=seconds)
        except (OSError, UnicodeError) as error:  # a TimeoutError is an OSError
            raise Unfetched(f"the host {host[:100]!r} of a picture is not found", param=PARAM) from error
        may_dial = is_near if self.allows_private else is_public
        if not addresses or not all(may_dial(address) or is_public(address) for address in addresses):
            raise BadRequest(
                f"the host {host[:100]!r} of a picture is not at a public address (--allow-private-media)", param=PARAM
            )
        return addresses


def is_public(address: str) -> bool:
    """Return whether an address is an ordinary one of the internet; IPv4 inside IPv6 is judged as IPv4."""
    inner = _unwrapped(address)
    return inner.is_global and not inner.is_multicast and inner not in TRANSLATED_HERE


def is_near(address: str) -> bool:
    """Return whether an address is a private or loopback one, and not link-local, reserved or anything else."""
    inner = _unwrapped(address)
    return any(inner in network for network in NEAR)


def _unwrapped(address: str) -> IPv4Address | IPv6Address:
    """Return an address, or the IPv4 one inside."""
    parsed = ip_address(address.partition("%")[0])
    shift = next((shift for network, shift in EMBEDDED if parsed in network), None)
    return parsed if shift is None else IPv4Address((int(parsed) >> shift) & 0xFFFFFFFF)


def fetch(url: str, hosts: Hosts, limit: int) -> bytes:
    """Return the bytes behind a URL.

    Args:
        url: an `http:` or `https:` one.
        hosts: from which they may be fetched.
        limit: maximum bytes.

    Raises:
        BadRequest: the URL, or one that it redirects to, may not be fetched, or there are too many bytes.
        Unfetched: the host does not answer, not in time, or with an error.
    """
    try:
        import httpcore
    except ImportError:
        raise BadRequest(
            "pictures are not fetched from URLs, as httpx is not installed: pip install 'cenote[media]'", param=PARAM
        ) from None
    deadline = time.monotonic() + hosts.seconds
    failures = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpcore.UnsupportedProtocol)
    try:
        for _ in range(HOPS + 1):
            body = _hop(url, hosts, limit, deadline)
            if isinstance(body, bytes):
                return body
            url = body
    except failures as error:
        raise Unfetched(f"a picture cannot be fetched ({type(error).__name__})", param=PARAM) from error
    raise BadRequest(f"the URL of a picture redirects more than {HOPS} times", param=PARAM)


def _hop(url: str, hosts: Hosts, limit: int, deadline: float) -> bytes | str:
    """Return the bytes behind a URL, or the URL that it redirects to."""
    import httpcore

    from cenote.pipeline.dialling import Pinned

    hosts.check(url)
    with (
        httpcore.ConnectionPool(network_backend=Pinned(hosts.addresses, deadline)) as pool,
        pool.stream("GET", url, headers=HEADERS) as response,
    ):
        headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in REDIRECTS and b"location" in headers:
            return _joined(url, headers[b"location"])
        if response.status != 200:
            raise Unfetched(f"a picture cannot be fetched: its host answers {response.status}", param=PARAM)
        return _body(response, limit)


def _body(response: Response, limit: int) -> bytes:
    """Return the body of an answer.

    Raises:
        BadRequest: it has more than `limit` bytes.
    """
    body = bytearray()
    chunks: Iterable[Any] = response.iter_stream()
    for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise BadRequest(f"a picture behind a URL has more than {limit} bytes", param=PARAM)
    return bytes(body)


def _plain(url: str) -> re.Match[str] | None:
    """Return the parts of a plain URL; `None` for all others, also with a port or an IPv6 address that there is not."""
    try:
        int(urlsplit(url).port or 0)
    except ValueError:
        return None
    return PLAIN.fullmatch(url)


def _joined(url: str, location: str) -> str:
    """Return the URL of a redirect, also where it is broken, which `Hosts.check` tells."""
    try:
        return urljoin(url, location)
    except ValueError:
        return location
