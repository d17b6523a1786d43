"""Bad pictures to a server whose memory is limited: each is refused, or read as it is meant, and the server goes on.

The limit is that of the process at rest and a little more: a picture that was decoded before it is refused would meet
it.
"""

from __future__ import annotations

import base64
import copy
import os
import resource
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from PIL import Image

from tests import PATIENCE, checkpoints, pictured
from tests.pictured import bomb, noise, saved, url
from tests.server.test_process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

A, B = noise(90, 130), noise(90, 130, seed=1)
ROOM = 300 << 20
"""Bytes that a server may take beyond those that it has at rest; a bomb of the table takes 350 MB and more."""
SLACK = 80 << 20
"""Bytes that refusing a picture may take at most."""


class Pages(BaseHTTPRequestHandler):
    """A host of pictures that also fails, and sends its visitors elsewhere."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self.path[1:]
        if path == "picture":
            self.answer(200, saved(A))
        elif path.isdigit():
            self.answer(int(path))
        elif path == "nothing":
            self.close_connection = True
        else:
            self.answer(302, Location=path)

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Limited:
    """One model of a server process that is to have the memory which it takes at rest, and `ROOM`.

    Attributes:
        process: of the server.
        model: its name.
        host: of pictures that may be fetched.
        folder: of files that may be named.
    """

    def __init__(self, process: Process, model: str, host: str, folder: Path) -> None:
        self.process, self.model = process, model
        self.host, self.folder = host, folder
        self.good = self.vector(url(saved(A)))

    def limit(self) -> None:
        """Let the process have no more than `ROOM` beyond what it has now."""
        limit = self.memory("VmData") + ROOM
        resource.prlimit(self.process.process.pid, resource.RLIMIT_DATA, (limit, limit))

    def memory(self, name: str) -> int:
        """Bytes, by the name of a line of the process's status."""
        lines = Path(f"/proc/{self.process.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    def forget_peak(self) -> None:
        """Let `VmHWM` count from now on."""
        Path(f"/proc/{self.process.process.pid}/clear_refs").write_text("5")

    def post(self, *sources: str) -> requests.Response:
        parts = [{"type": "image_url", "image_url": {"url": source}} for source in sources]
        body = {"model": self.model, "messages": [{"role": "user", "content": parts}]}
        return requests.post(f"{self.process.url}/v1/embeddings", json=body, timeout=PATIENCE)

    def vector(self, source: str) -> list[float]:
        answer = self.post(source)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]["embedding"]  # type: ignore[no-any-return]

    def refusal(self, *sources: str) -> tuple[int, str]:
        """Status and message of an error, of a server that is healthy afterwards."""
        answer = self.post(*sources)
        assert requests.get(f"{self.process.url}/health", timeout=PATIENCE).status_code == 200
        return answer.status_code, answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "inside"
    folder.mkdir()
    (folder / "a.png").write_bytes(saved(A))
    (folder.parent / "secret.png").write_bytes(saved(A))
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "good.png").symlink_to(folder / "a.png")
    (folder / "zeros.png").symlink_to("/dev/zero")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    with (folder / "large.png").open("wb") as file:
        file.truncate(1 << 30)
    return folder


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, host: str, folder: Path) -> Iterator[dict[str, Limited]]:
    """The models that take pictures, of a process that also serves one of texts, by name."""
    path = tmp_path_factory.mktemp("model")
    models = {
        "qwen3_vl": pictured.qwen_vl(path / "qwen", "qwen3_vl"),
        "clip": pictured.clip(path / "clip"),
        "bert": checkpoints.bert(path / "bert"),
    }
    process = Process(
        *map(str, models.values()), "--served-model-name", *models, "--limit-mm-per-prompt", '{"image": 3}',
        "--allowed-media-domains", host, "--allow-private-media", "--allowed-local-media-path", str(folder),
    )  # fmt: skip
    made = {name: Limited(process, name, host, folder) for name in ("qwen3_vl", "clip")}
    made["clip"].limit()
    yield made
    for limited in made.values():
        assert limited.vector(url(saved(A))) == pytest.approx(limited.good, abs=1e-6), "as before all of these"
    assert process.stop() == 0


