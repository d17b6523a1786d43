"""Pictures for prompts, from URLs and for URLs."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from cenote.pipeline.media import Access, picture

if TYPE_CHECKING:
    from PIL.Image import Image


def fetch_image(image_url: str) -> Image:
    """Return the picture behind a `data:`, `file:`, `https:` or `http:` URL, in RGB.

    Raises:
        BadRequest: it cannot be fetched, or is not a picture.
    """
    return picture(image_url, Access(any_file=True)).decoded()


def encode_image_url(image: Image, format: str = "PNG") -> str:
    """Return a picture as a `data:` URL."""
    file = io.BytesIO()
    image.save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
