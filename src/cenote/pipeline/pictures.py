"""Prompts with pictures: from sources to sequences whose tokens stand for patches.

A prompt that the model cannot read is refused before a picture of it is decoded: headers tell how many tokens it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from cenote.core import Media
from cenote.errors import BadRequest, ConfigError, TooLong, first_line, without_paths
from cenote.functions import coalesce
from cenote.pipeline import media
from cenote.pipeline.inputs import Illustrated
from cenote.pipeline.media import MOST_MEMORY, PIXEL_BYTES, Access, Limits, Memory, Picture
from cenote.pipeline.messages import message
from cenote.tensors.positions import positions_of
from cenote.tokenizer import without_advice

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from cenote.conventions import Pictures, Role
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.tokenizing import Ids
    from cenote.tensors.positions import Positions, Span

PARAM = "mm_processor_kwargs"
MEMORY = Memory(MOST_MEMORY)
"""Memory of this process for pictures."""


class Layout(Protocol):
    """How processed pictures of one kind become tokens; made of `Pictures`, an image processor and a tokenizer."""

    def expansion(self, picture: Picture, kwargs: Mapping[str, Any]) -> Ids:
        """Return the ids that stand for a picture, by its size alone; features go where they are placeholders.

        Raises:
            BadRequest: an argument is unknown, or would make pictures larger than the model's own bounds.
        """

    def processed(self, picture: Picture, kwargs: Mapping[str, Any]) -> tuple[Media, ...]:
        """Return a picture as the model takes it: a `Media` for each run of placeholders, of tiles where several."""


@dataclass(frozen=True)
class Fixed:
    """Pictures of one size, whose tokens do not depend on them."""

    pictures: Pictures
    processor: Any
    tokenize: Callable[[str], Ids]

    def expansion(self, picture: Picture, kwargs: Mapping[str, Any]) -> Ids:
        """See `Layout.expansion`."""
        _refuse_unknown(kwargs, ())
        return [self.pictures.placeholder] * self.pictures.tokens

    def processed(self, picture: Picture, kwargs: Mapping[str, Any]) -> tuple[Media, ...]:
        """See `Layout.processed`."""
        output = self.processor(images=[picture.decoded()], return_tensors="np")
        arrays = {name: np.ascontiguousarray(array[0]) for name, array in output.items()}
        return (Media(_key(picture), self.pictures.tokens, self.pictures.patches, arrays=arrays),)


MOST_RESIZED = Limits().pixels
"""Pixels of a resized picture, whatever the request asks for."""
SIZES = ("min_pixels", "max_pixels", "size", "image_size")
"""Arguments of an image processor that requests may send, as they can only make pictures smaller."""


@dataclass(frozen=True)
class Grid:
    """Pictures that are resized to a whole number of patches, of which a square becomes a token (Qwen-VL)."""

    pictures: Pictures
    processor: Any
    tokenize: Callable[[str], Ids]

    def expansion(self, picture: Picture, kwargs: Mapping[str, Any]) -> Ids:
        """See `Layout.expansion`."""
        least, most = self._bounds(picture, kwargs)
        bounds = {"min_pixels": least, "max_pixels": most}
        patches = self.processor.get_number_of_image_patches(picture.height, picture.width, bounds)
        return [self.pictures.placeholder] * (int(patches) // self.pictures.merge**2)

    def processed(self, picture: Picture, kwargs: Mapping[str, Any]) -> tuple[Media, ...]:
        """See `Layout.processed`."""
        least, most = self._bounds(picture, kwargs)
        size = {"shortest_edge": least, "longest_edge": most}
        output = self.processor(images=[picture.decoded()], size=size, return_tensors="np")
        grid = tuple(map(int, output["image_grid_thw"][0]))
        patches = int(np.prod(grid))
        tokens, arrays = patches // self.pictures.merge**2, {"pixel_values": output["pixel_values"]}
        return (Media(_key(picture, least, most), tokens, patches, grid, arrays),)

    def _bounds(self, picture: Picture, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Return the least and the most pixels of a resized picture."""
        _refuse_unknown(kwargs, SIZES)
        least, most = int(self.processor.size["shortest_edge"]), int(self.processor.size["longest_edge"])
        if self.pictures.most_pixels:
            most = min(most, self.pictures.most_pixels)
        lower, upper = _asked(kwargs, least, most)
        side = _count(kwargs, "image_size", max(picture.width, picture.height))
        scale = min(1.0, side / max(picture.width, picture.height))
        highest = self._highest(least, most)
        if lower > highest[0] or upper > highest[1]:
            raise BadRequest(
                f"mm_processor_kwargs: got at least {lower} and at most {upper} pixels of a resized picture; expected "
                f"no more than {highest[0]} and {highest[1]}. Where requests may only lower the model's own bounds, "
                "--trust-request-mm-kwargs lets them raise these",
                param=PARAM,
            )
        if scale < 1:
            upper = min(upper, int(scale * picture.width) * int(scale * picture.height))
        upper = max(upper, self._smallest)
        return min(lower, upper), upper

    def _highest(self, least: int, most: int) -> tuple[int, int]:
        """Return the highest bounds that a request may ask for: the model's own, or those of the server's options."""
        if self.pictures.may_grow:
            return MOST_RESIZED, MOST_RESIZED
        lower, upper = _asked(self.pictures.kwargs, least, most)
        return min(MOST_RESIZED, max(least, lower)), min(MOST_RESIZED, max(most, upper))

    @property
    def _smallest(self) -> int:
        """Pixels of a picture of one token."""
        return int(self.processor.patch_size * self.pictures.merge) ** 2


