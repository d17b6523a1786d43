"""Pictures from outside: what is opened, what is refused before it is decoded, and the colours that come of it."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from cenote.errors import BadRequest
from cenote.pipeline import media
from cenote.pipeline.media import Access, Limits, Memory, picture
from tests.pictured import bomb, noise, saved

ANY = Access(any_file=True)
A = noise(90, 130)


def pixels(source: Any) -> np.ndarray:
    return np.asarray(picture(source, ANY).decoded())


def oriented(number: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[media.ORIENTATION] = number
    return saved(A, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("number", range(1, 9))
def test_pictures_stand_the_right_way_up(number: int, form: str) -> None:
    file = oriented(number, form)
    expected = ImageOps.exif_transpose(Image.open(media.BytesIO(file)))
    opened = picture(file, ANY)
    assert (opened.width, opened.height) == expected.size
    assert np.array_equal(np.asarray(opened.decoded()), np.asarray(expected.convert("RGB")))
    assert np.array_equal(pixels(Image.open(media.BytesIO(file))), np.asarray(expected.convert("RGB")))


def test_a_turned_tiff_is_turned_once() -> None:
    file = oriented(6, "TIFF")
    assert pixels(file).shape == (90, 130, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's own
def test_broken_exif_counts_as_none() -> None:
    file = saved(A, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert pixels(file).shape == (130, 90, 3)


def half_clear(mode: str) -> Image.Image:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    image.paste((10, 20, 30, 0), (0, 0, 2, 4))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_stand_on_white(mode: str) -> None:
    for own in (pixels(saved(half_clear(mode))), pixels(half_clear(mode))):
        assert (own[:, :2] == 255).all()
        assert (own[:, 2:] < 40).all()


def test_sixteen_bits_of_grey_are_scaled() -> None:
    grey = Image.fromarray(np.array([[0, 32768], [65535, 256]], dtype=np.uint16))
    for source in (saved(grey), saved(grey, "TIFF"), grey):
        assert pixels(source)[..., 0].tolist() == [[0, 128], [255, 1]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "RGB"])
def test_other_modes_are_as_pillow_converts_them(mode: str) -> None:
    image = A.convert(mode)
    file = saved(image, "TIFF")
    assert np.array_equal(pixels(file), np.asarray(image.convert("RGB")))
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_a_jpeg_for_print_is_as_pillow_converts_it() -> None:
    file = saved(A.convert("CMYK"), "JPEG", quality=95)
    assert np.array_equal(pixels(file), np.asarray(Image.open(media.BytesIO(file)).convert("RGB")))


def test_animations_are_their_first_frame() -> None:
    frames = [noise(20, 20, seed) for seed in range(3)]
    file = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels(file), np.asarray(frames[0]))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1)])
def test_the_smallest_pictures_are_opened(size: tuple[int, int]) -> None:
    assert pixels(saved(noise(*size))).shape == (*size[::-1], 3)


BAD = {
    "empty": b"",
    "text": b"hello",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "PSD": saved(A, "PPM"),
    "half a PNG": saved(noise(200, 200))[:1000],
    "half a JPEG": saved(noise(200, 200), "JPEG")[:1000],
    "a bomb": bomb(9400),
    "a bomb beyond Pillow's limit": bomb(14000),
    "a strip": saved(noise(1, 201)),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        picture(BAD[name], ANY).decoded()


def test_a_bomb_costs_no_memory() -> None:
    """A picture of 200 megapixels, in a process that may take 600 MB; decoded it would be that alone."""
    code = (
        "import resource, sys; from cenote.errors import BadRequest; from cenote.pipeline.media import Access, picture;"
        "resource.setrlimit(resource.RLIMIT_DATA, (600 << 20, 600 << 20)); file = sys.stdin.buffer.read()\n"
        "try: picture(file, Access()).decoded()\n"
        "except BadRequest: print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bomb(13000), capture_output=True, timeout=60)
    assert done.stdout, done.stderr.decode()
    assert int(done.stdout) < 200 << 10


def test_keys_are_those_of_the_content() -> None:
    assert picture(saved(A), ANY).key == picture(saved(A), ANY).key
    assert picture(A, ANY).key == picture(A.copy(), ANY).key
    grey = Image.new("L", (6, 4), 7)
    assert grey.tobytes() == Image.new("L", (4, 6), 7).tobytes()
    assert picture(grey, ANY).key != picture(Image.new("L", (4, 6), 7), ANY).key


def test_limits_are_about_files_pixels_and_sides(tmp_path: Path) -> None:
    small = Access(any_file=True, limits=Limits(file_bytes=100, pixels=100, ratio=3))
    for wrong in (saved(A), A, "data:;base64," + base64.b64encode(saved(A)).decode()):
        with pytest.raises(BadRequest, match="at most"):
            picture(wrong, small)
    (tmp_path / "a.png").write_bytes(saved(A))
    with pytest.raises(BadRequest, match="at most 100"):
        picture(tmp_path / "a.png", small)
    with pytest.raises(BadRequest, match="3 times"):
        picture(noise(1, 4), small)


@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
def test_data_urls_are_read_as_clients_write_them(alphabet: Any) -> None:
    text = alphabet(saved(A)).decode()
    broken = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for url in (f"data:image/png;base64,{text}", f"data:;BASE64,{broken}", f"data:text/html;base64,{text.rstrip('=')}"):
        assert np.array_equal(pixels(url), np.asarray(A))


def test_damaged_pixels_behind_a_whole_header_are_refused() -> None:
    info = PngImagePlugin.PngInfo()
    file = bytearray(saved(noise(50, 50), pnginfo=info))
    file[200:260] = b"\0" * 60
    with pytest.raises(BadRequest, match="cannot be read"):
        picture(bytes(file), ANY).decoded()


def test_memory_is_held_while_pictures_are_decoded() -> None:
    memory = Memory(10)
    with memory.holding(100):  # larger than all, and alone
        assert memory._held == 100
    with memory.holding(4), memory.holding(6):
        assert memory._held == 10
    assert memory._held == 0
