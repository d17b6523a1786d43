"""From a query and a document to one sequence, for models that read both at once (cross-encoders).

A pair is rendered by a template, where the checkpoint or the user has one, and else joined by the tokenizer, with the
separators and token type ids that the model was trained with. A query is tokenised once for all its documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.core import Sequence, coalesce
from cenote.errors import BadRequest, TooLong
from cenote.pipeline.inputs import is_count
from cenote.pipeline.messages import FILLERS, common_end, message
from cenote.pipeline.tokenizing import MOST_CUTS, Text, kept_places

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from collections.abc import Sequence as Seq

    from cenote.core import PairTemplate, PoolingParams
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.rendering import Renderer
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
        special = self.special and not self.template.parts
        tokenized = self.renderer.tokenize_all(distinct, add_special_tokens=special)
        ids_of = dict(zip(distinct, tokenized, strict=True))
        first = self._first()
        return [[*first, *chain.from_iterable(ids_of[text] for text in parts)] for parts in texts]

    def end(self) -> Ids:
        """Return the tokens that the template puts at the end of every prompt."""
        first, second = self.ids([_Pair(text, text) for text in FILLERS])
        return common_end(first, second)

    def _texts(self, pairs: Seq[_Pair]) -> list[list[str]]:
        """Render pairs: of each the texts that are tokenised apart. Parts without messages are rendered once."""
        template = self.template
        sources = template.parts or (template.source,)
        fixed: dict[str | None, str] = {
            part: self._render(_Pair("", ""), part) for part in template.parts if MESSAGES not in part
        }

        def texts(pair: _Pair) -> list[str]:
            if pair.is_rendered:
                return [pair.query + pair.document + template.suffix]
            return [fixed.get(source) or self._render(pair, source) for source in sources]

        return list(map(texts, pairs))

    def _render(self, pair: _Pair, source: str | None) -> str:
        contents = {"query": pair.query, "document": pair.document}
        system = self._system()
        if system:
            contents = {"system": system, **contents}
        structured = self.template.structured
        messages = [message(role, text, structured=structured) for role, text in contents.items()]
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
            short = self._shortened([_Pair(*pair) for pair in pairs], text_options, options)
            prompted = [(prompt.text + pair.query, pair.document) for pair in short]
            texts = self._renderer.backend.join(prompted, limit, special=special)
            skip = self._renderer.skip(prompt.text, text_options)
        else:
            special = special and template.add_special_tokens
            pair_prompt = _PairPrompt(self._renderer, template, options.kwargs, special)
            marked = [_marked(*pair, template) for pair in pairs]
            if template.cuts_whole:
                texts = self._cut_whole(self._shortened(marked, text_options, options), pair_prompt, limit)
            else:
                cut = text_options._replace(side="right")  # as `_fitting` cuts
                texts = self._by_template(self._shortened(marked, cut, options), pair_prompt, limit)
        fitted = self._renderer.fit_all(texts, text_options)
        return [Sequence(text.ids, task, params, text.type_ids, skip, adapter=prompt.adapter) for text in fitted]

    def _template(self, options: PairOptions) -> PairTemplate | None:
        return options.template or self.template

    def _shortened(self, pairs: Seq[_Pair], text_options: TextOptions, options: PairOptions) -> list[_Pair]:
        """Return `pairs` with each side cut to its limit; a query that comes several times is cut once."""
        queries = list(dict.fromkeys(pair.query for pair in pairs))
        short_query = dict(zip(queries, self.cut(queries, options.max_tokens_per_query), strict=True))
        documents = self.cut([pair.document for pair in pairs], options.max_tokens_per_doc)
        short = zip(pairs, documents, strict=True)
        shortened = [_Pair(short_query[pair.query], document, pair.is_rendered) for pair, document in short]
        return [self._bounded(pair, text_options) for pair in shortened]

    def _bounded(self, pair: _Pair, options: TextOptions) -> _Pair:
        """Return a pair, of a long side only a part that has all tokens that count.

        "Longest first" compares the two sides, so that one loses characters only if the other is surely the shorter.
        """
        limit = coalesce(options.truncate, options.limit)
        if len(pair.query) <= len(pair.document):
            return pair._replace(document=self._part(pair.document, pair.query, limit, options))
        return pair._replace(query=self._part(pair.query, pair.document, limit, options))

    def _part(self, text: str, other: str, limit: int, options: TextOptions) -> str:
        is_shorter = len(other.encode(errors="replace")) < limit
        return self._renderer.bounded([text], options)[0] if is_shorter else self._renderer.whole(text)

    def _cut(self, text: str, limit: int) -> str:
        return self._renderer.backend.beginning(self._renderer.enough(text, limit, "right"), limit)

    def _cut_whole(self, pairs: list[_Pair], prompt: _PairPrompt, limit: int) -> list[Text]:
        """Render prompts. One that is too long is cut like a text, and gets the end of the template back."""
        prompts = prompt.ids(pairs)
        if max(map(len, prompts), default=0) <= limit:
            return list(map(Text, prompts))
        kept = kept_places(limit, self._renderer.tokenizer.truncation_side == "left")
        end = prompt.end()[-limit:] if prompt.template.restores else []
        return [Text(_ending(ids[kept], end) if len(ids) > limit else ids) for ids in prompts]

    def _by_template(self, pairs: list[_Pair], prompt: _PairPrompt, limit: int) -> list[Text]:
        """Render prompts. One that is too long and may be cut loses tokens of its document, and nothing else."""
        prompts = zip(prompt.ids(pairs), pairs, strict=True)
        return [Text(self._fitting(prompt, pair, ids, limit)) for ids, pair in prompts]

    def _fitting(self, prompt: _PairPrompt, pair: _Pair, ids: Ids, limit: int) -> Ids:
        """Return the `ids` of a prompt, with a shorter document if they are too many.

        Raises:
            TooLong: it has more than `limit` tokens without any document.
        """
        for _ in range(MOST_CUTS + 1):
            if len(ids) <= limit:
                return ids
            if not pair.document:
                break
            length = len(self._renderer.tokenize(pair.document, add_special_tokens=False)) + limit - len(ids)
            pair = pair._replace(document=self._cut(pair.document, length) if length > 0 else "")
            (ids,) = prompt.ids([pair])
        raise TooLong(
            f"the prompt has {len(ids)} tokens without its document, and is to be cut to {limit}: "
            "only documents are cut; max_tokens_per_query cuts the query",
            param="truncate_prompt_tokens",
        )


def _ending(ids: Ids, end: Ids) -> Ids:
    """Return `ids` with `end` in place of the last ones."""
    return [*ids[: len(ids) - len(end)], *end]


def _marked(query: str, document: str, template: PairTemplate) -> _Pair:
    """Return a pair, without the template's suffix and marked as such if its client has rendered it."""
    if template.is_rendered(query, document):
        return _Pair(query, document.removesuffix(template.suffix), True)
    return _Pair(query, document)


def check_no_template(model: str, way: str, options: PairOptions, read: Collection[str] = ()) -> None:
    """Raise `BadRequest` for a template or variables of one, but for those `read`, where a way to score has none."""
    idle = sorted(options.kwargs.keys() - set(read))
    if idle or options.template:
        names = ", ".join(idle) or "a template"
        raise BadRequest(
            f"{model} scores as a {way}: {names} would have no effect", param=min(idle, default="chat_template")
        )


def _check_limit(name: str, value: Any, max_model_len: int) -> None:
    if not is_count(value):
        raise BadRequest(f"{name} must be a non-negative integer", param=name)
    if value >= max_model_len:
        raise BadRequest(f"{name} ({value}) must be less than max_model_len ({max_model_len}).", param=name)