LAYOUTS: dict[str, Callable[[Pictures, Any, Callable[[str], Ids]], Layout]] = {"fixed": Fixed, "grid": Grid}
"""By `Pictures.layout`."""


SAMPLE = Picture(b"", 64, 64)
"""A picture by which arguments are checked."""
Processed = dict[tuple[bytes, str], tuple[Media, ...]]
"""Processed pictures, by their content and the arguments of the image processor."""


class Placed(NamedTuple):
    """A prompt with its pictures in place.

    Attributes:
        ids: with the tokens that stand for each picture.
        spans: first token of each run of placeholders, and the one behind its last.
    """

    ids: Ids
    spans: list[Span]


def kept(placed: Placed, options: TextOptions, *, cuts_beginnings: bool) -> Placed:
    """Return a prompt cut to `options.truncate`, if anything is to be cut: only text is.

    Args:
        placed: the prompt.
        options: how texts are cut.
        cuts_beginnings: the beginning is cut, and not the end.

    Raises:
        TooLong: a picture would be cut.
    """
    length = len(placed.ids)
    limit = min(coalesce(options.truncate, length), length)
    first = length - limit if cuts_beginnings else 0
    kept_rows = range(first, first + limit)
    if not all(start in kept_rows and stop - 1 in kept_rows for start, stop in placed.spans):
        raise TooLong(
            f"the prompt has {length} tokens and is to be cut to {limit}, which would cut a picture; send fewer or "
            "smaller ones",
            param="input_tokens",
        )
    spans = [(start - first, stop - first) for start, stop in placed.spans]
    return Placed(placed.ids[first : first + limit], spans)


