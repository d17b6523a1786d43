"""From a query and a document to one sequence, for models that read both at once (cross-encoders).

A pair is rendered by a template, where the checkpoint or the user has one, and else joined by the tokenizer, with the
separators and token type ids that the model was trained with. A query is tokenised once for all its documents. A pair
with pictures needs a template, which has places for them, and is never cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cenote.core import Sequence
from cenote.errors import BadRequest, TooLong
from cenote.functions import coalesce, map_apart
from cenote.pipeline.inputs import Illustrated, is_count
from cenote.pipeline.pair_prompts import PairPrompt, PairTexts
from cenote.pipeline.tokenizing import MOST_CUTS, Text, kept_places

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from collections.abc import Sequence as Seq

    from cenote.conventions import PairTemplate
    from cenote.core import PoolingParams
    from cenote.pipeline.inputs import Side
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.pictures import PictureRenderer
    from cenote.pipeline.rendering import Renderer
    from cenote.pipeline.tokenizing import Ids

RESERVED = frozenset(("chat_template", "tools", "tokenize"))
"""Variables of templates that requests may not set."""

CUTS_TEXTS = (
    "max_tokens_per_query and max_tokens_per_doc cut texts alone; leave them out, or send smaller images by "
    "mm_processor_kwargs"
)


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
        pairs: Seq[tuple[Side, Side]],
        task: str,
        params: PoolingParams,
        text_options: TextOptions,
        options: PairOptions = PairOptions(),
    ) -> list[Sequence]:
        """Return one sequence per (query, document).

        Raises:
            BadRequest: as `cenote.pipeline.rendering.Renderer.render`; the template refuses the pair; or there are
                pictures, and the model takes none, or has no template.
            TooLong: a pair has more tokens than the model takes and `text_options` do not cut it.
        """
        self.check(options)
        has_pictures = [any(isinstance(side, Illustrated) for side in pair) for pair in pairs]
        return map_apart(
            has_pictures,
            lambda part: self._with_pictures(part, task, params, text_options, options),
            lambda part: self._of_texts(part, task, params, text_options, options),
            pairs,
        )

    def _with_pictures(
        self,
        pairs: Seq[tuple[Side, Side]],
        task: str,
        params: PoolingParams,
        text_options: TextOptions,
        options: PairOptions,
    ) -> list[Sequence]:
        """Return one sequence per pair, of which one side at least has pictures."""
        renderer, template = self._renderer, self._template(options)
        if renderer.pictures is None:
            raise BadRequest(f"{renderer.info.name} takes no images, only texts", param="documents")
        if template is None:
            raise BadRequest(
                f"{renderer.info.name} joins query and document without a template, so that images have no place; "
                "start with --chat-template to use one",
                param="documents",
            )
        queries = self._opened([query for query, _ in pairs], options.max_tokens_per_query, renderer.pictures)
        documents = self._opened([document for _, document in pairs], options.max_tokens_per_doc, renderer.pictures)
        special = text_options.add_special_tokens and template.add_special_tokens
        prompt = PairPrompt(renderer, template, options.kwargs, special)
        prompts = [prompt.illustrated(*pair, renderer.pictures) for pair in zip(queries, documents, strict=True)]
        whole = text_options._replace(truncate=None, side=None, whole=True)
        sequences = renderer.render(prompts, task, params, whole)
        longest = max(map(len, sequences))
        limit = coalesce(renderer.resolve(text_options, task).truncate, longest)
        if longest > limit:
            raise TooLong(
                f"a pair with images has {longest} tokens, and is to be cut to {limit}: such pairs are not cut; send "
                "shorter texts, or smaller images by mm_processor_kwargs",
                param="truncate_prompt_tokens",
            )
        return sequences

    def _opened(self, sides: Seq[Side], limit: int, pictures: PictureRenderer) -> list[Side]:
        """Return one side of pairs: texts cut to `limit`, 0 = not, and pictures opened, of one for all pairs once."""
        if limit:
            return [*self.cut(texts_of(sides, CUTS_TEXTS), limit)]
        distinct = {id(side): side for side in sides}
        opened = {name: _opened(side, pictures) for name, side in distinct.items()}
        return [opened[id(side)] for side in sides]

    def _of_texts(
        self, sides: Seq[Any], task: str, params: PoolingParams, text_options: TextOptions, options: PairOptions
    ) -> list[Sequence]:
        """Return one sequence per pair of texts."""
        pairs: Seq[tuple[str, str]] = sides
        params = self._renderer.check(task, params)
        text_options = self._renderer.resolve(text_options)
        template = self._template(options)
        prompt = self._renderer.prompts.choose()
        special, limit = text_options.add_special_tokens, text_options.content_limit
        skip = 0
        if template is None:
            short = self._shortened([PairTexts(*pair) for pair in pairs], text_options, options)
            prompted = [(prompt.text + pair.query, pair.document) for pair in short]
            texts = self._renderer.backend.join(prompted, limit, special=special)
            skip = self._renderer.skip(prompt.text, text_options)
        else:
            special = special and template.add_special_tokens
            pair_prompt = PairPrompt(self._renderer, template, options.kwargs, special)
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

    def _shortened(self, pairs: Seq[PairTexts], text_options: TextOptions, options: PairOptions) -> list[PairTexts]:
        """Return `pairs` with each side cut to its limit; a query that comes several times is cut once."""
        queries = list(dict.fromkeys(pair.query for pair in pairs))
        short_query = dict(zip(queries, self.cut(queries, options.max_tokens_per_query), strict=True))
        documents = self.cut([pair.document for pair in pairs], options.max_tokens_per_doc)
        short = zip(pairs, documents, strict=True)
        shortened = [PairTexts(short_query[pair.query], document, pair.is_rendered) for pair, document in short]
        return [self._bounded(pair, text_options) for pair in shortened]

    def _bounded(self, pair: PairTexts, options: TextOptions) -> PairTexts:
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

    def _cut_whole(self, pairs: list[PairTexts], prompt: PairPrompt, limit: int) -> list[Text]:
        """Render prompts. One that is too long is cut like a text, and gets the end of the template back."""
        prompts = prompt.ids(pairs)
        if max(map(len, prompts), default=0) <= limit:
            return list(map(Text, prompts))
        kept = kept_places(limit, self._renderer.tokenizer.truncation_side == "left")
        end = prompt.end()[-limit:] if prompt.template.restores else []
        return [Text(_ending(ids[kept], end) if len(ids) > limit else ids) for ids in prompts]

    def _by_template(self, pairs: list[PairTexts], prompt: PairPrompt, limit: int) -> list[Text]:
        """Render prompts. One that is too long and may be cut loses tokens of its document, and nothing else."""
        prompts = zip(prompt.ids(pairs), pairs, strict=True)
        return [Text(self._fitting(prompt, pair, ids, limit)) for ids, pair in prompts]

    def _fitting(self, prompt: PairPrompt, pair: PairTexts, ids: Ids, limit: int) -> Ids:
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


def texts_of(side: Seq[Side], reason: str) -> list[str]:
    """Return the texts of one side.

    Raises:
        BadRequest: a query or a document has pictures; `reason` says why it may not.
    """
    texts = [content for content in side if isinstance(content, str)]
    if len(texts) < len(side):
        raise BadRequest(f"got images among queries and documents: {reason}", param="documents")
    return texts


def _opened(side: Side, pictures: PictureRenderer) -> Side:
    """Return a query or a document whose pictures have their headers read."""
    return side if isinstance(side, str) else replace(side, sources=tuple(pictures.headers(side)))


def _ending(ids: Ids, end: Ids) -> Ids:
    """Return `ids` with `end` in place of the last ones."""
    return [*ids[: len(ids) - len(end)], *end]


def _marked(query: str, document: str, template: PairTemplate) -> PairTexts:
    """Return a pair, without the template's suffix and marked as such if its client has rendered it."""
    if template.is_rendered(query, document):
        return PairTexts(query, document.removesuffix(template.suffix), True)
    return PairTexts(query, document)


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
