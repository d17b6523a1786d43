"""Pictures behind URLs: allowed hosts, checked addresses, limits. The server is on loopback, the resolver is a fake."""

from __future__ import annotations

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from cenote.errors import BadRequest, Unfetched
from cenote.pipeline import media
from cenote.pipeline.fetching import Hosts, fetch, is_near, is_public, resolved
from cenote.pipeline.media import Access, picture
from tests import PATIENCE
from tests.pictured import noise, saved

if TYPE_CHECKING:
    from collections.abc import Iterator

A = noise(60, 40)
FILE = saved(A)
NAMES = {
    "good.test": ["127.0.0.1"],
    "mixed.test": ["8.8.8.8", "127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "nowhere.test": [],
}
MOST = 1 << 20


class Pages(BaseHTTPRequestHandler):
    """Answers with a picture, and with what servers do that are broken or mean."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"], self.headers["Accept-Encoding"]))  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # clients hang up
            kind, _, rest = self.path[1:].partition("?")
            getattr(self, kind)(rest)

    def head(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def picture(self, _: str) -> None:
        self.head(Content_Length=str(len(FILE)))
        self.wfile.write(FILE)

    def together(self, rest: str) -> None:
        self.server.meeting.wait(PATIENCE)  # type: ignore[attr-defined]
        self.picture(rest)

    def to(self, target: str) -> None:
        self.head(302, Location=target)

    def loop(self, _: str) -> None:
        self.head(307, Location="/loop")

    def missing(self, _: str) -> None:
        self.head(404)

    def drip(self, _: str) -> None:
        self.head()
        self.slowly()

    def slow_head(self, _: str) -> None:
        self.slowly()

    def slowly(self) -> None:
        for _ in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def endless(self, _: str) -> None:
        self.head()
        for _ in range(2000):
            self.wfile.write(b"x" * 65536)

    def half(self, _: str) -> None:
        self.head(Content_Length=str(2 * len(FILE)))
        self.wfile.write(FILE)


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.asked = []  # type: ignore[attr-defined]
    server.meeting = threading.Barrier(3)  # type: ignore[attr-defined]
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def base(server: ThreadingHTTPServer) -> str:
    return f"http://good.test:{server.server_port}"


class Resolver:
    """Knows the hosts of the tests, and leaves addresses to the system."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return NAMES[host] if host in NAMES else resolved(host, port)


def hosts(base: str, *more: str, private: bool = True, seconds: float = PATIENCE) -> Hosts:
    """The loopback server is allowed, and others by name."""
    return Hosts(frozenset({base.removeprefix("http://"), *more}), private, seconds, Resolver())


def test_a_picture(base: str, server: ThreadingHTTPServer) -> None:
    allowed = hosts(base)
    assert fetch(f"{base}/picture", allowed, MOST) == FILE
    assert allowed.resolve.asked == ["good.test"], "resolved once"  # type: ignore[attr-defined]
    assert server.asked[-1] == ("/picture", base.removeprefix("http://"), "identity")  # type: ignore[attr-defined]
    assert fetch(f"{base}/to?/picture", allowed, MOST) == FILE
    assert fetch(f"{base}/to?{base}/to?/picture", allowed, MOST) == FILE
    opened = picture(f"{base}/picture", Access(hosts=allowed))
    assert opened.decoded().tobytes() == A.tobytes()


def test_the_address_that_was_checked_is_dialled(base: str) -> None:
    """A name that changes its address between two look-ups is looked up once."""
    answers = iter((["127.0.0.1"], ["169.254.169.254"]))
    allowed = Hosts(frozenset({base.removeprefix("http://")}), True, 5.0, lambda *_: next(answers))
    assert fetch(f"{base}/picture", allowed, MOST) == FILE
    with pytest.raises(BadRequest, match="not at a public address"):
        fetch(f"{base}/picture", allowed, MOST)


def test_the_next_address_is_dialled_where_the_first_does_not_answer(base: str) -> None:
    allowed = Hosts(frozenset({base.removeprefix("http://")}), True, 5.0, lambda *_: ["127.0.0.9", "127.0.0.1"])
    assert fetch(f"{base}/picture", allowed, MOST) == FILE


REDIRECTS = {
    "to the addresses of a cloud": ("http://169.254.169.254/latest", "not at a public address"),
    "to a name with such an address": ("http://metadata.test/latest", "not at a public address"),
    "to another port": ("http://good.test:22/", "does not name it"),
    "to a file": ("file:///etc/passwd", "expected a plain http"),
    "to nothing": ("http://[", "expected a plain http"),
}


@pytest.mark.parametrize("name", REDIRECTS)
def test_every_redirect_is_checked(base: str, name: str) -> None:
    target, expected = REDIRECTS[name]
    with pytest.raises(BadRequest, match=expected):
        fetch(f"{base}/to?{target}", hosts(base, "*"), MOST)


def test_redirects_to_other_domains_and_in_circles(base: str) -> None:
    with pytest.raises(BadRequest, match="does not name it"):
        fetch(f"{base}/to?http://mixed.test/", hosts(base), MOST)
    with pytest.raises(BadRequest, match="more than 3 times"):
        fetch(f"{base}/loop", hosts(base), MOST)


URLS = {
    "a private name": ("http://good.test/", "not at a public address"),
    "a public and a private address": ("http://mixed.test/", "not at a public address"),
    "loopback": ("http://127.0.0.1/", "not at a public address"),
    "decimal": ("http://2130706433/", "not at a public address"),
    "hexadecimal": ("http://0x7f.1/", "not at a public address"),
    "octal": ("http://0177.0.0.1/", "not at a public address"),
    "IPv4 in IPv6": ("http://[::ffff:127.0.0.1]/", "not at a public address"),
    "IPv6 loopback": ("http://[::1]/", "not at a public address"),
    "a backslash": ("http://127.0.0.1\\@8.8.8.8/", "expected a plain http"),
    "a user": ("http://8.8.8.8@127.0.0.1/", "expected a plain http"),
    "a dot behind": ("http://localhost./", "expected a plain http"),
    "a line break": ("http://good.test/\r\nX: y", "expected a plain http"),
    "other letters": ("http://g\u00f6\u00f6d.test/", "expected a plain http"),
    "a wrong port": ("http://good.test:99999/", "expected a plain http"),
    "a wrong IPv6 address": ("http://[1:2]/", "expected a plain http"),
    "a user with a port": ("http://good.test:80@127.0.0.1/", "expected a plain http"),
    "another scheme": ("ftp://good.test/", "expected a plain http"),
    "another port": ("http://good.test:22/", "does not name it"),
    "no address": ("http://nowhere.test/", "not at a public address"),
}


@pytest.mark.parametrize("name", URLS)
def test_urls_that_are_refused(base: str, name: str) -> None:
    url, expected = URLS[name]
    with pytest.raises(BadRequest, match=expected):
        fetch(url, hosts(base, "*", private=False), MOST)


def test_a_fetch_is_bounded_in_time_and_bytes(base: str) -> None:
    for path in ("drip", "slow_head"):
        with pytest.raises(Unfetched) as raised:
            fetch(f"{base}/{path}", hosts(base, seconds=0.5), MOST)
        assert raised.value.status == 422
    with pytest.raises(BadRequest, match=f"more than {MOST} bytes"):
        fetch(f"{base}/endless", hosts(base), MOST)


def test_the_pictures_of_a_prompt_are_fetched_together(base: str) -> None:
    access = Access(hosts=hosts(base))
    url = f"{base}/together"  # answers when three have asked
    opened = media.pictures([url, FILE, url, url], access)
    assert {one.key for one in opened} == {picture(FILE, access).key}
    with pytest.raises(Unfetched, match="answers 404"):
        media.pictures([FILE, f"{base}/missing", b"no picture"], access)


def test_a_resolver_that_hangs(base: str) -> None:
    ended = threading.Event()

    def hanging(host: str, port: int) -> list[str]:
        ended.wait(PATIENCE)
        return ["127.0.0.1"]

    with pytest.raises(Unfetched, match="not found"):
        fetch(base, Hosts(None, True, 0.2, hanging), MOST)
    ended.set()


def test_failures_of_the_host(base: str) -> None:
    with pytest.raises(Unfetched, match="RemoteProtocolError"):
        fetch(f"{base}/half", hosts(base), MOST)
    with pytest.raises(Unfetched, match="answers 404"):
        fetch(f"{base}/missing", hosts(base), MOST)
    with pytest.raises(Unfetched, match="cannot be fetched"):
        fetch("http://good.test:9/", hosts(base, "good.test:9"), MOST)
    with pytest.raises(Unfetched, match="cannot be fetched"):
        fetch(base.replace("http:", "https:"), hosts(base), MOST)


def test_nothing_is_fetched_unless_a_domain_is_allowed(base: str) -> None:
    with pytest.raises(BadRequest, match="not fetched"):
        picture(f"{base}/picture", Access())


def test_callers_of_the_library_fetch_what_they_name_within_the_limits(server: ThreadingHTTPServer) -> None:
    local = f"http://127.0.0.1:{server.server_port}"
    assert picture(f"{local}/picture", Access(any_file=True)).decoded().tobytes() == A.tobytes()
    small = Access(any_file=True, limits=media.Limits(file_bytes=100))
    with pytest.raises(BadRequest, match="more than 100 bytes"):
        picture(f"{local}/picture", small)


PUBLIC = ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")
NEAR = (
    "127.0.0.1",
    "10.0.0.1",
    "::1",
    "fd00::1",
    "::ffff:127.0.0.1",
    "::127.0.0.1",
    "2002:7f00:1::",
    "64:ff9b::7f00:1",
)
NEITHER = (
    "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "::", "fe80::1%eth0", "ff02::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2", "64:ff9b:1::1", "::ffff:169.254.169.254",
)  # fmt: skip


def test_addresses() -> None:
    every = (*PUBLIC, *NEAR, *NEITHER, "192.0.2.1", "198.18.0.1", "2001:db8::1")
    assert tuple(filter(is_public, every)) == PUBLIC
    assert set(NEAR) <= set(filter(is_near, every))
    assert not set(NEITHER) & set(filter(is_near, every))
