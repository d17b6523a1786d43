"""Request fields that several routes share, with vLLM's names, defaults and refusals. Unknown fields are ignored,
as that wire specification says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from cenote.config import RENAMED_PARAMS
from cenote.core import LateChunkingParams
from cenote.errors import BadRequest
from cenote.functions import coalesce
from cenote.pipeline.options import ChatOptions, TextOptions
from cenote.pipeline.prompts import Applied, Prompts
from cenote.server.wire import sizes
from cenote.server.wire.encoding import EmbedDType, EncodingFormat, Endianness, byte_parts, itemsize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cenote.core import ModelInfo, PoolingParams
    from cenote.core import Sequence as Input
    from cenote.pipeline.pipeline import Service
    from cenote.tensors.quantize import Array

    Form = Callable[[Sequence[Array]], list[Any]]
    """Vectors of one length to the value of each in the answer."""

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first wrong element: a report on each of a million would take gigabytes."""
Some = Annotated[list[T], Field(fail_fast=True, min_length=1)]
"""The same, of at least one element."""
Message = dict[str, Any]
Conversation = Some[Message]


def _no_words(value: Any, read: Callable[[Any], list[int]]) -> list[int]:
    """Refuse booleans and numbers in quotes, which count as integers elsewhere."""
    ids = read(value)
    if not _WORDS.isdisjoint(map(type, value)):
        index = [*map(_WORDS.__contains__, map(type, value))].index(True)
        raise PydanticCustomError(
            "token_ids", "token ids must be integers, neither strings nor booleans", {"place": (index,)}
        )
    return ids


_WORDS = {str, bool}
TokenIds = Annotated[list[int], Field(fail_fast=True), WrapValidator(_no_words)]
TextInput = str | Many[str] | TokenIds | Many[TokenIds]
_SALT = re.compile(r"[@/\\\0]")


CONVERSED = frozenset({"messages", "input"})
"""Fields whose lists may be conversations; those of other fields are inputs, whatever keys they have."""


@dataclass(frozen=True)
class Lengths:
    """Maximum lengths of the lists of a request body.

    Attributes:
        inputs: maximum inputs.
        messages: maximum messages of a conversation.
        ids: maximum token ids of one input.
    """

    inputs: int
    messages: int
    ids: int

    def of(self, first: Any, param: str) -> tuple[int, str]:
        """Return the maximum length of a list under `param` that begins with `first`, and the noun of its elements."""
        if param in CONVERSED and isinstance(first, dict) and "role" in first:
            return max(self.messages, self.inputs), "messages"
        if isinstance(first, (int, float)):
            return self.ids, "token ids"
        return self.inputs, "inputs"


