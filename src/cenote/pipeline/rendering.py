"""From text, token ids or messages to sequences: prompt, template, tokenise, cut or refuse.

Cutting follows Hugging Face by default (content is cut, special tokens stay); with an explicit side it follows vLLM
(the finished ids are cut).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cenote.core import UNLIMITED, Alike, PoolingParams, Sequence
from cenote.errors import BadRequest, TooLong
from cenote.pipeline.messages import MessageRenderer
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.tokenizing import ENCODED_AT_ONCE, FastTokenizer, Ids, Text, fast_or_slow
from cenote.tasks import check_params, check_task

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as Seq

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from cenote.core import MessageTemplate, ModelInfo, Pair, Role, Sides
    from cenote.pipeline.prompts import Applied

COUNTED = 250
"""Characters per allowed token up to which a text that is refused for its tokens is told how many it has."""
REMEMBERED, LONGEST_REMEMBERED = 128, 4096
"""Parameters that are remembered as checked, and characters of prompts whose lengths are: most requests repeat them."""

Prompt = str | Ids | Mapping[str, Any]


class TextOptions(NamedTuple):
    """How text becomes ids.

    Attributes:
        truncate: maximum tokens kept; -1 = the model's maximum; `None` = nothing is cut.
        side: end that is cut; `None` = the tokenizer's, keeping special tokens.
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
    """

    tokens: int = UNLIMITED
    characters: int = UNLIMITED


class Budget:
    """Tokens that a request may still run."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._spent = 0

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


