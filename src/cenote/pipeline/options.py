"""Options of rendering: how text and messages become ids, and how much work one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cenote.core import UNLIMITED
from cenote.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Sequence as Seq

    from cenote.core import Media, Sequence
    from cenote.pipeline.prompts import Applied


class TextOptions(NamedTuple):
    """How text becomes ids.

    Attributes:
        truncate: maximum tokens kept; -1 = the model's maximum; `None` = nothing is cut.
        side: end at which finished ids are cut; `None` = the content is cut, and special tokens stay.
        content_side: end at which content is cut; `None` = the tokenizer's.
        pad: fill up with pad tokens to the maximum allowed.
        add_special_tokens: let the tokenizer add its special tokens.
        prompt: prompt before every text; `None` = the model's default.
        rendered: the text was made of messages, so that no template renders it once more.
        whole: with `truncate` unset, refuse inputs that are too long also where the server cuts by default.
        limit: maximum tokens per input, filled in by `Renderer.resolve`.
    """

    truncate: int | None = None
    side: Literal["left", "right"] | None = None
    pad: bool = False
    add_special_tokens: bool = True
    prompt: Applied | None = None
    rendered: bool = False
    whole: bool = False
    limit: int = 0
    content_side: Literal["left", "right"] | None = None

    @property
    def content_limit(self) -> int:
        """Maximum tokens where content is cut and special tokens stay, else `UNLIMITED`."""
        if self.side is not None or self.truncate is None:
            return UNLIMITED
        return self.truncate


PLAIN = TextOptions()


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of one request's work, whatever its inputs are.

    Attributes:
        tokens: maximum tokens to run, pad tokens included.
        characters: maximum characters of a text that has to be tokenised whole.
        template_steps: steps of a chat template, see `cenote.pipeline.templates`.
        template_seconds: its CPU time.
        picture_bytes: maximum bytes of its pictures, processed, which are held until they have run.
    """

    tokens: int = UNLIMITED
    characters: int = UNLIMITED
    template_steps: int = 1 << 20
    template_seconds: float = 5
    picture_bytes: int = UNLIMITED

    def check(self, sequences: Seq[Sequence]) -> None:
        """Refuse a request whose parts are within the bounds, and all of them are not.

        Args:
            sequences: all that it is to run.

        Raises:
            BadRequest: there are too many tokens, or bytes of pictures.
        """
        budget = Budget(self.tokens, self.picture_bytes)
        budget.spend(sum(map(len, sequences)))
        budget.hold(chain.from_iterable(sequence.media for sequence in sequences))


class Budget:
    """Tokens that a request may still run, and bytes of pictures that it may hold."""

    def __init__(self, limit: int, picture_bytes: int = UNLIMITED) -> None:
        self._limit = limit
        self._spent = 0
        self._picture_bytes = picture_bytes
        self._sizes: dict[bytes, int] = {}

    def spend(self, tokens: int) -> None:
        """Take `tokens` off.

        Raises:
            BadRequest: so many are not left.
        """
        self._spent += tokens
        if self._spent > self._limit:
            raise BadRequest(
                f"the request has at least {self._spent} tokens to run, prompts and padding included; at most "
                f"{self._limit} are allowed (--max-request-tokens). Send it in parts",
                param="input",
            )

    def hold(self, media: Iterable[Media]) -> None:
        """Take the bytes of processed pictures off, of each content once.

        Raises:
            BadRequest: so many are not left.
        """
        self._sizes |= {medium.key: medium.nbytes for medium in media}
        held = sum(self._sizes.values())
        if held > self._picture_bytes:
            raise BadRequest(
                f"the pictures of the request have at least {held} bytes when they are processed; at most "
                f"{self._picture_bytes} are held (--max-picture-bytes). Send it in parts",
                param="image",
            )


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How messages become text.

    Attributes:
        template: a Jinja template instead of the model's own.
        kwargs: further variables of the template.
    """

    add_generation_prompt: bool = False
    continue_final_message: bool = False
    template: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


PLAIN_CHAT = ChatOptions()