@pytest.fixture(params=["qwen3_vl", "clip"])
def server(request: pytest.FixtureRequest, servers: dict[str, Limited]) -> Limited:
    """A model whose image processor has a part in what is tested."""
    return servers[request.param]


@pytest.fixture
def qwen(servers: dict[str, Limited]) -> Limited:
    """The one model for what is decided before any image processor."""
    return servers["qwen3_vl"]


BOMBS = {
    9400: "9400 x 9400 pixels; at most 50000000 are decoded",
    10000: "10000 x 10000 pixels; at most 50000000 are decoded",
    14000: "too many pixels to be opened",
}
"""Sides of pictures, and the message. The last is beyond Pillow's own limit."""


@pytest.mark.parametrize("side", BOMBS)
def test_bombs_take_no_memory(server: Limited, side: int) -> None:
    file = bomb(side)
    server.forget_peak()
    before = server.memory("VmHWM")
    status, message = server.refusal(url(file))
    assert (status, BOMBS[side] in message) == (400, True), message
    assert server.memory("VmHWM") - before < SLACK


UNREADABLE = {
    "empty": b"",
    "text": b"hello",
    "HTML": b"<!doctype html><html><body>404</body></html>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "half a PNG": saved(noise(200, 200))[:30000],
    "half a JPEG": saved(noise(200, 200), "JPEG")[:5000],
    "the end of a PNG is missing": saved(A)[:-40],
    "EPS": saved(A, "EPS"),
    "PPM": saved(A, "PPM"),
    "TGA": saved(A, "TGA"),
    "ICO": saved(A, "ICO"),
    "JPEG 2000": saved(A, "JPEG2000"),
    "PDF": saved(A, "PDF"),
    "PSD": b"8BPS\0\1" + b"\0" * 6 + b"\0\3\0\0\0\x10\0\0\0\x10\0\x08\0\3" + b"\0" * 800,
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + b"\0" * 100,
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "HDF5": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
    "MPEG": b"\0\0\1\xb3\x14\0\xf0\x13" + b"\0" * 100,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_are_not_read(qwen: Limited, name: str) -> None:
    status, message = qwen.refusal(url(UNREADABLE[name]))
    assert status == 400
    assert "cannot be read" in message
    assert "PNG, JPEG, WEBP, GIF, BMP, TIFF" in message


@pytest.mark.parametrize("size", [(1, 1000), (1, 4000), (4000, 1)])
def test_strips_are_not_blown_up(server: Limited, size: tuple[int, int]) -> None:
    server.forget_peak()
    before = server.memory("VmHWM")
    status, message = server.refusal(url(saved(noise(*size))))
    assert (status, message.rpartition(";")[2]) == (400, " one may be at most 200 times the other")
    assert server.memory("VmHWM") - before < SLACK


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1)])
def test_the_smallest_pictures_have_vectors(server: Limited, size: tuple[int, int]) -> None:
    assert server.vector(url(saved(noise(*size)))) != pytest.approx(server.good, abs=1e-3)


def animated(form: str) -> bytes:
    """A picture and another one behind it."""
    options = {"lossless": True} if form == "WEBP" else {}
    return saved(A, form, save_all=True, append_images=[B], **options)