class Renderer:
    """Renders the inputs of one model.

    Args:
        tokenizer: a Transformers tokenizer; its fast backend is used where there is one.
        info: limits, vocabulary and tasks of the model.
        lowercase: lower-case text before tokenising, as Sentence-Transformers' `do_lower_case`.
        prompts: the model's prompts.
        include_prompt: whether pooling includes the tokens of the prompt.
        sides: the encoding of queries and of documents, in a model that encodes them differently.
        messages: the template that renders every text; `None` = texts are taken as they are.
        special_tokens: the tokenizer's special tokens belong to the model's inputs.
        auto_truncate: cut inputs that are too long unless the request says otherwise.

    Attributes:
        bounds: of one request's work; a server sets them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        info: ModelInfo,
        *,
        lowercase: bool = False,
        prompts: Prompts | None = None,
        include_prompt: bool = True,
        sides: Sides | None = None,
        messages: MessageTemplate | None = None,
        special_tokens: bool = True,
        auto_truncate: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.info = info
        self.prompts = prompts or Prompts()
        self._sides = sides or Alike()
        self._include_prompt = include_prompt
        self._messages: MessageRenderer | None = None
        if messages is not None:
            self._messages = MessageRenderer(messages, self.apply_template, self._rendered_ids)
        self._special_tokens = special_tokens
        self.auto_truncate = auto_truncate
        self.bounds = Bounds()
        self.backend = fast_or_slow(tokenizer, lowercase=lowercase)
        self._allowed = lru_cache(REMEMBERED)(self._check)
        self._length = lru_cache(REMEMBERED)(self._prompt_length)

    def prompting(self, prompts: Prompts) -> Renderer:
        """Return a renderer with these prompts instead."""
        other = copy.copy(self)
        other.prompts = prompts
        return other

    def render(
        self, prompts: Seq[Prompt | Pair], task: str, params: PoolingParams, options: TextOptions = PLAIN
    ) -> list[Sequence]:
        """Return sequences for `prompts`, each text, token ids, `{"prompt": str}` or `{"prompt_token_ids": ids}`.

        Raises:
            BadRequest: there is no prompt, one is empty, an id is outside the vocabulary, or a parameter is not
                allowed.
            TooLong: an input has more tokens than the model takes and `options` do not cut it.
        """
        if not len(prompts):
            raise BadRequest("You must pass at least one prompt", param="input")
        params = self.check(task, params)
        options = self.resolve(options, task)
        applied = options.prompt or self.prompts.choose()
        contents = [_content(prompt) for prompt in prompts]
        text_options = self._of_side(options, applied.role)
        budget = Budget(self.bounds.tokens)
        texts = (content for content in contents if isinstance(content, str))
        tokenised, skip = self._prompted(texts, applied, text_options)
        sequences: list[Sequence] = []
        for content in contents:
            if isinstance(content, str):
                (text,) = self.fit_all([next(tokenised)], text_options, budget)
                sequence = Sequence(text.ids, task, params, text.type_ids, skip, adapter=applied.adapter)
                sequence = self._sides.of_text(sequence, applied.role)
            else:
                (text,) = self.fit_all([self._text_of_ids(content, options)], options, budget)
                sequence = Sequence(text.ids, task, params, text.type_ids, adapter=applied.adapter)
                sequence = self._sides.of_ids(sequence, applied.role)
            sequences.append(sequence)
        return sequences

    def _prompted(self, texts: Iterable[str], applied: Applied, options: TextOptions) -> tuple[Iterator[Text], int]:
        """Return `texts` behind their prompt, and the number of its tokens that pooling leaves out.

        Tokens of a prompt that is a message are never left out, as in sentence-transformers.
        """
        messages = self._messages
        if messages is None or options.rendered or not self._sides.takes_special_tokens(applied.role):
            prompted = (applied.text + text for text in texts)
            return self._tokenize(prompted, options), self.skip(applied.text, options)
        rendered = (messages.text(text, applied.text, applied.role) for text in texts)
        tokenised = self._tokenize(rendered, options._replace(add_special_tokens=False))
        limit = options.content_limit
        return (messages.restored(text, limit, applied) for text in tokenised), 0

    def _rendered_ids(self, text: str) -> Ids:
        return self.tokenize(text, add_special_tokens=False)

    def _of_side(self, options: TextOptions, role: Role | None) -> TextOptions:
        """Return the options of texts of one side: its length belongs to the model, so nothing is refused for it."""
        limit = self._sides.limit(role, options.limit)
        if limit is not None:
            options = options._replace(truncate=min(limit, options.truncate or limit))
        if not self._sides.takes_special_tokens(role):
            options = options._replace(add_special_tokens=False)
        return options

    def skip(self, prompt: str, options: TextOptions) -> int:
        """Return the number of tokens of `prompt` that pooling leaves out."""
        if self._include_prompt or not prompt:
            return 0
        count = self._length if len(prompt) <= LONGEST_REMEMBERED else self._prompt_length
        return count(prompt, options.content_limit, options.add_special_tokens)

    def check(self, task: str, params: PoolingParams) -> PoolingParams:
        """Return `params` with the task filled in.

        Raises:
            BadRequest: the model does not offer the task or a parameter.
        """
        return self._allowed(task, params)

    def _check(self, task: str, params: PoolingParams) -> PoolingParams:
        if params.dimensions in (0, self.info.dimension):  # some clients always send a size
            params = replace(params, dimensions=None)
        check_params(check_task(task, self.info.tasks), params)
        if params.dimensions is not None:
            self._check_dimensions(params.dimensions)
        self._check_step(params)
        return replace(params, task=task, extra_kwargs=None)

    def chat_text(self, messages: Seq[Mapping[str, Any]], options: ChatOptions = ChatOptions()) -> str:
        """Return the text of one conversation, by the request's or the model's chat template.

        Raises:
            BadRequest: there is no template, or it refuses these messages.
        """
        if options.add_generation_prompt and options.continue_final_message:
            raise BadRequest("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        if not messages:
            raise BadRequest("`messages` must not be empty", param="messages")
        if options.template is None and not self.tokenizer.chat_template:
            raise BadRequest(
                f"{self.info.name} has no chat template, so `messages` cannot be rendered; send `input`, "
                "or start the server with --chat-template",
                param="messages",
            )
        kwargs = {
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
            **options.kwargs,
        }
        return self.apply_template(list(map(_flattened, messages)), options.template, kwargs)

    def apply_template(self, messages: list[dict[str, Any]], template: str | None, kwargs: Mapping[str, Any]) -> str:
        """Render `messages` by `template` (default: the tokenizer's).

        Raises:
            BadRequest: the template refuses them.
        """
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **kwargs)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise BadRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        return str(text)

    def tokenize_all(self, texts: list[str], *, add_special_tokens: bool = True) -> list[Ids]:
        """Return the token ids of each of `texts`, of any length."""
        return [list(text.ids) for text in self.backend.tokenize(texts, special=add_special_tokens)]

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> Ids:
        """Return the token ids of `text`, of any length."""
        (ids,) = self.tokenize_all([text], add_special_tokens=add_special_tokens)
        return ids

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer has a fast backend, which needs no lock."""
        return isinstance(self.backend, FastTokenizer)

    def token_strings(self, ids: Seq[int]) -> list[str]:
        """Return the vocabulary entries of `ids`."""
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def detokenize(self, ids: Seq[int]) -> str:
        """Return the text of `ids`."""
        self._check_vocabulary(ids, param="tokens")
        return str(self.tokenizer.decode(list(ids)))

    def resolve(self, options: TextOptions, task: str = "") -> TextOptions:
        """Return `options` with the limit of `task` and the server's default filled in.

        Raises:
            BadRequest: `options.truncate` is above the limit.
        """
        limit = self.info.limit(task)
        truncate = options.truncate
        if truncate is None and self.auto_truncate and not options.whole:
            truncate = -1
        if truncate == -1:
            truncate = limit
        if truncate is not None and truncate > limit:
            raise BadRequest(
                "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
                param="truncate_prompt_tokens",
            )
        special = options.add_special_tokens and self._special_tokens
        return options._replace(limit=limit, truncate=truncate, add_special_tokens=special)

    def _tokenize(self, texts: Iterable[str], options: TextOptions) -> Iterator[Text]:
        """Tokenise `texts`, some at a time. Those that are too long are cut here, or cut or refused by `fit`."""
        special, limit = options.add_special_tokens, options.content_limit
        rest = iter(texts)
        while part := self.bounded(islice(rest, ENCODED_AT_ONCE), options):
            tokenised = self.backend.tokenize(part, special=special)
            for text, whole in zip(part, tokenised, strict=True):
                yield whole if len(whole.ids) <= limit else self.backend.cut(text, limit, special=special)

    def fit_all(self, texts: Iterable[Text], options: TextOptions, budget: Budget) -> list[Text]:
        """Fit each of `texts`, as far as the budget goes."""
        fitted = []
        for text in texts:
            fitted.append(self.fit(text, options))
            budget.spend(len(fitted[-1].ids))
        return fitted

    def bounded(self, texts: Iterable[str], options: TextOptions) -> list[str]:
        """Return `texts`, of long ones only a part that has all tokens that count.

        Raises:
            TooLong: a text is too long, and `options` do not cut it.
            BadRequest: a text cannot be tokenised in part, and has too many characters.
        """
        return [self._bounded(text, options) for text in texts]

    def _bounded(self, text: str, options: TextOptions) -> str:
        if options.truncate is not None:
            return self.enough(text, options.truncate, options.side)
        if len(text) > COUNTED * options.limit and len(self.enough(text, options.limit)) < len(text):
            raise _too_long(options.limit, f"at least {options.limit + 1}")
        return self.whole(text)

    def enough(self, text: str, limit: int, side: Literal["left", "right"] | None = None) -> str:
        """Return a part of `text` that has more than `limit` tokens, those that are kept where it is cut.

        Args:
            text: returned whole where it is short, or where no part of it has these tokens for sure.
            limit: maximum tokens.
            side: end that is cut; `None` = the tokenizer's.

        Raises:
            BadRequest: it has to be tokenised whole, and has too many characters.
        """
        from_end = (side or self.tokenizer.truncation_side) == "left"
        return self.whole(self.backend.enough(text, limit + 1, from_end=from_end))

    def whole(self, text: str) -> str:
        """Return `text`, which is to be tokenised whole.

        Raises:
            BadRequest: it has too many characters.
        """
        if len(text) > self.bounds.characters:
            raise BadRequest(
                f"{len(text)} characters of a text have to be tokenised, because too few words of it can be cut off "
                f"before; at most {self.bounds.characters} may (--max-text-characters). Send it in parts",
                param="input",
            )
        return text

    def _kept(self, length: int, limit: int, options: TextOptions) -> slice:
        """Return the places of the `limit` characters or ids, of `length`, that are kept."""
        side = options.side or self.tokenizer.truncation_side
        if side == "left":
            return slice(max(0, length - limit), None)
        return slice(limit)

    def annotated(
        self, texts: Seq[str], task: str, params: PoolingParams, options: TextOptions = PLAIN
    ) -> list[tuple[Sequence, Encoding]]:
        """Return sequences for `texts`, each with its encoding, which maps tokens to characters.

        Raises:
            BadRequest: as `render`; or the tokenizer keeps no offsets.
        """
        params = self.check(task, params)
        options = self.resolve(options)
        if self._messages is not None:
            raise BadRequest(
                f"{self.info.name} renders texts by a chat template, so the characters of its tokens are not those of "
                "the text, and cannot be counted"
            )
        if options.side is not None or options.pad:
            raise BadRequest(
                "`truncation_side` and `padding` are not supported where characters are counted",
                param="truncation_side",
            )
        if not isinstance(self.backend, FastTokenizer):
            raise BadRequest(f"the tokenizer of {self.info.name} keeps no character offsets")
        texts = self.bounded(texts, options)
        budget = Budget(self.bounds.tokens)
        special, limit = options.add_special_tokens, options.content_limit
        adapter = self.prompts.choose().adapter
        annotated: list[tuple[Sequence, Encoding]] = []
        for text, encoding in zip(texts, self.backend.encodings(texts, special=special), strict=True):
            if len(encoding) > limit:
                encoding = self.backend.cut_encoding(text, limit, special=special)
            fitted = self.fit(self.backend.text_of(encoding), options)
            budget.spend(len(fitted.ids))
            annotated.append((Sequence(fitted.ids, task, params, fitted.type_ids, adapter=adapter), encoding))
        return annotated

    def _text_of_ids(self, ids: Ids, options: TextOptions) -> Text:
        self._check_vocabulary(ids)
        return self._sliced(Text(ids), options)

    def fit(self, text: Text, options: TextOptions) -> Text:
        """Cut finished ids on an explicit side, and pad.

        Raises:
            BadRequest: `text` has no tokens, or the model has no embedding for one of them or for its type.
            TooLong: it has more tokens than `options` allow.
        """
        if options.side is not None:
            text = self._sliced(text, options)
        if not len(text.ids):
            raise BadRequest("The decoder prompt cannot be empty", param="input")
        if len(text.ids) > options.limit:
            raise _too_long(options.limit, str(len(text.ids)))
        if options.pad:
            text = self._padded(text, options)
        self._check_tables(text)
        return text

    def _check_tables(self, text: Text) -> None:
        """Raise `BadRequest` for ids beyond the model's tables, made by a tokenizer that does not fit it."""
        info = self.info
        highest = max(text.ids)
        if highest >= info.vocab_size:
            (token,) = self.token_strings([highest])
            raise BadRequest(
                f"got the token {token!r} (id {highest}), for which {info.name} has no embedding; its ids go from 0 to "
                f"{info.vocab_size - 1}, and its tokenizer knows more; leave that token out",
                param="input",
            )
        if text.type_ids is not None and max(text.type_ids) >= (info.type_vocab_size or UNLIMITED):
            raise BadRequest(
                f"got tokens of type {max(text.type_ids)}, but {info.name} knows types below {info.type_vocab_size}, "
                "so it reads no pairs of texts; send single texts, or a pair joined to one",
                param="input",
            )

    def _padded(self, text: Text, options: TextOptions) -> Text:
        length = options.truncate or options.limit
        if length == UNLIMITED:
            length = self.info.max_model_len
        Budget(self.bounds.tokens).spend(length)  # before so many are made
        pad = self.tokenizer.pad_token_id or 0
        return text.extended([pad] * (length - len(text.ids)))

    def _sliced(self, text: Text, options: TextOptions) -> Text:
        """Return `text` without finished ids beyond `options.truncate`."""
        if options.truncate is None or len(text.ids) <= options.truncate:
            return text
        return text.part(self._kept(len(text.ids), options.truncate, options))

    def _check_vocabulary(self, ids: Seq[int], *, param: str = "input") -> None:
        if not len(ids):
            return
        low, high = _range(ids, param)
        size = self.info.vocab_size
        farthest = low if low < 0 else high
        if farthest not in range(size):
            raise BadRequest(
                f"Token id {farthest} is out of vocabulary; {self.info.name} takes ids from 0 to {size - 1}",
                param=param,
            )

    def _check_dimensions(self, dimensions: int) -> None:
        """Raise `BadRequest` in the words of vLLM, which clients match on, if `dimensions` is not allowed."""
        name, allowed, width = self.info.name, self.info.matryoshka, self.info.dimension
        if allowed is None:
            fault = (
                f"Model '{name}' does not support Matryoshka embeddings; "
                f"dimensions must be unset (received dimensions={dimensions})."
            )
        elif allowed and dimensions not in allowed:
            fault = f"Model '{name}' only supports Matryoshka dimensions {list(allowed)}, got {dimensions}."
        elif not 1 <= dimensions <= width:
            fault = f"Model '{name}' only supports dimensions in range [1, {width}], got {dimensions}."
        else:
            return
        raise BadRequest(fault, param="dimensions")

    def _check_step(self, params: PoolingParams) -> None:
        for name in ("step_tag_id", "returned_token_ids"):
            if getattr(params, name) is not None and not self.info.step:
                raise BadRequest(
                    f"{name} is for process reward models (pooling type STEP); {self.info.name} is not one",
                    param=name,
                )
        if params.step_tag_id is not None:
            self._check_vocabulary([params.step_tag_id], param="step_tag_id")
        for column in params.returned_token_ids or ():
            if column not in self.info.columns:
                raise BadRequest(
                    f"returned_token_ids: {column} is no column of {self.info.name}'s head",
                    param="returned_token_ids",
                )

    def _prompt_length(self, prompt: str, limit: int, special: bool) -> int:
        """Count the tokens of a prompt as sentence-transformers: cut like a text, without a closing special one."""
        most = min(limit, self.info.limit("embed"))
        prompt = self.backend.enough(prompt, most + 1, from_end=False)
        (text,) = self.backend.tokenize([prompt], special=special)
        if len(text.ids) > limit:
            text = self.backend.cut(prompt, limit, special=special)
        closing = set(self.tokenizer.all_special_ids).intersection(text.ids[-1:])
        return len(text.ids) - len(closing)


def is_ids(prompt: Any) -> bool:
    """Return whether `prompt` is a list, tuple or array of integers, which booleans are not."""
    if not isinstance(prompt, (list, tuple, np.ndarray)):
        return False
    return all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, prompt)))


