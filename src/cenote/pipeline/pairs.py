"""From a query and a document to one sequence, for models that read both at once (cross-encoders).

A pair is rendered by a template, where the checkpoint or the user has one, and else joined by the tokenizer, with the
separators and token type ids that the model was trained with. A query is tokenised once for all its documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cenote.core import Sequence
from cenote.errors import BadRequest, TooLong
from cenote.pipeline.rendering import Budget, is_count
from cenote.pipeline.tokenizing import MOST_CUTS, Text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from cenote.core import PairTemplate, PoolingParams
    from cenote.pipeline.rendering import Renderer, TextOptions
    from cenote.pipeline.tokenizing import Ids

RESERVED = frozenset(("chat_template", "tools", "tokenize"))
"""Variables of templates that requests may not set."""


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

    def text(self, query: str, document: str) -> str:
        """Render a pair."""
        contents = {"query": query, "document": document}
        system = self._system()
        if system:
            contents = {"system": system, **contents}
        messages = [{"role": role, "content": self._content(text)} for role, text in contents.items()]
        return self.renderer.apply_template(messages, self.template.source, {**self.template.kwargs, **self.kwargs})

    def ids(self, query: str, document: str) -> Ids:
        """Render and tokenise a pair."""
        return self.renderer.tokenize(self.text(query, document), add_special_tokens=self.special)

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
        cut = text_options if template is None else text_options._replace(side="right")  # as `_with_less` cuts
        pairs = self._shortened(pairs, cut, options)
        prompt = self._renderer.prompts.choose()
        special, limit = text_options.add_special_tokens, text_options.content_limit
        if template is None:
            prompted = [(prompt.text + query, document) for query, document in pairs]
            texts = self._renderer.backend.join(prompted, limit, special=special)
        else:
            special = special and template.add_special_tokens
            pair_prompt = _PairPrompt(self._renderer, template, options.kwargs, special)
            texts = self._by_template(pairs, pair_prompt, limit)
        fitted = self._renderer.fit_all(texts, text_options, Budget(self._renderer.bounds.tokens))
        return [Sequence(text.ids, task, params, text.type_ids, adapter=prompt.adapter) for text in fitted]

    def _template(self, options: PairOptions) -> PairTemplate | None:
        return options.template or self.template

    def _shortened(
        self, pairs: Seq[tuple[str, str]], text_options: TextOptions, options: PairOptions
    ) -> list[tuple[str, str]]:
        """Return `pairs` with each side cut to its limit; a query that comes several times is cut once."""
        queries = list(dict.fromkeys(query for query, _ in pairs))
        short_query = dict(zip(queries, self.cut(queries, options.max_tokens_per_query), strict=True))
        documents = self.cut([document for _, document in pairs], options.max_tokens_per_doc)
        shortened = [(short_query[query], document) for (query, _), document in zip(pairs, documents, strict=True)]
        return [self._bounded(query, document, text_options) for query, document in shortened]

    def _bounded(self, query: str, document: str, options: TextOptions) -> tuple[str, str]:
        """Return a pair, of a long side only a part that has all tokens that count.

        "Longest first" compares the two sides, so that one loses characters only if the other is surely the shorter.
        """
        limit = options.limit if options.truncate is None else options.truncate
        if len(query) <= len(document):
            return query, self._part(document, query, limit, options)
        return self._part(query, document, limit, options), document

    def _part(self, text: str, other: str, limit: int, options: TextOptions) -> str:
        is_shorter = len(other.encode(errors="replace")) < limit
        return self._renderer.bounded([text], options)[0] if is_shorter else self._renderer.whole(text)

    def _cut(self, text: str, limit: int) -> str:
        return self._renderer.backend.beginning(self._renderer.enough(text, limit, "right"), limit)

    def _by_template(self, pairs: list[tuple[str, str]], prompt: _PairPrompt, limit: int) -> list[Text]:
        """Render prompts. One that is too long and may be cut loses tokens of its document, and nothing else."""
        texts = [prompt.text(query, document) for query, document in pairs]
        ids_of_prompts = self._renderer.tokenize_all(texts, add_special_tokens=prompt.special)
        return [
            Text(ids if len(ids) <= limit else self._with_less(prompt, query, document, len(ids) - limit, limit))
            for ids, (query, document) in zip(ids_of_prompts, pairs, strict=True)
        ]

    def _with_less(self, prompt: _PairPrompt, query: str, document: str, excess: int, limit: int) -> Ids:
        """Return the ids of a prompt that has `excess` tokens too many, with a shorter document.

        Raises:
            TooLong: it has more than `limit` tokens without any document.
        """
        for _ in range(MOST_CUTS):
            length = len(self._renderer.tokenize(document, add_special_tokens=False)) - excess
            document = self._cut(document, length) if length > 0 else ""
            ids = prompt.ids(query, document)
            excess = len(ids) - limit
            if excess <= 0:
                return ids
            if not document:
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