class Body(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    uncounted: ClassVar[frozenset[str]] = frozenset()
    """Fields whose lists may have any length."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        """Leave out fields that are null and have another default: some clients name every field."""
        if not isinstance(values, dict) or None not in values.values():
            return values
        return {name: value for name, value in values.items() if value is not None or name not in _defaulted(cls)}

    @classmethod
    def check_lengths(cls, values: Any, lengths: Lengths) -> None:
        """Count the lists of a parsed body before their elements are validated.

        Raises:
            BadRequest: a list is longer than `lengths` allow.
        """
        if isinstance(values, dict):
            for name in values:
                if name in cls.model_fields and name not in cls.uncounted:
                    _check_length(values[name], lengths, name)


def _check_length(value: Any, lengths: Lengths, param: str) -> None:
    if not isinstance(value, list):
        return
    first = first_of(value)
    limit, noun = lengths.of(first, param)
    if len(value) > limit:
        raise BadRequest(f"the request has {len(value)} {noun}; at most {limit} are allowed", param=param)
    if isinstance(first, list):
        for element in value:
            _check_length(element, lengths, param)


class Queued(Body):
    """Fields of requests that an engine runs."""

    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = Field(0, description="lower runs first")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="shares nothing with requests of another salt: results, pictures, common prefixes"
    )

    @model_validator(mode="after")
    def _salt(self) -> Queued:
        if self.cache_salt is not None and (len(self.cache_salt) > 128 or _SALT.search(self.cache_salt)):
            raise PydanticCustomError(
                "cache_salt",
                "`cache_salt` must be at most 128 characters without '@', '/', '\\' or NUL.",
                {"param": "cache_salt"},
            )
        return self


CUT_SIDES: dict[Any, Literal["left"]] = {"START": "left"}
"""Sides of truncation by the end that `truncate` names; a cut at the end is the default, which keeps special tokens."""


class Shared(Queued):
    """Fields of every pooling request."""

    removed: ClassVar[tuple[str, ...]] = ("normalize", "softmax", "activation")
    """Parameters of earlier releases of vLLM, which are refused with their new name."""
    cuts_unasked: ClassVar[bool | None] = None
    """Whether an input that is too long is cut where the request says nothing; `None` = as the server does."""

    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    truncation: bool | None = Field(
        None, description="true: as truncate_prompt_tokens -1; false: refuse what is too long (Voyage)"
    )
    truncate: bool | Literal["NONE", "START", "END"] | None = Field(
        None, description="as `truncation`, or the end that is cut (Jina, NVIDIA)"
    )
    padding: Literal["max_length", "do_not_pad"] | None = None
    request_id: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _removed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for old in cls.removed:
            if values.get(old) is not None:
                raise PydanticCustomError(
                    "removed_parameter",
                    f"Parameter `{old}` was removed; use `{RENAMED_PARAMS[old]}` instead.",
                    {"param": old},
                )
        return values

    @model_validator(mode="after")
    def _one_truncation(self) -> Shared:
        field = "truncation" if self.truncate is None else "truncate"
        if self.cuts is False and self.truncate_prompt_tokens is not None:
            raise PydanticCustomError(
                "exclusive",
                f"`truncate_prompt_tokens` cuts what is too long, which `{field}` refuses; give one of them.",
                {"param": field},
            )
        return self

    @property
    def cuts(self) -> bool | None:
        """Whether an input that is too long is cut; `None` = as the server does."""
        choice = coalesce(self.truncate, self.truncation)
        if choice is None:
            return self.cuts_unasked
        return choice not in (False, "NONE")

    def text_options(self, *, add_special_tokens: bool = True) -> TextOptions:
        """Return how text becomes ids."""
        length, cuts = self.truncate_prompt_tokens, self.cuts
        if length is None and cuts:
            length = -1
        side = self.truncation_side or CUT_SIDES.get(self.truncate)
        return TextOptions(length, side, self.padding == "max_length", add_special_tokens, whole=cuts is False)

    def check_media(self, service: Service) -> None:
        """Raise `BadRequest` for arguments of an image processor, unless the model has one, which checks them."""
        if service.renderer.pictures is None:
            self.refuse_media()

    def refuse_media(self) -> None:
        """Raise `BadRequest` for arguments of an image processor, where the request brings no pictures."""
        if self.mm_processor_kwargs:
            raise BadRequest("`mm_processor_kwargs` is not accepted from requests", param="mm_processor_kwargs")


class Chat(BaseModel):
    """Fields of requests that may bring messages."""

    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, dict[str, Any]] | None = None
    add_special_tokens: bool | None = Field(None, description="default: true for `input`, false for `messages`")

    @model_validator(mode="after")
    def _exclusive(self) -> Chat:
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "exclusive",
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                {"param": "continue_final_message"},
            )
        return self

    def chat_options(self, *, trust_template: bool) -> ChatOptions:
        """Return how messages become text.

        Raises:
            BadRequest: the request brings a template, and the server does not trust those.
        """
        kwargs = self.chat_template_kwargs or {}
        if not trust_template and (self.chat_template is not None or "chat_template" in kwargs):
            raise BadRequest(
                "Chat template is passed with request, but --trust-request-chat-template is not set. "
                "Refused request with untrusted chat template.",
                param="chat_template",
            )
        if self.media_io_kwargs:
            raise BadRequest("`media_io_kwargs` is not accepted from requests", param="media_io_kwargs")
        return ChatOptions(self.add_generation_prompt, self.continue_final_message, self.chat_template, kwargs)


class Inputs(Shared, Chat):
    """A request with `input` (text, ids, or lists of them) or `messages`."""

    input: TextInput | Conversation | Many[Conversation] | None = None
    messages: Conversation | Some[Conversation] | None = None
    use_activation: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Inputs:
        if (self.input is None) == (self.messages is None) and not self.for_plugin:
            raise PydanticCustomError(
                "input", "Exactly one of `input` and `messages` must be given.", {"param": "input"}
            )
        return self

    @property
    def for_plugin(self) -> bool:
        """Whether the request is for an IO-processor plugin, which takes neither `input` nor `messages`."""
        return False

    @property
    def is_plain(self) -> bool:
        """Whether rendering does nothing but tokenise."""
        return self.conversations() is None

    def conversations(self) -> list[Conversation] | None:
        """Return the conversations under `messages` or `input`; `None` if the request has text or ids."""
        source: Any = coalesce(self.messages, self.input)
        first = first_of(source)
        if isinstance(first, dict):
            return [source]
        return source if isinstance(first_of(first), dict) else None

    def prompts(self) -> list[Any]:
        """Return `input` as a list of prompts."""
        return prompts_in(self.input)

    def options(self, *, is_chat: bool) -> TextOptions:
        """Return how text becomes ids."""
        return self.text_options(add_special_tokens=coalesce(self.add_special_tokens, not is_chat))


def first_of(value: Any) -> Any:
    """Return the first element of a list, which stands for the kind of all; `None` for anything else."""
    return value[0] if isinstance(value, list) and value else None


def is_prompt(source: Any) -> bool:
    """Return whether the source of a request is one text or the ids of one, and no list of such."""
    return isinstance(source, str) or isinstance(first_of(source), int)


def prompts_in(source: Any) -> list[Any]:
    """Return the texts and ids of a request, whose source may be one alone."""
    return [source] if is_prompt(source) else list(source or [])


class LateChunking(BaseModel):
    """How a document is cut after the model has read it as a whole."""

    model_config = ConfigDict(extra="forbid")

    chunk_size: Annotated[int, Field(strict=True, ge=1, lt=2**63)]


class PoolingFields(Inputs):
    """Fields of `/v1/embeddings` and `/pooling`."""

    encoding_format: EncodingFormat = "float"
    embed_dtype: EmbedDType = "float32"
    endianness: Endianness = "native"
    dimensions: int | None = None
    late_chunking_params: LateChunking | None = Field(None, description="of token_embed: one vector per chunk")
    late_chunking: bool | None = Field(None, description="Jina's, of /v1/embeddings: the inputs are chunks of one text")
    prompt: str | None = Field(None, description="text before every input")
    prompt_name: str | None = Field(None, description="one of the model's prompts, before every input")
    input_type: str | None = Field(None, description="query, document, or one of the model's prompts")
    top_k: int | None = Field(None, ge=1, description="of sparse embeddings: number of the largest weights")
    return_tokens: bool = Field(False, description="of sparse embeddings: also the vocabulary entries as text")

    @property
    def number_bytes(self) -> float:
        """Bytes of a number in the answer, about."""
        size = itemsize(self.embed_dtype)
        return {"float": sizes.JSON_NUMBER, "base64": size * sizes.BASE64}.get(self.encoding_format, size)

    def check_answer(self, limit: int, info: ModelInfo, sequences: Sequence[Input]) -> None:
        """Refuse an answer that would be too large, before it is computed.

        Args:
            limit: maximum bytes of an answer.
            info: of the model.
            sequences: of the request.

        Raises:
            BadRequest: it has too many bytes, or metadata that no header takes.
        """
        numbers = sizes.numbers(info, sequences)
        if numbers * sizes.LARGEST_NUMBER > limit:
            sizes.check(limit, numbers, self.number_bytes)
        if self.encoding_format == "bytes":
            count = len(sequences)
            mean = numbers * itemsize(self.embed_dtype) // count
            sizes.check_header(byte_parts([mean] * count, [(mean,)] * count, self.embed_dtype, self.endianness))

    def late(self) -> LateChunkingParams | None:
        """Return the late chunking of the request.

        Raises:
            BadRequest: it comes with messages or an encoding that exclude it, or in Jina's form.
        """
        if self.late_chunking:
            raise BadRequest(
                '`late_chunking` is for embeddings alone; `late_chunking_params`: {"chunk_size": N} gives '
                "a vector for every N tokens of each input",
                param="late_chunking",
            )
        if self.late_chunking_params is None:
            return None
        if self.conversations() is not None:
            raise BadRequest("late chunking takes plain text in `input`, got messages", param="late_chunking_params")
        if self.encoding_format != "float":
            raise BadRequest(
                f"late chunking has only the encoding_format 'float', got {self.encoding_format!r}",
                param="encoding_format",
            )
        return LateChunkingParams(self.late_chunking_params.chunk_size)

    def applied(self, prompts: Prompts) -> Applied:
        """Return the prompt of the request.

        Raises:
            BadRequest: the model has no such prompt.
        """
        return prompts.choose(prompt=self.prompt, name=self.prompt_name, input_type=self.input_type)

    def form(self, service: Service, tasks: Iterable[str], params: PoolingParams) -> Form | None:
        """Return the function that makes the small forms of the request; `None` if it asks for none."""
        return None


@cache
def _defaulted(body: type[BaseModel]) -> frozenset[str]:
    """Return the names of the fields of `body` whose default is not null."""
    fields = body.model_fields.items()
    return frozenset(name for name, field in fields if field.get_default(call_default_factory=True) is not None)
