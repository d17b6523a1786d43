"""From text, token ids or prompts with pictures to sequences: prompt, template, tokenise, cut or refuse.

Cutting follows Hugging Face by default (content is cut, special tokens stay); with an explicit side it follows vLLM
(the finished ids are cut).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, count, islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cenote.conventions import Alike
from cenote.core import UNLIMITED, PoolingParams, Sequence
from cenote.errors import BadRequest, TooLong
from cenote.functions import coalesce, map_apart
from cenote.pipeline.checks import check_types, check_vocabulary, checked, too_long, unknown_token
from cenote.pipeline.conversations import ChatTemplate, Conversations
from cenote.pipeline.inputs import Illustrated, content_of
from cenote.pipeline.media import awaited
from cenote.pipeline.messages import MessageRenderer
from cenote.pipeline.options import PLAIN, Bounds, Budget, TextOptions
from cenote.pipeline.pictures import PictureRenderer, Placed, Processed, kept
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.tokenizing import ENCODED_AT_ONCE, FastTokenizer, Ids, Text, fast_or_slow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from collections.abc import Sequence as Seq

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from cenote.conventions import Cuts, MessageTemplate, Pictures, Role, Sides
    from cenote.core import ModelInfo
    from cenote.pipeline.inputs import Pair, Prompt
    from cenote.pipeline.media import Access
    from cenote.pipeline.prompts import Applied

COUNTED = 250
"""Characters per allowed token up to which a text that is refused for its tokens is told how many it has."""
REMEMBERED, LONGEST_REMEMBERED = 128, 4096
"""Parameters that are remembered as checked, and characters of prompts whose lengths are: most requests repeat them."""


class Annotated(NamedTuple):
    """A text of which each token has its place.

    Attributes:
        sequence: of the text.
        encoding: its tokens, special tokens included, and their characters.
        first: character of the text from which these count.
    """

    sequence: Sequence
    encoding: Encoding
    first: int


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
        cuts: text of a pair that is cut.
        pictures: how the model's inputs hold pictures; `None` = it has no part for them.

    Attributes:
        bounds: of one request's work, see `restrict`.
        read_ids: reads token ids that a request brings, likewise; `None` = they are run as they are.
        template: the chat template of the tokenizer.
        conversations: makes prompts of messages and of content parts.
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
        cuts: Cuts = "longest_first",
        pictures: Pictures | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.info = info
        self.prompts = prompts or Prompts()
        self._sides = sides or Alike()
        self._include_prompt = include_prompt
        self.template = ChatTemplate(tokenizer)
        self._messages: MessageRenderer | None = None
        if messages is not None:
            self._messages = MessageRenderer(messages, self.template.apply, self._rendered_ids)
        self._special_tokens = special_tokens
        self.auto_truncate = auto_truncate
        self.bounds = Bounds()
        self.read_ids: Callable[[Ids], Ids | str] | None = None
        self.backend = fast_or_slow(tokenizer, lowercase=lowercase, cuts=cuts)
        self.pictures: PictureRenderer | None = None
        if pictures is not None:
            has_template = bool(tokenizer.chat_template)
            self.pictures = PictureRenderer(
                pictures, info.name, self.template.apply, self._rendered_ids, self.token_strings, has_template
            )
        self.conversations = Conversations(info.name, self.template, self.pictures)
        self._allowed = lru_cache(REMEMBERED)(partial(checked, info))
        self._length = lru_cache(REMEMBERED)(self._prompt_length)

    def prompting(self, prompts: Prompts) -> Renderer:
        """Return a renderer with these prompts instead."""
        other = copy.copy(self)
        other.prompts = prompts
        return other

    def restrict(
        self,
        bounds: Bounds,
        access: Access,
        template_defaults: Mapping[str, Any],
        read_ids: Callable[[Ids], Ids | str] | None,
    ) -> None:
        """Take what a server says of requests.

        Args:
            bounds: of one request's work.
            access: places from which pictures may be read.
            template_defaults: variables of chat templates that requests do not set.
            read_ids: see `read_ids`.
        """
        self.bounds = self.template.bounds = bounds
        self.template.defaults = template_defaults
        self.read_ids = read_ids
        if self.pictures is not None:
            self.pictures.allow(access)

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
        contents = list(map(self._content, prompts, count()))
        if self.pictures is not None and not options.rendered:
            contents = list(map(self.pictures.with_blank, contents))
        self._await(contents)
        text_options = self._of_side(options, applied.role)
        budget = Budget(self.bounds.tokens, self.bounds.picture_bytes)

        def of_texts(texts: Iterable[Any]) -> Iterator[Sequence]:
            tokenised, skip = self._prompted(texts, applied, text_options)
            for text in tokenised:
                fitted = self.fit(text, text_options, budget)
                sequence = Sequence(fitted.ids, task, params, fitted.type_ids, skip, adapter=applied.adapter)
                yield self._sides.of_text(sequence, applied.role)

        def of_others(others: Iterable[Any]) -> Iterator[Sequence]:
            illustrated = partial(self._illustrated, processed={})
            for content in others:
                render = illustrated if isinstance(content, Illustrated) else self._of_ids
                yield replace(render(content, applied, options, budget), task=task, params=params)

        is_text = [isinstance(content, str) for content in contents]
        return map_apart(is_text, of_texts, of_others, contents)

    def _await(self, contents: Iterable[str | Ids | Illustrated]) -> None:
        """Ask for all pictures of a request at once, where a server fetches them before it is rendered.

        Raises:
            Unarrived: some are behind URLs, and have not arrived.
        """
        if self.pictures is None:
            return
        illustrated = [content for content in contents if isinstance(content, Illustrated)]
        awaited(chain.from_iterable(map(attrgetter("sources"), illustrated)), self.pictures.access)

    def _content(self, prompt: Prompt | Pair, place: int) -> str | Ids | Illustrated:
        """Return the content of a prompt; parts without pictures are a text, but for a model that renders both."""
        content = content_of(prompt, place)
        if isinstance(content, list) and self.read_ids is not None:
            return self.read_ids(content)
        if not isinstance(content, Illustrated) or content.sources:
            return content
        is_text = self.pictures is None or self.pictures.is_apart
        return "\n".join(map(str, content.content)) if is_text else content

    def _of_ids(self, ids: Ids, applied: Applied, options: TextOptions, budget: Budget) -> Sequence:
        """Return the sequence of ids that the caller gave."""
        check_vocabulary(self.info, ids)
        text = self.fit(self._sliced(Text(ids), options), options, budget)
        return self._sides.of_ids(Sequence(text.ids, adapter=applied.adapter), applied.role)

    def _illustrated(
        self, content: Illustrated, applied: Applied, options: TextOptions, budget: Budget, *, processed: Processed
    ) -> Sequence:
        """Return the sequence of a prompt with pictures, of which those that the request has had are in `processed`.

        Raises:
            BadRequest: the model takes no pictures, one of them is refused, or the prompt does not name each once.
            TooLong: it has more tokens than the model takes, and no text alone can be cut.
        """
        renderer = self.pictures
        if renderer is None:
            raise BadRequest(f"{self.info.name} takes no images, only texts", param="input")
        options = self._of_side(options, applied.role)
        pictures = renderer.headers(content)
        ids = self._ids_with_placeholders(renderer, content, applied, options)
        if not pictures:
            text = self.fit(self._sliced(Text(ids), options), options, budget)
            return self._sides.of_text(Sequence(text.ids, adapter=applied.adapter), applied.role)
        if renderer.is_apart:  # the limit is that of the texts
            options = options._replace(limit=UNLIMITED, truncate=None)
        cuts_beginnings = self._cuts_beginnings(options.side)
        placed = kept(renderer.placed(ids, pictures, content.kwargs), options, cuts_beginnings=cuts_beginnings)
        is_rendered = self._messages is not None and isinstance(content.content, tuple)
        if is_rendered and options.side is None:
            placed = self._restored(placed, options, applied)
        text = self.fit(Text(placed.ids), options._replace(side=None, pad=False), budget)
        media = renderer.media(pictures, content.kwargs, processed)
        budget.hold(media)
        sequence = Sequence(text.ids, adapter=applied.adapter, media=media, spans=tuple(placed.spans))
        sequence = self._sides.of_text(sequence, applied.role)
        return replace(sequence, positions=renderer.positions(len(sequence), media, placed.spans))

    def _restored(self, placed: Placed, options: TextOptions, applied: Applied) -> Placed:
        """Return a rendered prompt that was cut with the end that the template gives it.

        Raises:
            TooLong: a picture would be cut.
        """
        assert self._messages is not None
        ids = self._messages.restored(Text(placed.ids), options.content_limit, applied).ids
        if any(ids[start:stop] != placed.ids[start:stop] for start, stop in placed.spans):
            raise TooLong(
                f"the prompt is to be cut to {len(ids)} tokens, which have no room for its pictures and the end of the "
                "template; send fewer or smaller ones",
                param="input_tokens",
            )
        return placed._replace(ids=[*ids])

    def expanded(self, content: Illustrated, *, add_special_tokens: bool = False) -> Ids:
        """Return the ids of a prompt of any length, each picture the tokens that stand for it; none is decoded.

        Raises:
            BadRequest: one of the pictures is refused, or the prompt does not name each once.
        """
        assert self.pictures is not None
        pictures = self.pictures.headers(content)
        options = PLAIN._replace(add_special_tokens=add_special_tokens)
        ids = self._ids_with_placeholders(self.pictures, content, self.prompts.choose(), options)
        return self.pictures.placed(ids, pictures, content.kwargs).ids

    def _ids_with_placeholders(
        self, renderer: PictureRenderer, content: Illustrated, applied: Applied, options: TextOptions
    ) -> Ids:
        """Return the ids of a prompt, each picture one placeholder."""
        if isinstance(content.content, tuple):
            text = renderer.spelled_out(renderer.text(content.content, applied.text, applied.role))
            return self.tokenize(self.whole(text), add_special_tokens=False)
        if isinstance(content.content, str):
            text = self.whole(renderer.spelled_out(applied.text + content.content))
            return self.tokenize(text, add_special_tokens=options.add_special_tokens)
        check_vocabulary(self.info, content.content)
        return content.content

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
        length_of = self._length if len(prompt) <= LONGEST_REMEMBERED else self._prompt_length
        return length_of(prompt, options.content_limit, options.add_special_tokens)

    def check(self, task: str, params: PoolingParams) -> PoolingParams:
        """Return `params` with the task filled in.

        Raises:
            BadRequest: the model does not offer the task or a parameter.
        """
        return self._allowed(task, params)

    def tokenize_all(self, texts: list[str], *, add_special_tokens: bool = True) -> list[Ids]:
        """Return the token ids of each of `texts`, of any length."""
        return [list(text.ids) for text in self.backend.tokenize(texts, special=add_special_tokens)]

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> Ids:
        """Return the token ids of `text`, of any length."""
        (ids,) = self.tokenize_all([text], add_special_tokens=add_special_tokens)
        return ids

    @property
    def renders_quickly(self) -> bool:
        """Whether texts are only tokenised, by a fast backend, which needs no lock: no template, no pictures."""
        is_alone = self._messages is None and self.pictures is None
        return is_alone and isinstance(self.backend, FastTokenizer)

    def token_strings(self, ids: Seq[int]) -> list[str]:
        """Return the vocabulary entries of `ids`."""
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def detokenize(self, ids: Seq[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`."""
        check_vocabulary(self.info, ids, param="tokens")
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

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
        if coalesce(truncate, 0) > limit:
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
                yield (
                    whole
                    if len(whole.ids) <= limit
                    else self.backend.cut(text, limit, special=special, side=options.content_side)
                )

    def fit_all(self, texts: Iterable[Text], options: TextOptions) -> list[Text]:
        """Fit each text of one request."""
        budget = Budget(self.bounds.tokens)
        return [self.fit(text, options, budget) for text in texts]

    def bounded(self, texts: Iterable[str], options: TextOptions) -> list[str]:
        """Return `texts`, of long ones only a part that has all tokens that count.

        Raises:
            TooLong: a text is too long, and `options` do not cut it.
            BadRequest: a text cannot be tokenised in part, and has too many characters.
        """
        return [self._bounded(text, options) for text in texts]

    def _bounded(self, text: str, options: TextOptions) -> str:
        if options.truncate is not None:
            return self.enough(text, options.truncate, options.side or options.content_side)
        if len(text) > COUNTED * options.limit and len(self.enough(text, options.limit)) < len(text):
            raise too_long(options.limit, f"at least {options.limit + 1}")
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
        return self.whole(self.backend.enough(text, limit + 1, from_end=self._cuts_beginnings(side)))

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

    def annotated(
        self, texts: Seq[str], task: str, params: PoolingParams, options: TextOptions = PLAIN
    ) -> list[Annotated]:
        """Return sequences for `texts`, each with its encoding, which maps tokens to characters.

        Raises:
            BadRequest: as `render`; or the tokenizer keeps no offsets.
        """
        params = self.check(task, params)
        options = self.resolve(options)
        backend = self.counting()
        if options.side is not None or options.pad:
            raise BadRequest(
                "`truncation_side` and `padding` are not supported where characters are counted",
                param="truncation_side",
            )
        parts = self.bounded(texts, options)
        cuts_beginnings = self._cuts_beginnings(options.content_side)
        budget = Budget(self.bounds.tokens)
        special, limit = options.add_special_tokens, options.content_limit
        adapter = self.prompts.choose().adapter
        annotated: list[Annotated] = []
        for text, part, encoding in zip(texts, parts, backend.encodings(parts, special=special), strict=True):
            if len(encoding) > limit:
                encoding = backend.cut_encoding(part, limit, special=special, side=options.content_side)
            fitted = self.fit(backend.text_of(encoding), options, budget)
            sequence = Sequence(fitted.ids, task, params, fitted.type_ids, adapter=adapter)
            first = len(text) - len(part) if cuts_beginnings else 0
            annotated.append(Annotated(sequence, encoding, first))
        return annotated

    def counting(self, param: str | None = None) -> FastTokenizer:
        """Return the tokenizer, which counts the characters of its tokens.

        Args:
            param: of the request, for the error.

        Raises:
            BadRequest: it keeps no offsets, or its tokens are not those of the text alone.
        """
        if self._messages is not None:
            raise BadRequest(
                f"{self.info.name} renders texts by a chat template, so the characters of its tokens are not those of "
                "the text, and cannot be counted",
                param=param,
            )
        if not isinstance(self.backend, FastTokenizer):
            raise BadRequest(f"the tokenizer of {self.info.name} keeps no character offsets", param=param)
        return self.backend

    def fit(self, text: Text, options: TextOptions, budget: Budget) -> Text:
        """Cut finished ids on an explicit side, pad, and take the tokens off the request's budget.

        Raises:
            BadRequest: `text` has no tokens, or the model has no embedding for one of them or for its type; or the
                budget is spent.
            TooLong: it has more tokens than `options` allow.
        """
        if options.side is not None:
            text = self._sliced(text, options)
        if not len(text.ids):
            raise BadRequest("The decoder prompt cannot be empty", param="input")
        if len(text.ids) > options.limit:
            raise too_long(options.limit, str(len(text.ids)))
        if options.pad:
            text = self._padded(text, options)
        highest = max(text.ids)
        if highest >= self.info.vocab_size:
            (token,) = self.token_strings([highest])
            raise unknown_token(self.info, token, highest)
        check_types(self.info, text)
        budget.spend(len(text.ids))
        return text

    def _padded(self, text: Text, options: TextOptions) -> Text:
        length = options.truncate or options.limit
        if length == UNLIMITED:
            length = self.info.max_model_len
        Budget(self.bounds.tokens).spend(length)  # before so many are made
        pad = self.tokenizer.pad_token_id or 0
        return text.extended([pad] * (length - len(text.ids)))

    def _sliced(self, text: Text, options: TextOptions) -> Text:
        """Return `text` without finished ids beyond `options.truncate`."""
        limit = options.truncate
        if limit is None or len(text.ids) <= limit:
            return text
        if self._cuts_beginnings(options.side):
            return text.part(slice(len(text.ids) - limit, None))
        return text.part(slice(limit))

    def _cuts_beginnings(self, side: Literal["left", "right"] | None) -> bool:
        """Return whether texts lose their beginning where they are cut; by default as the tokenizer has it."""
        return (side or self.tokenizer.truncation_side) == "left"

    def _prompt_length(self, prompt: str, limit: int, special: bool) -> int:
        """Count the tokens of a prompt as sentence-transformers: cut like a text, without a closing special one."""
        most = min(limit, self.info.limit("embed"))
        prompt = self.backend.enough(prompt, most + 1, from_end=False)
        (text,) = self.backend.tokenize([prompt], special=special)
        if len(text.ids) > limit:
            text = self.backend.cut(prompt, limit, special=special)
        closing = set(self.tokenizer.all_special_ids).intersection(text.ids[-1:])
        return len(text.ids) - len(closing)
