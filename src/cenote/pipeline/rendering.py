"""From what a caller sends (text, token ids, messages) to sequences: prompt, template, tokenise, cut or refuse.

Thread-safe: the shared fast tokenizer is never switched to truncation or padding. Cutting follows Hugging Face by
default (content is cut, special tokens stay); with an explicit side it follows vLLM (the finished ids are cut).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cenote.core import UNLIMITED, PoolingParams, Sequence
from cenote.errors import BadRequest, TooLong
from cenote.pipeline.prompts import Prompts
from cenote.tasks import check_params, check_task

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from cenote.core import ModelInfo, Pair, Sides
    from cenote.pipeline.prompts import Applied

CHARACTERS_PER_TOKEN = 250
"""Longer text than this many characters per allowed token is not tokenised at all."""
ENCODED_AT_ONCE = 256
"""Texts whose encodings are held at once: each token of one takes some hundred bytes."""

CHECKED = 128
"""Parameters that are not checked again: those of most requests are the same."""

Ids = list[int]
Prompt = str | Ids | Mapping[str, Any]


class TextOptions(NamedTuple):
    """How text becomes ids.

    Attributes:
        truncate: most tokens kept; -1 = the model's maximum; `None` = nothing is cut.
        side: which end is cut; `None` = the tokenizer's, keeping special tokens.
        pad: fill up with pad tokens to the most tokens allowed.
        add_special_tokens: let the tokenizer add its special tokens.
        prompt: what is put before every text; `None` = the model's default.
        whole: with `truncate` unset, refuse what is too long also where the server cuts by default.
        most: most tokens of an input, filled in by `Renderer.resolve`; 0 = the model's maximum.
    """

    truncate: int | None = None
    side: Literal["left", "right"] | None = None
    pad: bool = False
    add_special_tokens: bool = True
    prompt: Applied | None = None
    whole: bool = False
    most: int = 0


PLAIN = TextOptions()


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
    kwargs: Mapping[str, Any] | None = None


class Text(NamedTuple):
    """A tokenised text; `type_ids` is `None` where all are zero."""

    ids: Seq[int]
    type_ids: Seq[int] | None = None


class Renderer:
    """Renders for one model.

    Args:
        tokenizer: a Transformers tokenizer; its fast backend is used where there is one.
        info: limits, vocabulary and tasks of the model.
        lowercase: lower-case text before tokenising, as Sentence-Transformers' `do_lower_case`.
        prompts: the model's prompts.
        include_prompt: whether pooling looks at the prompt.
        sides: how the two sides are encoded, in a model that encodes them differently.
        auto_truncate: cut what is too long unless the request says otherwise.
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
        auto_truncate: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.info = info
        self.prompts = prompts or Prompts()
        self._sides = sides
        self._include_prompt = include_prompt
        self._skips: dict[str, int] = {}
        self.auto_truncate = auto_truncate
        self._lock = threading.Lock()
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._lowercase = lowercase
        if lowercase and self._backend is not None:
            from tokenizers.normalizers import Lowercase
            from tokenizers.normalizers import Sequence as Normalizers

            existing = self._backend.normalizer
            self._backend.normalizer = Normalizers([Lowercase(), *([existing] if existing else [])])
        self._wants_type_ids = "token_type_ids" in tokenizer.model_input_names
        self._allowed = lru_cache(CHECKED)(self._check)

    def render(
        self, prompts: Seq[Prompt | Pair], task: str, params: PoolingParams, options: TextOptions = PLAIN
    ) -> list[Sequence]:
        """Sequences for `prompts`, each text, token ids, `{"prompt": str}` or `{"prompt_token_ids": ids}`.

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
        plain = [_plain(prompt) for prompt in prompts]
        texts = [i for i, own in enumerate(plain) if isinstance(own, str)]
        cut = options
        if self._sides is not None:  # the lengths of the two sides belong to the model, so nothing is refused for them
            limit = self._sides.limit(applied.role, options.most)
            if limit is not None:
                cut = options._replace(truncate=min(limit, options.truncate or limit))
            if not self._sides.takes_special_tokens(applied.role):
                cut = cut._replace(add_special_tokens=False)
        rendered = dict(zip(texts, self._tokenize([applied.text + str(plain[i]) for i in texts], cut), strict=True))
        skip = self._skip(applied.text)
        sequences: list[Sequence] = []
        for i, own in enumerate(plain):
            if i in rendered:
                text = self.fit(rendered[i], cut)
                sequence = Sequence(text.ids, task, params, text.type_ids, skip, adapter=applied.adapter)
                if self._sides is not None:
                    sequence = self._sides.of_text(sequence, applied.role)
            else:
                text = self.fit(self._given(own, options), options)  # type: ignore[arg-type]
                sequence = Sequence(text.ids, task, params, text.type_ids, adapter=applied.adapter)
                if self._sides is not None:
                    sequence = self._sides.of_ids(sequence, applied.role)
            sequences.append(sequence)
        return sequences

    def _skip(self, prompt: str) -> int:
        """Tokens of `prompt` that pooling leaves out."""
        if self._include_prompt or not prompt:
            return 0
        if prompt not in self._skips:
            self._skips[prompt] = self._prompt_length(prompt)
        return self._skips[prompt]

    def check(self, task: str, params: PoolingParams) -> PoolingParams:
        """`params` as the engine takes them, or `BadRequest` if the model does not offer the task or the parameters."""
        return self._allowed(task, params)

    def _check(self, task: str, params: PoolingParams) -> PoolingParams:
        check_params(check_task(task, self.info.tasks), params)
        if params.dimensions is not None:
            self._check_dimensions(params.dimensions)
        self._check_step(params)
        return replace(params, task=task, extra_kwargs=None)

    def chat_text(self, messages: Seq[Mapping[str, Any]], options: ChatOptions = ChatOptions()) -> str:
        """The text of one conversation, by the request's or the model's chat template.

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
            **(options.kwargs or {}),
        }
        return self.apply_template([_flattened(message) for message in messages], options.template, kwargs)

    def apply_template(self, messages: list[dict[str, Any]], template: str | None, kwargs: Mapping[str, Any]) -> str:
        """The text that `template` (default: the tokenizer's) makes of `messages`.

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
        """Token ids of each of `texts`, of any length."""
        return [list(text.ids) for text in self._encode(texts, add_special_tokens)]

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> Ids:
        """Token ids of `text`, of any length."""
        return list(self._encode([text], add_special_tokens)[0].ids)

    @property
    def is_fast(self) -> bool:
        """Whether tokenising takes no Python and no lock."""
        return self._backend is not None

    def token_strings(self, ids: Seq[int]) -> list[str]:
        """The vocabulary entries of `ids`."""
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def detokenize(self, ids: Seq[int]) -> str:
        """The text of `ids`."""
        self._check_vocabulary(ids, param="tokens")
        return str(self.tokenizer.decode(list(ids)))

    def resolve(self, options: TextOptions, task: str = "") -> TextOptions:
        """`options` with the maximum of `task` and the server's default filled in, and checked."""
        limit = self.info.limit(task)
        if options.truncate is not None and options.truncate > limit:
            raise BadRequest(
                "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
                param="truncate_prompt_tokens",
            )
        truncate = options.truncate
        if truncate == -1 or (truncate is None and self.auto_truncate and not options.whole):
            truncate = limit if limit < UNLIMITED else None
        return options._replace(most=limit, truncate=truncate)

    def _tokenize(self, texts: list[str], options: TextOptions) -> list[Text]:
        """Ids of `texts`; those that are too long are cut as `options` say, or refused by `fit`."""
        texts = self.bounded(texts, options)
        encoded = self._encode(texts, options.add_special_tokens)
        if options.truncate is None or options.side is not None:
            return encoded
        return [
            self._cut(text, options) if len(have.ids) > options.truncate else have
            for text, have in zip(texts, encoded, strict=True)
        ]

    def bounded(self, texts: Seq[str], options: TextOptions) -> list[str]:
        """`texts` without what could never fit, which need not be tokenised.

        Raises:
            TooLong: a text is far too long, and `options` do not cut it.
        """
        limit = options.most or self.info.max_model_len
        longest = limit * CHARACTERS_PER_TOKEN
        if options.truncate is None and any(len(text) > longest for text in texts):
            raise _too_long(limit, f"at least {limit + 1}")
        left = (options.side or self.tokenizer.truncation_side) == "left"
        return [text if len(text) <= longest else text[-longest:] if left else text[:longest] for text in texts]

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[Text]:
        if self.is_fast:
            parts = (texts[i : i + ENCODED_AT_ONCE] for i in range(0, len(texts), ENCODED_AT_ONCE))
            found = (self.encodings(part, add_special_tokens=add_special_tokens, offsets=False) for part in parts)
            return [self.from_encoding(encoding) for encodings in found for encoding in encodings or ()]
        if not texts:
            return []
        with self._lock:
            texts = [text.lower() for text in texts] if self._lowercase else texts
            ids = self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
        return [Text(one, None) for one in ids]

    def _cut(self, text: str, options: TextOptions) -> Text:
        """Tokenise `text` as Hugging Face does with truncation: content is cut, special tokens stay."""
        if self._backend is not None:
            return self.from_encoding(self._cut_encoding(text, options))
        with self._lock:
            found = self.tokenizer(
                text.lower() if self._lowercase else text,
                truncation=True,
                max_length=options.truncate,
                add_special_tokens=options.add_special_tokens,
            )
        return Text(found["input_ids"][: options.truncate])

    def _cut_encoding(self, text: str, options: TextOptions) -> Encoding:
        assert self._backend is not None
        assert options.truncate is not None
        special = self.num_special_tokens() if options.add_special_tokens else 0
        encoding: Encoding = self._backend.encode(text, add_special_tokens=False)
        encoding.truncate(max(0, options.truncate - special), direction=self.tokenizer.truncation_side)
        if options.add_special_tokens:
            encoding = self._backend.post_process(encoding, None, True)
            encoding.truncate(options.truncate)  # where not even the special tokens fit
        return encoding

    def annotated(
        self, texts: Seq[str], task: str, params: PoolingParams, options: TextOptions = PLAIN
    ) -> list[tuple[Sequence, Encoding]]:
        """Sequences for `texts`, each with the encoding that says which characters a token stands for.

        Raises:
            BadRequest: as `render`; or the tokenizer keeps no offsets.
        """
        params = self.check(task, params)
        options = self.resolve(options)
        if options.side is not None or options.pad:
            raise BadRequest(
                "`truncation_side` and `padding` are not supported where characters are counted",
                param="truncation_side",
            )
        found = self.encodings(self.bounded(texts, options), add_special_tokens=options.add_special_tokens)
        if found is None:
            raise BadRequest(f"the tokenizer of {self.info.name} keeps no character offsets")
        if options.truncate is not None:
            uncut = zip(texts, found, strict=True)
            found = [self._cut_encoding(t, options) if len(e) > options.truncate else e for t, e in uncut]
        fitted = [self.fit(self.from_encoding(encoding), options) for encoding in found]
        own = self.prompts.choose().adapter
        pairs = zip(fitted, found, strict=True)
        return [(Sequence(t.ids, task, params, t.type_ids, adapter=own), e) for t, e in pairs]

    def encodings(self, texts: list[str], *, add_special_tokens: bool, offsets: bool = True) -> list[Encoding] | None:
        """What the fast tokenizer makes of `texts`; `None` if there is only a slow one.

        Args:
            texts: any number.
            add_special_tokens: let it add its own.
            offsets: keep which characters a token stands for.

        Raises:
            BadRequest: a text is no valid Unicode.
        """
        if self._backend is None:
            return None
        try:
            encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
            found: list[Encoding] = encode(texts, add_special_tokens=add_special_tokens)
        except TypeError:  # what tokenizers calls a str that has no UTF-8
            raise BadRequest("text must be valid Unicode, without lone surrogates", param="input") from None
        return found

    def num_special_tokens(self, *, pair: bool = False) -> int:
        """How many special tokens the tokenizer adds to a text or a pair."""
        assert self._backend is not None
        return int(self._backend.num_special_tokens_to_add(pair))

    def shortened(self, encoding: Encoding, length: int) -> Encoding:
        """A copy of `encoding` that is cut to `length` tokens, on the tokenizer's side."""
        from tokenizers import Encoding

        copy = Encoding.merge([encoding])
        copy.truncate(length, direction=self.tokenizer.truncation_side)
        return copy

    def post_process(self, first: Encoding, second: Encoding | None, add_special_tokens: bool) -> Encoding:
        """Add special tokens to one or two encodings and join them."""
        assert self._backend is not None
        joined: Encoding = self._backend.post_process(first, second, add_special_tokens)
        return joined

    def pair_ids(self, pairs: list[tuple[str, str]], options: TextOptions) -> list[tuple[Ids, Ids | None]]:
        """Ids and type ids of pairs, by a tokenizer that has no fast backend."""
        cut: dict[str, Any] = {}
        if options.truncate is not None and options.side is None:
            cut = {"truncation": "longest_first", "max_length": options.truncate}
        with self._lock:
            firsts, seconds = ([t.lower() if self._lowercase else t for t in side] for side in zip(*pairs, strict=True))
            found = self.tokenizer(firsts, seconds, add_special_tokens=options.add_special_tokens, **cut)
        ids: list[Ids] = found["input_ids"]
        types: list[Ids] | list[None] = found["token_type_ids"] if self._wants_type_ids else [None] * len(ids)
        most = cut.get("max_length")  # also where not even the special tokens fit
        return [(i[:most], t and t[:most]) for i, t in zip(ids, types, strict=True)]

    def from_encoding(self, encoding: Encoding) -> Text:
        """Its ids, and its type ids where the model takes any."""
        ids = encoding.ids
        if not self._wants_type_ids:
            return Text(ids, None)
        type_ids = encoding.type_ids
        return Text(ids, type_ids if any(type_ids) else None)

    def _given(self, ids: Ids, options: TextOptions) -> Text:
        """Token ids as the caller sent them."""
        self._check_vocabulary(ids)
        return Text(self._sliced(ids, options), None)

    def fit(self, text: Text, options: TextOptions) -> Text:
        """Cut on an explicit side, pad, and refuse what is empty or still too long."""
        if options.side is not None and options.truncate is not None and len(text.ids) > options.truncate:
            types = None if text.type_ids is None else self._sliced(text.type_ids, options)
            text = Text(self._sliced(text.ids, options), types)
        if not len(text.ids):
            raise BadRequest("The decoder prompt cannot be empty", param="input")
        limit = options.most or self.info.max_model_len
        if len(text.ids) > limit:
            raise _too_long(limit, str(len(text.ids)))
        if options.pad:
            full = options.truncate or (limit if limit < UNLIMITED else self.info.max_model_len)
            missing = full - len(text.ids)
            pad = self.tokenizer.pad_token_id or 0
            types = None if text.type_ids is None else [*text.type_ids, *[0] * missing]
            return Text([*text.ids, *[pad] * missing], types)
        return text

    def _sliced(self, ids: Seq[int], options: TextOptions) -> Seq[int]:
        if options.truncate is None or len(ids) <= options.truncate:
            return ids
        side = options.side or self.tokenizer.truncation_side
        return ids[len(ids) - options.truncate :] if side == "left" else ids[: options.truncate]

    def _check_vocabulary(self, ids: Seq[int], *, param: str = "input") -> None:
        if not len(ids):
            return
        try:
            values = np.asarray(ids, dtype=np.int64)
            low, high = int(values.min()), int(values.max())
        except OverflowError:
            low, high = min(ids), max(ids)
        except (ValueError, TypeError) as error:
            raise BadRequest(f"token ids must be integers: {error}", param=param) from None
        if low < 0 or high >= self.info.vocab_size:
            bad = low if low < 0 else high
            raise BadRequest(
                f"Token id {bad} is out of vocabulary; {self.info.name} takes ids from 0 to {self.info.vocab_size - 1}",
                param=param,
            )

    def _check_dimensions(self, dimensions: int) -> None:
        """Words of vLLM's refusals, which clients match on."""
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
                    f"{name} is for process reward models (pooling type STEP); {self.info.name} is none", param=name
                )
        if params.step_tag_id is not None:
            self._check_vocabulary([params.step_tag_id], param="step_tag_id")
        for column in params.returned_token_ids or ():
            if column not in self.info.columns:
                raise BadRequest(
                    f"returned_token_ids: {column} is no column of {self.info.name}'s head", param="returned_token_ids"
                )

    def _prompt_length(self, prompt: str) -> int:
        """Tokens of the prompt, as sentence-transformers counts them: without a closing special token."""
        ids = self.tokenize(prompt)
        return len(ids) - 1 if ids and ids[-1] in self.tokenizer.all_special_ids else len(ids)


def _too_long(limit: int, count: str) -> TooLong:
    return TooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains "
        f"{count} input tokens, which exceeds this limit even without any output tokens. Please reduce the length "
        "of the input prompt.",
        param="input_tokens",
    )


def _plain(prompt: Prompt | Pair) -> str | Ids:
    """Return the text or the ids of a prompt; a pair is neither."""
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown:
            raise BadRequest(f"a prompt has keys that are not supported: {sorted(unknown)}", param="input")
        if len(prompt) != 1:
            raise BadRequest("a prompt has either `prompt` or `prompt_token_ids`", param="input")
        (prompt,) = prompt.values()
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, (list, tuple, np.ndarray)) and all(isinstance(i, (int, np.integer)) for i in prompt):
        return list(prompt)  # type: ignore[arg-type]
    raise BadRequest(f"a prompt is text or a list of token ids, got {type(prompt).__name__}", param="input")


def _flattened(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content parts are joined into one text, as templates of text models expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
            raise BadRequest(
                f"content parts of type {kind!r} are not supported by this model, only text", param="messages"
            )
    return {**message, "content": "\n".join(texts)}
