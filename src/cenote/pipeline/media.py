"""Pictures from outside: where they may come from, and their bytes to pixels, the header first.

Nothing is decoded before its format, its pixels and its sides are known from the header. Whatever the bytes are, the
outcome is an RGB picture or a `BadRequest`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from cenote.errors import BadRequest
from cenote.functions import optional
from cenote.pipeline.fetching import Hosts, arrived, fetch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are opened, by Pillow's names. Others of its forty may run programs or read further files."""

PARAM = "image"
MOST_MEMORY = 1 << 30
"""Bytes of pictures that are being decoded or processed at a time; a single larger one waits until it is alone."""
PIXEL_BYTES = 16
"""Bytes of a pixel while its picture is processed: decoded, converted, resized and as float32."""

LOADERS = ThreadPoolExecutor(8, thread_name_prefix="cenote-media")
"""Threads that read the pictures of a prompt."""
THE_CALLERS = Hosts(domains=None, allows_private=True)
"""Hosts that the caller of a library names."""

SECRET = os.urandom(32)
"""Of this process: nobody outside can make two pictures with one key."""

ORIENTATION = 0x0112
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
TURNS |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
"""EXIF orientations to the names of Pillow's transpositions that undo them."""
ON_ITS_SIDE = frozenset((5, 6, 7, 8))


@dataclass(frozen=True)
class Limits:
    """Limits of one picture.

    Attributes:
        file_bytes: maximum bytes of its file.
        pixels: maximum pixels.
        ratio: maximum ratio of its longer to its shorter side.
    """

    file_bytes: int = 32 << 20
    pixels: int = 50_000_000
    ratio: int = 200

    def check_bytes(self, count: int) -> None:
        """Refuse a file of too many bytes."""
        if count > self.file_bytes:
            raise BadRequest(f"a picture has {count} bytes; at most {self.file_bytes} are read", param=PARAM)

    def check_size(self, width: int, height: int) -> None:
        """Refuse too many pixels and sides that are too unlike, as resizing would blow them up."""
        if width * height > self.pixels:
            raise BadRequest(
                f"a picture has {width} x {height} pixels; at most {self.pixels} are decoded. Send it smaller",
                param=PARAM,
            )
        if max(width, height) > self.ratio * min(width, height):
            raise BadRequest(
                f"a picture has sides of {width} and {height} pixels; one may be at most {self.ratio} times the other",
                param=PARAM,
            )


@dataclass(frozen=True)
class Access:
    """Places from which pictures may be read.

    Attributes:
        folder: files below it may be named; `None` = no files may.
        any_file: all files and hosts may be named, as by the caller of a library.
        hosts: from which URLs are fetched.
        limits: of each picture.
        trusts_kwargs: arguments of the image processor may also make pictures larger than the model's own bounds.
    """

    folder: Path | None = None
    any_file: bool = False
    hosts: Hosts = field(default_factory=Hosts)
    limits: Limits = field(default_factory=Limits)
    trusts_kwargs: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture whose header was read.

    Attributes:
        key: hash of its content.
        width: in pixels, as it is seen.
        height: likewise.
    """

    key: bytes
    width: int
    height: int
    _file: bytes = b""
    _turn: str = ""
    _image: Image | None = None

    def decoded(self) -> Image:
        """Return the pixels in RGB, the right way up.

        Raises:
            BadRequest: the file is damaged behind its header.
        """
        if self._image is not None:
            return self._image
        with _refusing():
            image = _opened(self._file)
            image.load()
            image = _turned(image, self._turn)
            if image.size != (self.width, self.height):
                raise BadRequest("a picture has another size than its header says", param=PARAM)
            return rgb(image)


class Memory:
    """Memory that pictures take while they are decoded and processed.

    Args:
        limit: bytes in all.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._freed = threading.Condition()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free, or nothing is held, and hold them for the time being."""
        with self._freed:
            self._freed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._freed:
                self._held -= size
                self._freed.notify_all()


def pictures(sources: Iterable[Any], access: Access) -> list[Picture]:
    """Return the pictures that `sources` are or name, several at a time, as one behind a URL is waited for.

    Raises:
        BadRequest: as `picture`, for the first of them.
        Unarrived: some are behind URLs that are not fetched here.
    """
    return list(LOADERS.map(partial(picture, access=access), awaited(sources, access)))


def awaited(sources: Iterable[Any], access: Access) -> list[Any]:
    """Return `sources`, of URLs the files where these have been fetched before.

    Raises:
        Unarrived: some are still to be fetched.
    """
    return arrived(sources, partial(fetched, access=access))


def picture(source: Any, access: Access) -> Picture:
    """Return the picture that `source` is or names, its header read.

    Args:
        source: `PIL.Image.Image`, bytes of a file, its path, or a URL: `data:`, `file:`, `https:`, `http:`; a `Picture`
            stays as it is.
        access: places from which it may be read.

    Raises:
        BadRequest: it is none of these, may not be read, or is beyond a limit.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return from_file(bytes(source), access.limits)
    if isinstance(source, str):
        return from_file(_named(source, access), access.limits)
    if isinstance(source, Path):
        return from_file(_local(source, access), access.limits)
    if hasattr(source, "getexif"):
        return from_image(source, access.limits)
    raise BadRequest(
        f"a picture is a PIL.Image, the bytes of a file, its path or a URL, got {type(source).__name__}", param=PARAM
    )