def listed(prompts: Any) -> list[Any]:
    """Return prompts as a list: one text, mapping or list of ids is a single prompt."""
    is_one = isinstance(prompts, (str, bytes, bytearray, memoryview)) or hasattr(prompts, "keys")
    if is_one or not hasattr(prompts, "__iter__"):
        return [prompts]
    elements = list(prompts)
    return [elements] if elements and is_ids(elements) else elements


def is_count(value: Any) -> bool:
    """Return whether `value` is a non-negative integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _range(ids: Seq[int], param: str) -> tuple[int, int]:
    """Return the lowest and the highest of some ids."""
    try:
        values = np.asarray(ids, dtype=np.int64)
    except OverflowError:
        return min(ids), max(ids)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"token ids must be integers: {error}", param=param) from None
    return int(values.min()), int(values.max())


def _too_long(limit: int, count: str) -> TooLong:
    return TooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains "
        f"{count} input tokens, which exceeds this limit even without any output tokens. Please reduce the length "
        "of the input prompt.",
        param="input_tokens",
    )


def _content(prompt: Prompt | Pair) -> str | Ids:
    """Return the text or the ids of a prompt; a pair has neither."""
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown:
            raise BadRequest(f"a prompt has keys that are not supported: {sorted(unknown)}", param="input")
        if len(prompt) != 1:
            raise BadRequest("a prompt has either `prompt` or `prompt_token_ids`", param="input")
        (prompt,) = prompt.values()
    if isinstance(prompt, str):
        return prompt
    if is_ids(prompt):
        return list(prompt)  # type: ignore[arg-type]
    raise BadRequest(f"a prompt is text or a list of token ids, got {type(prompt).__name__}", param="input")


def _flattened(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its content parts joined into one text, as templates of text models expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": "\n".join(map(_text_of_part, content))}


def _text_of_part(part: Any) -> str:
    """Return the text of a content part: a str, or a mapping of type "text"."""
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, Mapping) else {"type": type(part).__name__}
    text = fields.get("text")
    if fields.get("type", "text") == "text" and isinstance(text, str):
        return text
    kind = fields.get("type", "?")
    raise BadRequest(f"content parts of type {kind!r} are not supported by this model, only text", param="messages")
