"""From a query and a document to one sequence, for models that read both at once (cross-encoders).

A pair is rendered by a template, where the checkpoint or the user has one, and else joined by the tokenizer, which
puts its separators and token type ids where the model was trained to find them. A query is tokenised once for all
its documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cenote.core import Sequence
from cenote.errors import BadRequest, TooLong
from cenote.pipeline.rendering import CHARACTERS_PER_TOKEN, Text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from tokenizers import Encoding

    from cenote.core import PairTemplate, PoolingParams
    from cenote.pipeline.rendering import Renderer, TextOptions

MOST_CUTS = 8
"""Cutting a text at a token's end may give other tokens; it is repeated at most this often."""

RESERVED = ("chat_template", "tools", "tokenize")
"""Variables of templates that requests may not set."""


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How two texts become one input.

    Attributes:
        max_tokens_per_query: tokens to which a query is cut; 0 = it is not.
        max_tokens_per_doc: likewise for documents.
        template: instead of the model's.
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
        """Return the options that a request spells so.

        Raises:
            BadRequest: a variable of the template is reserved.
        """
        kwargs = dict(chat_template_kwargs or {})
        for name in RESERVED:
            if name in kwargs:
                raise BadRequest(f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs")
        if instruction is not None:
            kwargs.setdefault("instruction", instruction)
        return cls(template=template, kwargs=kwargs, **limits)


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
        """Raise `BadRequest` if a limit is out of range, or the template's variables have no template to go to."""
        limit = self._renderer.info.max_model_len
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            value = getattr(options, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise BadRequest(f"{name} must be a non-negative integer", param=name)
            if value >= limit:
                raise BadRequest(f"{name} ({value}) must be less than max_model_len ({limit}).", param=name)
        if options.kwargs and (options.template or self.template) is None:
            raise BadRequest(
                f"{self._renderer.info.name} joins query and document without a template, so "
                f"{', '.join(sorted(options.kwargs))} would have no effect; start with --chat-template to use one",
                param=min(options.kwargs),
            )

    def cut(self, texts: Seq[str], most: int) -> list[str]:
        """`texts`, each cut at the end of its token number `most`; 0 = not at all."""
        return [self._cut(text, most) for text in texts] if most else list(texts)

    def render(
        self,
        pairs: Seq[tuple[str, str]],
        task: str,
        params: PoolingParams,
        text_options: TextOptions,
        options: PairOptions = PairOptions(),
    ) -> list[Sequence]:
        """One sequence per (query, document).

        Raises:
            BadRequest: as `cenote.pipeline.rendering.Renderer.render`, and if the template refuses the pair.
            TooLong: a pair has more tokens than the model takes and `text_options` do not cut it.
        """
        self.check(options)
        params = self._renderer.check(task, params)
        text_options = self._renderer.resolve(text_options)
        own = list(dict.fromkeys(query for query, _ in pairs))
        queries = dict(zip(own, self._side(own, options.max_tokens_per_query, text_options), strict=True))
        documents = self._side([document for _, document in pairs], options.max_tokens_per_doc, text_options)
        cut = [(queries[query], document) for (query, _), document in zip(pairs, documents, strict=True)]
        template = options.template or self.template
        applied = self._renderer.prompts.choose()
        if template is not None:
            texts = self._by_template(cut, template, text_options, options)
        else:
            texts = self._joined([(applied.text + query, document) for query, document in cut], text_options)
        fitted = [self._renderer.fit(text, text_options) for text in texts]
        return [Sequence(text.ids, task, params, text.type_ids, adapter=applied.adapter) for text in fitted]

    def _side(self, texts: list[str], most: int, options: TextOptions) -> list[str]:
        """One side of the pairs, cut to `most` tokens each, or without what could never fit."""
        return self.cut(texts, most) if most else self._renderer.bounded(texts, options)

    def _cut(self, text: str, most: int) -> str:
        text = text[: self._renderer.info.max_model_len * CHARACTERS_PER_TOKEN]  # what follows could never be kept
        for _ in range(MOST_CUTS):
            found = self._renderer.encodings([text], add_special_tokens=False)
            if found is None:
                ids = self._renderer.tokenize(text, add_special_tokens=False)
                return text if len(ids) <= most else self._renderer.detokenize(ids[:most])
            if len(found[0].ids) <= most:
                break
            offsets = found[0].offsets
            text = text[: min(offsets[most - 1][1], offsets[most][0])]  # a character may be of several tokens
        return text

    def _joined(self, pairs: list[tuple[str, str]], options: TextOptions) -> list[Text]:
        """The tokenizer's own way of joining two texts, cut "longest first"."""
        sides = list(dict.fromkeys(text for pair in pairs for text in pair))
        found = self._renderer.encodings(sides, add_special_tokens=False)
        if found is None:
            return self._renderer.tokenize_pairs(pairs, options)
        known = dict(zip(sides, found, strict=True))
        return [self._join(known[query], known[document], options) for query, document in pairs]

    def _join(self, query: Encoding, document: Encoding, options: TextOptions) -> Text:
        renderer = self._renderer
        if options.truncate is not None and options.side is None:
            special = renderer.num_special_tokens(pair=True) if options.add_special_tokens else 0
            room = max(0, options.truncate - special)
            for_query, for_document = shares(len(query.ids), len(document.ids), room)
            query, document = renderer.shortened(query, for_query), renderer.shortened(document, for_document)
        joined = renderer.post_process(query, document, options.add_special_tokens)
        if options.truncate is not None and options.side is None:
            joined.truncate(options.truncate)  # where not even the special tokens fit
        return renderer.from_encoding(joined)

    def _by_template(
        self, pairs: list[tuple[str, str]], template: PairTemplate, text_options: TextOptions, options: PairOptions
    ) -> list[Text]:
        """Rendered prompts; where one is too long and may be cut, its document is, and the prompt stays whole."""
        special = template.add_special_tokens and text_options.add_special_tokens
        texts = [self._prompt(query, document, template, options) for query, document in pairs]
        tokenised = [Text(ids) for ids in self._renderer.tokenize_all(texts, add_special_tokens=special)]
        most = text_options.truncate
        if most is None or text_options.side is not None:
            return tokenised
        for i, (query, document) in enumerate(pairs):
            for _ in range(MOST_CUTS):
                excess = len(tokenised[i].ids) - most
                if excess <= 0 or not document:
                    break
                kept = len(self._renderer.tokenize(document, add_special_tokens=False)) - excess
                document = self._cut(document, kept) if kept > 0 else ""
                text = self._prompt(query, document, template, options)
                tokenised[i] = Text(self._renderer.tokenize(text, add_special_tokens=special))
            if len(tokenised[i].ids) > most:
                raise TooLong(
                    f"the prompt has {len(tokenised[i].ids)} tokens without its document, and is to be cut to {most}: "
                    "only documents are cut; max_tokens_per_query cuts the query",
                    param="truncate_prompt_tokens",
                )
        return tokenised

    def _prompt(self, query: str, document: str, template: PairTemplate, options: PairOptions) -> str:
        contents = {"query": query, "document": document}
        if template.system is not None and (system := options.kwargs.get("instruction") or template.system):
            contents = {"system": system, **contents}
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if template.structured else text}
            for role, text in contents.items()
        ]
        return self._renderer.apply_template(messages, template.source, {**template.kwargs, **options.kwargs})


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that two texts keep when cut "longest first" to `room` together, as the tokenizers library cuts."""
    if first + second <= room:
        return first, second
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = shorter + room % 2
    return (shorter, longer) if first <= second else (longer, shorter)
