"""From a query and a document to one sequence, for models that read both at once (cross-encoders).

A pair is rendered by a template, where the checkpoint or the user has one, and else joined by the tokenizer, with the
separators and token type ids that the model was trained with. A query is tokenised once for all its documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.core import Sequence
from cenote.errors import BadRequest, TooLong
from cenote.pipeline.rendering import CHARACTERS_PER_TOKEN, is_count
from cenote.pipeline.tokenizing import MOST_CUTS, Text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from cenote.core import PairTemplate, PoolingParams
    from cenote.pipeline.rendering import Renderer, TextOptions
    from cenote.pipeline.tokenizing import Ids

RESERVED = frozenset(("chat_template", "tools", "tokenize"))
"""Variables of templates that requests may not set."""

MESSAGES = "messages"
"""Variable of templates that depend on the pair."""


@dataclass(frozen=True, slots=True)
class PairOptions:
    """Options of joining two texts to one input.

    Attributes:
        max_tokens_per_query: maximum tokens kept of a query; 0 = all.
        max_tokens_per_doc: likewise for documents.
        template: template instead of the model's.
        kwargs: variables of the template, as `instruction`.
    """

    max_tokens_per_query: int = 0
    max_tokens_per_doc: int = 0
    template: PairTemplate | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        instruction: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template: PairTemplate | None = None,
        **limits: int,
    ) -> PairOptions:
        """Return the options of a request.

        Raises:
            BadRequest: a variable of the template is reserved.
        """
        kwargs = dict(chat_template_kwargs or {})
        reserved = RESERVED.intersection(kwargs)
        if reserved:
            raise BadRequest(f"chat_template_kwargs may not set {min(reserved)!r}", param="chat_template_kwargs")
        if instruction is not None:
            kwargs.setdefault("instruction", instruction)
        return cls(template=template, kwargs=kwargs, **limits)


class _Pair(NamedTuple):
    """A pair to render.

    Attributes:
        is_rendered: its client has put the template's prefix before the query, and the suffix after the document,
            which is kept apart.
    """

    query: str
    document: str
    is_rendered: bool = False


@dataclass(frozen=True, slots=True)
class _PairPrompt:
    """A template for pairs, with the variables of one request.

    Attributes:
        special: add the tokenizer's special tokens to the rendered prompt.
    """

    renderer: Renderer
    template: PairTemplate
    kwargs: Mapping[str, Any]
    special: bool

    def ids(self, pairs: Seq[_Pair]) -> list[Ids]:
        """Render and tokenise pairs; a text that comes several times is tokenised once."""
        texts = self._texts(pairs)
        distinct = list(dict.fromkeys(chain.from_iterable(texts)))
        is_whole = not self.template.parts
        tokenized = self.renderer.tokenize_all(distinct, add_special_tokens=self.special and is_whole)
        ids_of = dict(zip(distinct, tokenized, strict=True))
        if is_whole:
            return [ids_of[text] for (text,) in texts]
        first = self._first()
        return [[*first, *chain.from_iterable(ids_of[text] for text in parts)] for parts in texts]

    def _texts(self, pairs: Seq[_Pair]) -> list[list[str]]:
        """Render pairs: of each the texts that are tokenised apart. Parts without messages are rendered once."""
        template = self.template
        if not template.parts:
            return [[self._text(pair, template.source)] for pair in pairs]
        fixed = {part: self._render(_Pair("", ""), part) for part in template.parts if MESSAGES not in part}

        def parts(pair: _Pair) -> list[str]:
            if pair.is_rendered:
                return [self._text(pair, None)]
            return [fixed.get(part) or self._render(pair, part) for part in template.parts]

        return [parts(pair) for pair in pairs]

    def _text(self, pair: _Pair, source: str | None) -> str:
        """Return the whole text of a pair, by a template unless its client has rendered it."""
        if pair.is_rendered:
            return pair.query + pair.document + self.template.suffix
        return self._render(pair, source)

    def _render(self, pair: _Pair, source: str | None) -> str:
        contents = {"query": pair.query, "document": pair.document}
        system = self._system()
        if system:
            contents = {"system": system, **contents}
        messages = [{"role": role, "content": self._content(text)} for role, text in contents.items()]
        return self.renderer.apply_template(messages, source, {**self.template.kwargs, **self.kwargs})

    def _first(self) -> list[int]:
        """Return the tokens before the parts."""
        bos = self.renderer.tokenizer.bos_token_id
        return [bos] if self.template.bos and self.special and bos is not None else []

    def _system(self) -> str:
        """Return the text of the message before the two; empty if there is none."""
        if self.template.system is None:
            return ""
        return self.kwargs.get("instruction") or self.template.system

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self.template.structured else text


class PairRenderer:
    """Renders pairs for one model.

    Args:
        renderer: of single texts; its tokenizer and limits are used.
        template: the model's template for pairs, if it has one.
    """

    def __init__(self, renderer: Renderer, template: PairTemplate | None = None) -> None:
        self._renderer = renderer
        self.template = template

    def check(self, options: PairOptions) -> None:
        """Raise `BadRequest` if a limit is out of range, or there are variables but no template."""
        limit = self._renderer.info.max_model_len
        _check_limit("max_tokens_per_query", options.max_tokens_per_query, limit)
        _check_limit("max_tokens_per_doc", options.max_tokens_per_doc, limit)
        if options.kwargs and self._template(options) is None:
            raise BadRequest(
                f"{self._renderer.info.name} joins query and document without a template, so "
                f"{', '.join(sorted(options.kwargs))} would have no effect; start with --chat-template to use one",
                param=min(options.kwargs),
            )

    def cut(self, texts: Seq[str], limit: int) -> list[str]:
        """Return `texts`, each cut to at most `limit` tokens; 0 = no limit."""
        return [self._cut(text, limit) for text in texts] if limit else list(texts)

    def render(
        self,
        pairs: Seq[tuple[str, str]],
        task: str,
        params: PoolingParams,
        text_options: TextOptions,
        options: PairOptions = PairOptions(),
    ) -> list[Sequence]:
        """Return one sequence per (query, document).

        Raises:
            BadRequest: as `cenote.pipeline.rendering.Renderer.render`, and if the template refuses the pair.
            TooLong: a pair has more tokens than the model takes and `text_options` do not cut it.
        """
        self.check(options)
        params = self._renderer.check(task, params)
        text_options = self._renderer.resolve(text_options)
        template = self._template(options)
        prompt = self._renderer.prompts.choose()
        special, limit = text_options.add_special_tokens, text_options.content_limit
        skip = 0
        if template is None:
            short = self._shortened(pairs, text_options, options)
            prompted = [(prompt.text + query, document) for query, document in short]
            texts = self._renderer.backend.join(prompted, limit, special=special)
            skip = self._renderer.skip(prompt.text, text_options)
        else:
            special = special and template.add_special_tokens
            pair_prompt = _PairPrompt(self._renderer, template, options.kwargs, special)
            marked = self._marked(pairs, template, text_options, options)
            texts = self._by_template(marked, pair_prompt, limit)
        fitted = [self._renderer.fit(text, text_options) for text in texts]
        return [Sequence(text.ids, task, params, text.type_ids, skip, adapter=prompt.adapter) for text in fitted]

    def _template(self, options: PairOptions) -> PairTemplate | None:
        return options.template or self.template

    def _marked(
        self, pairs: Seq[tuple[str, str]], template: PairTemplate, text_options: TextOptions, options: PairOptions
    ) -> list[_Pair]:
        """Return `pairs` shortened, those that a client has rendered without the template's suffix."""
        are_rendered = [template.is_rendered(*pair) for pair in pairs]
        ends = [template.suffix if is_rendered else "" for is_rendered in are_rendered]
        inner = [(query, document.removesuffix(end)) for (query, document), end in zip(pairs, ends, strict=True)]
        short = self._shortened(inner, text_options, options)
        return [_Pair(*pair, is_rendered) for pair, is_rendered in zip(short, are_rendered, strict=True)]

    def _shortened(
        self, pairs: Seq[tuple[str, str]], text_options: TextOptions, options: PairOptions
    ) -> list[tuple[str, str]]:
        """Return `pairs` with each side cut to its limit; a query that comes several times is cut once."""
        queries = list(dict.fromkeys(query for query, _ in pairs))
        short_queries = self._side(queries, options.max_tokens_per_query, text_options)
        short_query = dict(zip(queries, short_queries, strict=True))
        documents = self._side([document for _, document in pairs], options.max_tokens_per_doc, text_options)
        return [(short_query[query], document) for (query, _), document in zip(pairs, documents, strict=True)]

    def _side(self, texts: list[str], limit: int, options: TextOptions) -> list[str]:
        """Return one side of the pairs, cut to `limit` tokens each, or without characters far beyond any limit."""
        return self.cut(texts, limit) if limit else self._renderer.bounded(texts, options)

    def _cut(self, text: str, limit: int) -> str:
        longest = self._renderer.info.max_model_len * CHARACTERS_PER_TOKEN  # the rest could never be kept
        return self._renderer.backend.beginning(text[:longest], limit)

    def _by_template(self, pairs: list[_Pair], prompt: _PairPrompt, limit: int) -> list[Text]:
        """Render prompts. One that is too long and may be cut loses tokens of its document, and nothing else."""
        return [
            Text(ids if len(ids) <= limit else self._with_less(prompt, pair, len(ids) - limit, limit))
            for ids, pair in zip(prompt.ids(pairs), pairs, strict=True)
        ]

    def _with_less(self, prompt: _PairPrompt, pair: _Pair, excess: int, limit: int) -> Ids:
        """Return the ids of a prompt that has `excess` tokens too many, with a shorter document.

        Raises:
            TooLong: it has more than `limit` tokens without any document.
        """
        for _ in range(MOST_CUTS):
            length = len(self._renderer.tokenize(pair.document, add_special_tokens=False)) - excess
            pair = pair._replace(document=self._cut(pair.document, length) if length > 0 else "")
            (ids,) = prompt.ids([pair])
            excess = len(ids) - limit
            if excess <= 0:
                return ids
            if not pair.document:
                break
        raise TooLong(
            f"the prompt has {limit + excess} tokens without its document, and is to be cut to {limit}: "
            "only documents are cut; max_tokens_per_query cuts the query",
            param="truncate_prompt_tokens",
        )


def _check_limit(name: str, value: Any, max_model_len: int) -> None:
    if not is_count(value):
        raise BadRequest(f"{name} must be a non-negative integer", param=name)
    if value >= max_model_len:
        raise BadRequest(f"{name} ({value}) must be less than max_model_len ({max_model_len}).", param=name)
