"""Templates over a query and a document -> the prompts of pairs, of texts alone and with pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.errors import BadRequest
from cenote.pipeline.inputs import Illustrated
from cenote.pipeline.messages import FILLERS, common_end, message
from cenote.pipeline.pictures import shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from cenote.conventions import PairTemplate
    from cenote.pipeline.inputs import Side
    from cenote.pipeline.pictures import PictureRenderer
    from cenote.pipeline.rendering import Renderer
    from cenote.pipeline.tokenizing import Ids

MESSAGES = "messages"
"""Variable of templates that depend on the pair."""

PROBED = ("thequery", "thedocument")
"""Texts of a pair that shows which of the two a template puts first."""

Content = str | list[dict[str, Any]]
"""Content of a message: a text, or parts."""


class PairTexts(NamedTuple):
    """A pair to render.

    Attributes:
        is_rendered: its client has put the template's prefix before the query, and the suffix after the document,
            which is kept apart.
    """

    query: str
    document: str
    is_rendered: bool = False


@dataclass(frozen=True)
class PairPrompt:
    """A template for pairs, with the variables of one request.

    Attributes:
        renderer: of the model.
        template: the template.
        kwargs: its further variables.
        special: add the tokenizer's special tokens to the rendered prompt.
    """

    renderer: Renderer
    template: PairTemplate
    kwargs: Mapping[str, Any]
    special: bool

    def ids(self, pairs: Seq[PairTexts]) -> list[Ids]:
        """Render and tokenise pairs; a text that comes several times is tokenised once."""
        return self._tokenised(self._texts(pairs))

    def illustrated(self, query: Side, document: Side, pictures: PictureRenderer) -> Illustrated:
        """Return the prompt of a pair with pictures.

        Raises:
            BadRequest: the template refuses it, or the sides have different arguments of the image processor.
        """
        sides = [side for side in (query, document) if isinstance(side, Illustrated)]
        kwargs = sides[0].kwargs
        if any(side.kwargs != kwargs for side in sides):
            raise BadRequest(
                "got other mm_processor_kwargs for the query than for the document; expected the same for both",
                param="mm_processor_kwargs",
            )
        markup = pictures.pictures.markup
        contents = {"query": self._content(query, markup), "document": self._content(document, markup)}
        rendered = [pictures.spelled_out(self._of_contents(contents, source)) for source in self.template.sources]
        (ids,) = self._tokenised([list(map(self.renderer.whole, rendered))])
        ordered = reversed(sides) if self._begins_with_document else sides
        return Illustrated(ids, tuple(chain.from_iterable(side.sources for side in ordered)), kwargs)

    @cached_property
    def _begins_with_document(self) -> bool:
        """Whether the template puts the document before the query, as a pair of two known texts shows."""
        (parts,) = self._texts([PairTexts(*PROBED)])
        query, document = map("".join(parts).find, PROBED)
        return -1 < document < query

    def _content(self, side: Side, markup: str) -> Content:
        """Return the content of a message: parts in their order, or `markup` for each picture before the texts."""
        if isinstance(side, str):
            return side
        if self.template.structured and isinstance(side.content, tuple):
            return list(map(shown, side.content))
        return markup * len(side.sources) + "".join(side.texts)

    def _tokenised(self, rendered: Seq[list[str]]) -> list[Ids]:
        """Return the ids of prompts, the texts of each of which are tokenised apart."""
        distinct = list(dict.fromkeys(chain.from_iterable(rendered)))
        special = self.special and not self.template.parts
        tokenized = self.renderer.tokenize_all(distinct, add_special_tokens=special)
        ids_of = dict(zip(distinct, tokenized, strict=True))
        first, closing = self._first(), self.template.closing
        return [[*first, *chain.from_iterable(ids_of[text] for text in parts), *closing] for parts in rendered]

    def end(self) -> Ids:
        """Return the tokens that the template puts at the end of every prompt."""
        first, second = self.ids([PairTexts(text, text) for text in FILLERS])
        return common_end(first, second)

    def _texts(self, pairs: Seq[PairTexts]) -> list[list[str]]:
        """Render pairs: of each the texts that are tokenised apart. Parts without messages are rendered once."""
        template = self.template
        fixed: dict[str | None, str] = {
            part: self._render(PairTexts("", ""), part) for part in template.parts if MESSAGES not in part
        }

        def rendered(pair: PairTexts) -> list[str]:
            if pair.is_rendered:
                return [pair.query + pair.document + template.suffix]
            return [fixed.get(source) or self._render(pair, source) for source in template.sources]

        return list(map(rendered, pairs))

    def _render(self, pair: PairTexts, source: str | None) -> str:
        return self._of_contents({"query": pair.query, "document": pair.document}, source)

    def _of_contents(self, contents: Mapping[str, Content], source: str | None) -> str:
        """Render messages by their roles."""
        system = self._system()
        if system:
            contents = {"system": system, **contents}
        structured = self.template.structured
        messages = [message(role, content, structured=structured) for role, content in contents.items()]
        return self.renderer.template.apply(messages, source, {**self.template.kwargs, **self.kwargs})

    def _first(self) -> list[int]:
        """Return the tokens before the parts."""
        bos = self.renderer.tokenizer.bos_token_id
        return [bos] if self.template.bos and self.special and bos is not None else []

    def _system(self) -> str:
        """Return the text of the message before the two; empty if there is none."""
        if self.template.system is None:
            return ""
        return self.kwargs.get("instruction") or self.template.system