@dataclass
class PictureRenderer:
    """Renders prompts with pictures for one model.

    Attributes:
        pictures: how its inputs hold them.
        name: the model in messages.
        apply: renders messages by a template (`None` = the tokenizer's) with further variables.
        tokenize: gives the ids of a text.
        tokens: gives the vocabulary entries of ids.
        has_template: whether the tokenizer has a chat template.
        access: places from which pictures may be read; a server sets them.

    Raises:
        ConfigError: arguments of the image processor in the user's options are not those of the model.
    """

    pictures: Pictures
    name: str
    apply: Callable[[list[dict[str, Any]], str | None, Mapping[str, Any]], str]
    tokenize: Callable[[str], Ids]
    tokens: Callable[[list[int]], list[str]]
    has_template: bool
    access: Access = field(default_factory=lambda: Access(any_file=True))

    def __post_init__(self) -> None:
        self.refusal = self.pictures.refusal
        self.placeholder = "" if self.is_apart else self.tokens([self.pictures.placeholder])[0]
        self._layout: Layout | None = None
        if not self.refusal:
            try:
                self._processor = _processor(self.pictures.folder)
                self.allow(self.access)
                self._reader.expansion(SAMPLE, self.pictures.kwargs)
            except BadRequest as error:
                raise ConfigError(f"for the pictures of {self.name}, {error.message}") from None
            except (ImportError, OSError, ValueError) as error:
                self.refusal = (
                    f"the image processor of {self.name} cannot be loaded: {without_paths(first_line(error))}"
                )

    def allow(self, access: Access) -> None:
        """Let pictures be read from other places, and be made larger or not."""
        self.access = access
        self.pictures = replace(self.pictures, may_grow=access.trusts_kwargs)
        if not self.refusal:
            self._layout = LAYOUTS[self.pictures.layout](self.pictures, self._processor, self.tokenize)

    @property
    def is_apart(self) -> bool:
        """Whether a picture is an input of its own."""
        return not self.pictures.markup

    @property
    def has_own_template(self) -> bool:
        """Whether a picture and its text can be rendered without the tokenizer's chat template."""
        template = self.pictures.template
        return self.is_apart or (template is not None and template.source is not None)

    def headers(self, content: Illustrated) -> list[Picture]:
        """Return the pictures of a prompt, their headers read.

        Raises:
            BadRequest: there are too many, the model takes none, or one of them may not be read or is beyond a limit.
        """
        if self.refusal:
            raise BadRequest(self.refusal, param="image")
        if len(content.sources) > self.pictures.most:
            raise BadRequest(
                f"At most {self.pictures.most} image(s) may be provided in one prompt. Set '--limit-mm-per-prompt' to "
                "increase this limit.",
                param="image",
            )
        if self.is_apart and (len(content.sources) != 1 or others_of(content)):
            raise BadRequest(
                "text and an image cannot be embedded together by this model; send one text or one image as an input",
                param="image",
            )
        return media.pictures(content.sources, self.access)

    def with_blank(self, content: str | Ids | Illustrated) -> str | Ids | Illustrated:
        """Return an input of texts alone with the black picture that the model has there, if it does."""
        if isinstance(content, str):
            return self._beside_blank((content,), content)
        if isinstance(content, Illustrated) and not content.sources:
            return self._beside_blank(content.content, content)
        return content

    def _beside_blank(self, parts: Seq[Any], content: str | Illustrated) -> str | Illustrated:
        """Return texts beside the black picture; `content` where a client has rendered them, or there is none."""
        size = self.pictures.blank
        if not size or str(parts[0]).startswith(self.pictures.rendered):
            return content
        from PIL import Image

        return Illustrated((None, *parts), (Image.new("RGB", (size, size)),))

    def text(self, parts: Seq[str | None], prompt: str, task: Role | None = None) -> str:
        """Return texts and pictures as one text with placeholders.

        Args:
            parts: texts, and `None` for each picture.
            prompt: text of the system's message; empty = the model's own.
            task: side of the input, if it is known.
        """
        template = self.pictures.template
        if self.is_apart:
            return ""
        if template is None or (template.source is None and not self.has_template):
            return prompt + "".join(coalesce(part, self.pictures.markup) for part in parts)
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*map(shown, parts)]}]
        if prompt:
            messages.insert(0, message("system", prompt, structured=True))
        return self.apply(messages, template.source, template.variables(task))

    def spelled_out(self, text: str) -> str:
        """Return a text in which every placeholder is the vocabulary's."""
        spelled = self.pictures.spelled
        return text.replace(spelled, self.placeholder) if spelled else text

    def placed(self, ids: Ids, pictures: Seq[Picture], kwargs: Mapping[str, Any]) -> Placed:
        """Return the ids of a prompt with the tokens of its pictures, by their sizes alone.

        Raises:
            BadRequest: there are more or fewer placeholders than pictures, or an argument is not allowed.
        """
        expansions = [self._reader.expansion(picture, self._merged(kwargs)) for picture in pictures]
        placeholder = self.pictures.placeholder
        if self.is_apart:
            (expansion,) = expansions
            return Placed(expansion, [(0, len(expansion))])
        count = ids.count(placeholder)
        if count != len(pictures):
            raise BadRequest(
                f"the prompt has {count} image placeholders for {len(pictures)} images; there must be one for each",
                param="image",
            )
        expanded: Ids = []
        spans: list[Span] = []
        rest = iter(expansions)
        for token in ids:
            if token != placeholder:
                expanded.append(token)
                continue
            expansion = next(rest)
            spans += _runs(expansion, placeholder, len(expanded))
            expanded += expansion
        return Placed(expanded, spans)

    def media(self, pictures: Seq[Picture], kwargs: Mapping[str, Any], processed: Processed) -> tuple[Media, ...]:
        """Return pictures as the model takes them, each content processed once.

        Args:
            pictures: of one prompt.
            kwargs: arguments of the image processor.
            processed: pictures of the same request, to which these are added.

        Raises:
            BadRequest: one of them is damaged.
        """
        merged = self._merged(kwargs)
        names = [(picture.key, repr(merged)) for picture in pictures]
        for name, picture in zip(names, pictures, strict=True):
            if name not in processed:
                with MEMORY.holding(PIXEL_BYTES * picture.width * picture.height):
                    first, *others = self._reader.processed(picture, merged)
                first = replace(first, pixels=picture.width * picture.height)
                processed[name] = (first, *others)
        return tuple(chain.from_iterable(map(processed.__getitem__, names)))

    def positions(self, length: int, media: Seq[Media], spans: Seq[Span]) -> Positions | None:
        """Return the positions of a sequence's tokens; `None` = they count from 0."""
        return positions_of(self.pictures, length, media, spans)

    @property
    def _reader(self) -> Layout:
        assert self._layout is not None
        return self._layout

    def _merged(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**self.pictures.kwargs, **kwargs}