def from_file(file: bytes, limits: Limits) -> Picture:
    """Return the picture in the bytes of a file.

    Raises:
        BadRequest: they are none that is opened, or beyond a limit.
    """
    limits.check_bytes(len(file))
    with _refusing():
        image = _opened(file)
        limits.check_size(*image.size)
        turn = _orientation(image)
    width, height = reversed(image.size) if turn in ON_ITS_SIDE else image.size
    return Picture(_hash(file), width, height, _file=file, _turn=TURNS.get(turn, ""))


def from_image(image: Image, limits: Limits) -> Picture:
    """Return a picture that the caller has opened, the right way up.

    Raises:
        BadRequest: it is damaged or beyond a limit.
    """
    limits.check_size(*image.size)
    with _refusing():
        seen = rgb(_turned(image, TURNS.get(_orientation(image), "")))
        return Picture(_hash(seen.tobytes(), repr(seen.size).encode()), *seen.size, _image=seen)


def rgb(image: Image) -> Image:
    """Return a picture in RGB: transparent ones on white, 16 bits of grey scaled to 8, all else as Pillow converts."""
    from PIL import Image as images

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        import numpy as np

        return images.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    white = images.new("RGBA", over.size, (255, 255, 255))
    return images.alpha_composite(white, over).convert("RGB")


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(key=SECRET, digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _opened(file: bytes) -> Image:
    """Return the picture in a file, of which only the header is read."""
    from PIL import Image as images

    try:
        return images.open(BytesIO(file), formats=FORMATS)
    except images.DecompressionBombError as error:
        raise BadRequest("a picture has too many pixels to be opened; send it smaller", param=PARAM) from error


def _orientation(image: Image) -> int:
    """Return the EXIF orientation of a picture, 1 where there is none or it cannot be read.

    Pillow turns TIFF by itself. Of PNG only the part before the pixels is looked at, as the rest would be decoded.
    """
    from PIL import Image as images

    if image.format == "TIFF":
        return 1
    try:
        return int(images.Image.getexif(image).get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block raises whatever its parser meets
        return 1


def _turned(image: Image, turn: str) -> Image:
    """Return a picture the right way up."""
    from PIL.Image import Transpose

    return image.transpose(Transpose[turn]) if turn else image


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise `BadRequest` for whatever Pillow raises over bytes that it cannot read."""
    try:
        yield
    except BadRequest:
        raise
    except MemoryError:
        raise
    except Exception as error:  # its parsers raise OSError, SyntaxError, ValueError, struct.error and more
        kind = type(error).__name__
        raise BadRequest(
            f"a picture cannot be read ({kind}); expected a whole file of {', '.join(FORMATS)}", param=PARAM
        ) from error


def _named(name: str, access: Access) -> bytes:
    """Return the bytes of the file that a URL or a path names."""
    scheme = name[:16].partition(":")[0].lower()
    if scheme == "data":
        return _of_data_url(name, access.limits)
    if scheme in ("http", "https"):
        return fetched(name, access)
    if scheme == "file":
        return _local(_path_of(name), access)
    if access.any_file and "://" not in name:
        return _local(Path(name), access)
    raise BadRequest(
        f"got {name[:40]!r} for a picture; expected a URL: data:image/png;base64,..., https:// or file://", param=PARAM
    )


def fetched(url: str, access: Access) -> bytes:
    """Return the bytes behind an `http:` or `https:` URL.

    Raises:
        BadRequest: it may not be fetched, cannot be, or has too many bytes.
    """
    hosts = THE_CALLERS if access.any_file else access.hosts
    return fetch(url, hosts, access.limits.file_bytes)


def _path_of(url: str) -> Path:
    """Return the path of a `file:` URL.

    Raises:
        BadRequest: it names a host.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address
        raise BadRequest("a file: URL of a picture cannot be read; expected file:///...", param=PARAM) from None
    if parts.netloc not in ("", "localhost"):
        raise BadRequest(f"a file: URL names the host {parts.netloc!r}; expected none", param=PARAM)
    return Path(unquote(parts.path))


def _local(path: Path, access: Access) -> bytes:
    """Return the bytes of a local file.

    Raises:
        BadRequest: it may not be read, is not there, or has too many bytes.
    """
    if not access.any_file and access.folder is None:
        raise BadRequest(
            "local files are not read; start the server with --allowed-local-media-path, or send the picture as a "
            "data: URL",
            param=PARAM,
        )
    try:
        real = path.resolve()
        is_below = access.any_file or real.is_relative_to(str(optional(Path.resolve, access.folder)))
        is_file = is_below and real.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, links in a circle, zero bytes
        is_below, is_file = True, False
    if not is_below:
        raise BadRequest("the file is not below --allowed-local-media-path", param=PARAM)
    if not is_file:
        raise BadRequest("the file of a picture is not there, or is not a regular file", param=PARAM)
    access.limits.check_bytes(real.stat().st_size)
    try:
        return real.read_bytes()
    except OSError as error:
        raise BadRequest(f"the file of a picture cannot be read: {error.strerror}", param=PARAM) from None


def _of_data_url(url: str, limits: Limits) -> bytes:
    """Return the bytes in a `data:` URL, whose declared type does not count.

    Raises:
        BadRequest: it is not base64, or has too many bytes.
    """
    head, comma, text = url.partition(",")
    if not comma or not head.lower().rstrip().endswith(";base64"):
        raise BadRequest("a data: URL must have the form data:image/png;base64,...", param=PARAM)
    limits.check_bytes(len(text) * 3 // 4 - 2)
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"the data: URL of a picture is not base64: {error}", param=PARAM) from None
