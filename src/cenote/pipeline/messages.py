"""Texts rendered as a user's messages, for embedders that were trained behind a chat template.

As `Transformer.preprocess` of sentence-transformers 6: the text is the message of a user, its prompt one of the system
before it, and where the rendered text was cut, the tokens that the template puts at the end are put back.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from cenote.pipeline.tokenizing import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cenote.conventions import MessageTemplate, Role
    from cenote.pipeline.prompts import Applied
    from cenote.pipeline.tokenizing import Ids

FILLERS = ("0", "1 2 3 4")
"""Texts that have no token at their end in common."""

REMEMBERED = 256
"""Prompts whose ends are remembered."""


def message(role: str, content: str | list[dict[str, Any]], *, structured: bool) -> dict[str, Any]:
    """Return a message with its content, a text as a list of one part where the template takes lists."""
    if structured and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {"role": role, "content": content}


def common_end(first: Ids, second: Ids) -> Ids:
    """Return the tokens at the end that two renderings have in common; none where they have all in common."""
    backwards = zip(reversed(first), reversed(second), strict=False)
    count = len(list(takewhile(lambda pair: pair[0] == pair[1], backwards)))
    if count == min(len(first), len(second)):
        return []
    return first[len(first) - count :]


class MessageRenderer:
    """Renders texts for one model.

    Args:
        template: its template.
        apply: renders messages by a template (`None` = the tokenizer's) with further variables.
        tokenize: gives the ids of a rendered text.
    """

    def __init__(
        self,
        template: MessageTemplate,
        apply: Callable[[list[dict[str, Any]], str | None, Mapping[str, Any]], str],
        tokenize: Callable[[str], Ids],
    ) -> None:
        self._template = template
        self._apply = apply
        self._tokenize = tokenize
        self._end = lru_cache(REMEMBERED)(self._measured_end)

    def text(self, content: str, prompt: str, task: Role | None) -> str:
        """Render one text.

        Args:
            content: the text.
            prompt: text of the system's message; empty = there is none.
            task: side of the text, if it is known.

        Raises:
            BadRequest: the template refuses it.
        """
        structured = self._template.structured
        messages = [message("user", content, structured=structured)]
        if prompt:
            messages.insert(0, message("system", prompt, structured=structured))
        return self._apply(messages, self._template.source, self._template.variables(task))

    def restored(self, text: Text, limit: int, applied: Applied) -> Text:
        """Return a rendered text that was cut to `limit` tokens with the end that the template gives it."""
        if len(text.ids) < limit or not self._template.restores:
            return text
        end = self._end(applied.text, applied.role)[-len(text.ids) :]
        return Text([*text.ids[: len(text.ids) - len(end)], *end], text.type_ids)

    def _measured_end(self, prompt: str, task: Role | None) -> Ids:
        """Return the tokens behind every text, as the template has them."""
        first, second = (self._tokenize(self.text(filler, prompt, task)) for filler in FILLERS)
        return common_end(first, second)