def shown(part: str | None) -> dict[str, Any]:
    """Return a text, or `None` for a picture, as a chat template takes it."""
    return {"type": "image"} if part is None else {"type": "text", "text": part}


def others_of(content: Illustrated) -> list[Any]:
    """Return what a prompt has beside pictures, texts or ids, without empty ones."""
    parts: Seq[Any] = content.content if isinstance(content.content, tuple) else (content.content,)
    return [part for part in parts if part]


def _processor(folder: str) -> Any:
    """Return the image processor in a folder, that of Pillow and NumPy alone: torchvision's rounds otherwise.

    Raises:
        ImportError: it needs a package that is not installed.
        OSError: there are no files of one; also `ValueError`.
    """
    with without_advice():
        from transformers import AutoImageProcessor

        load: Any = AutoImageProcessor.from_pretrained
        return load(folder, backend="pil", trust_remote_code=False)


def _runs(ids: Ids, placeholder: int, start: int) -> list[Span]:
    """Return the spans of the runs of placeholders in `ids`, whose first has the place `start`."""
    spans: list[Span] = []
    for is_placeholder, run in groupby(ids, placeholder.__eq__):
        length = len([*run])
        if is_placeholder:
            spans.append((start, start + length))
        start += length
    return spans


def _key(picture: Picture, *effective: int) -> bytes:
    """Return the key of a processed picture: that of its content, and the arguments that change its arrays."""
    return picture.key + repr(effective).encode()


def _refuse_unknown(kwargs: Mapping[str, Any], allowed: Seq[str]) -> None:
    unknown = sorted(set(kwargs) - set(allowed))
    if unknown:
        expected = ", ".join(allowed) or "none, as its pictures have one size"
        raise BadRequest(f"mm_processor_kwargs has {unknown[0]!r}; this model takes {expected}", param=PARAM)


def _asked(kwargs: Mapping[str, Any], least: int, most: int) -> tuple[int, int]:
    """Return the bounds of a resized picture's pixels that `kwargs` ask for; by default `least` and `most`.

    Raises:
        BadRequest: they are no positive integers.
    """
    size = kwargs.get("size") or {}
    if not isinstance(size, Mapping) or not set(size) <= {"shortest_edge", "longest_edge"}:
        raise BadRequest(
            f"mm_processor_kwargs: size must have shortest_edge or longest_edge, got {size!r:.80}", param=PARAM
        )
    lower = _count(kwargs, "min_pixels", _count(size, "shortest_edge", least))
    upper = _count(kwargs, "max_pixels", _count(size, "longest_edge", most))
    return lower, upper


def _count(kwargs: Mapping[str, Any], name: str, default: int) -> int:
    """Return a positive integer among `kwargs`."""
    value = kwargs.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRequest(f"mm_processor_kwargs: {name} must be a positive integer, got {value!r:.80}", param=PARAM)
    return value