READ = {
    "a broken EXIF block": url(saved(A, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")),
    "the declared type of another format": url(saved(A), "text/html"),
    "no type": url(A, ""),
    "lines": "data:image/png;base64," + base64.encodebytes(saved(A)).decode(),
    "the alphabet of URLs": "data:image/png;base64," + base64.urlsafe_b64encode(saved(A)).decode(),
    "no padding": "data:image/png;base64," + base64.b64encode(saved(A)).decode().rstrip("="),
    "an animated PNG": url(animated("PNG")),
    "an animated WebP": url(animated("WEBP")),
    "a TIFF of two pages": url(animated("TIFF")),
    "the file of a host": "http://{host}/picture",
    "a redirect to an allowed host": "http://{host}/http://{host}/picture",
    "a file": "file://{folder}/a.png",
    "a link inside": "file://{folder}/good.png",
}


@pytest.mark.parametrize("name", READ)
def test_odd_pictures_have_the_vectors_of_plain_ones(server: Limited, name: str) -> None:
    source = READ[name].format(host=server.host, folder=server.folder)
    assert server.vector(source) == pytest.approx(server.good, abs=1e-6)


def test_an_animated_gif_is_its_first_frame(server: Limited) -> None:
    frames = [image.convert("P", palette=Image.Palette.ADAPTIVE) for image in (A, B)]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert server.vector(url(moving)) == pytest.approx(server.vector(url(saved(frames[0], "GIF"))), abs=1e-6)


REFUSED = {
    "no base64": ("data:image/png;base64,@@@", "not base64"),
    "another encoding": ("data:image/png,%89PNG", "must have the form"),
    "more bytes than are decoded": ("data:image/png;base64," + "A" * (46 << 20), "at most 33554432 are read"),
    "a file outside": ("file:///etc/hostname", "not below"),
    "a link out": ("file://{folder}/link.png", "not below"),
    "a way out": ("file://{folder}/../secret.png", "not below"),
    "a device": ("file://{folder}/zeros.png", "not below"),
    "a pipe": ("file://{folder}/pipe.png", "not a regular file"),
    "a link in a circle": ("file://{folder}/circle.png", "not there"),
    "a folder": ("file://{folder}", "not a regular file"),
    "no file": ("file://{folder}/b.png", "not there"),
    "a large file": ("file://{folder}/large.png", "at most 33554432 are read"),
    "a file of another host": ("file://server/a.png", "names the host"),
    "a file of half an address": ("file://[::1/a.png", "expected file:///"),
    "an address in brackets": ("http://[::ffff:169.254.169.254]/a.png", "not fetched"),
    "half an address": ("http://[::ffff:169.254.169.254", "expected a plain"),
    "a path with zero bytes": ("file://{folder}/a\0.png", "not there"),
    "a long path": ("file://{folder}/" + "a" * 5000, "not there"),
    "a path": ("/etc/hostname", "expected a URL"),
    "another scheme": ("ftp://example.com/a.png", "expected a URL"),
    "another host": ("https://example.com/a.png", "not fetched"),
    "an address of secrets": ("http://169.254.169.254/latest/meta-data", "not fetched"),
    "another port": ("http://127.0.0.1:22/", "not fetched"),
    "a redirect to secrets": ("http://{host}/http://169.254.169.254/latest", "not fetched"),
    "a redirect to a file": ("http://{host}/file:///etc/hostname", "expected a plain"),
    "a redirect in circles": ("http://{host}/again", "more than 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sources_that_are_refused(qwen: Limited, name: str) -> None:
    source, expected = REFUSED[name]
    status, message = qwen.refusal(source.format(host=qwen.host, folder=qwen.folder))
    assert (status, expected in message) == (400, True), message


@pytest.mark.parametrize("path", ["403", "404", "500", "nothing"])
def test_failures_of_a_host_are_not_the_server_s(qwen: Limited, path: str) -> None:
    assert qwen.refusal(f"http://{qwen.host}/{path}")[0] == 422


def test_pictures_are_counted(qwen: Limited) -> None:
    status, message = qwen.refusal(*[url(saved(A))] * 4)
    assert (status, message.partition(".")[0]) == (400, "At most 3 image(s) may be provided in one prompt")


def test_a_picture_for_which_there_is_no_memory(qwen: Limited) -> None:
    """It is within the limits of pictures, and more than the process has: the limit of these tests is felt."""
    status, _ = qwen.refusal(url(saved(Image.new("RGB", (12200, 4000)))))
    assert status == 500


def test_a_text_model_takes_no_pictures(qwen: Limited) -> None:
    bert = copy.copy(qwen)
    bert.model = "bert"
    status, message = bert.refusal(url(bomb(9400)))
    assert (status, "takes no images" in message) == (400, True), message
    assert len(qwen.process.embed("a text", model="bert")[0]) > 0
