"""Conventions of a model for its inputs: the two sides of a search, pictures, and templates of pairs and of messages.

Plain data, which a family of checkpoints gives and rendering reads. No torch and no web here.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cenote.core import Sequence
from cenote.errors import ConfigError
from cenote.functions import optional

Role = Literal["query", "document"]
"""A side of a search."""


@dataclass(frozen=True)
class Sides:
    """How a model encodes its two sides differently, in token ids: late interaction, or queries by a table.

    Attributes:
        lengths: tokens to which a side is cut.
        fill_to: tokens to which queries are filled up; 0 = they are not.
        fills_all: all texts are filled up, whatever their side.
        fill_id: id of the tokens added.
        fixed: queries are also cut to `fill_to`.
        attend: other tokens attend to the added ones.
        skipped: ids whose rows are left out.
        skipped_of: sides from which they are left out; an input without a side counts as a document.
        kept: ids of the only rows of inputs that are not queries; empty = all.
        pooled_of: sides whose token vectors are joined into fewer; likewise.
        by_table: sparse embeddings of queries come from a table of weights; their tokens are only those of the text.
        inserted: ids of the markers that stand behind the first token of a side.
    """

    lengths: Mapping[str, int] = field(default_factory=dict)
    fill_to: int = 0
    fill_id: int = 0
    fixed: bool = True
    attend: bool = False
    fills_all: bool = False
    skipped: frozenset[int] = frozenset()
    skipped_of: tuple[str, ...] = ("document",)
    pooled_of: tuple[str, ...] = ()
    by_table: bool = False
    inserted: Mapping[str, int] = field(default_factory=dict)
    kept: frozenset[int] = frozenset()

    def limit(self, role: Role | None, most: int) -> int | None:
        """Return the tokens to which an input is cut, at most `most`; `None` = the model names no length."""
        length = self.lengths.get(role or "")
        if role == "query" and self.fill_to and self.fixed:
            length = self.fill_to
        return optional(partial(min, most), length)

    def takes_special_tokens(self, role: Role | None) -> bool:
        """Return whether the tokenizer's special tokens belong to an input."""
        return not self._by_table(role)

    def _marked(self, ids: list[int], role: Role | None) -> list[int]:
        """Return `ids`, which begin with the marker of their side, with the marker in its place."""
        if len(ids) > 1 and ids[0] == self.inserted.get(role or ""):
            ids[:2] = ids[1], ids[0]
        return ids

    def of_ids(self, sequence: Sequence, role: Role | None) -> Sequence:
        """Return `sequence`, whose caller gave its ids, as the model takes its side."""
        if self.fills_all:
            return self.of_text(sequence, role)
        return replace(sequence, looked_up=True) if self._by_table(role) else sequence

    def of_text(self, sequence: Sequence, role: Role | None) -> Sequence:
        """Return `sequence`, made of a text, as the model takes its side: queries filled up, skipped tokens marked."""
        ids, types = self._marked(list(sequence.ids), role), sequence.type_ids
        is_filled = (role == "query" or self.fills_all) and not sequence.media
        added = max(0, self.fill_to - len(ids)) if is_filled else 0
        ids += [self.fill_id] * added
        return replace(
            sequence,
            ids=ids,
            type_ids=None if types is None else [*types, *[0] * added],
            hidden=0 if self.attend else added,
            keep=self._kept(ids, role),
            clusters=(role or "document") in self.pooled_of,
            looked_up=self._by_table(role),
        )

    def _by_table(self, role: Role | None) -> bool:
        return self.by_table and role == "query"

    def _kept(self, ids: Seq[int], role: Role | None) -> tuple[int, ...] | None:
        """Return which tokens' rows are kept; `None` = all."""
        left_out: set[int] = set()
        if (role or "document") in self.skipped_of:
            left_out.update(self.skipped.intersection(ids))
        if self.kept and role != "query":
            left_out.update(set(ids) - self.kept)
        return tuple(i for i, token in enumerate(ids) if token not in left_out) if left_out else None


@dataclass(frozen=True)
class Alike(Sides):
    """The sides of a model that encodes queries and documents alike."""

    def of_text(self, sequence: Sequence, role: Role | None) -> Sequence:
        """Return `sequence` as it is."""
        return sequence


Cuts = Literal["longest_first", "only_first", "only_second"]
"""Text of a pair that is cut where both are too long together, in the words of Transformers."""

MOST_PICTURES = 16
"""Maximum pictures of a prompt, unless an option says otherwise."""


@dataclass(frozen=True)
class Pictures:
    """How inputs of a model hold pictures: all that rendering needs to know.

    Attributes:
        folder: of the files of the image processor.
        layout: key of `cenote.pipeline.pictures.LAYOUTS`: how a processed picture becomes tokens.
        placeholder: id of the tokens that a picture takes the place of.
        markup: text that stands for a picture in a prompt; empty = a picture is an input of its own.
        spelled: another text that stands for the placeholder in templates; empty = there is none.
        tokens: tokens of every picture; 0 = as many as its patches say.
        patches: rows of the vision tower of every picture; 0 = as many as there are patches.
        merge: patches along a side that become one token.
        positions: "mrope" = a picture's tokens count rows and columns; "flat" = tokens count on.
        first_position: position of the first token.
        most_pixels: pixels to which larger pictures are shrunk, besides the image processor's own bound; 0 = that one.
        template: renders an input that is a picture, or pictures and texts; `None` = they stand side by side.
        blank: side of the black picture that stands in inputs of texts alone, in pixels; 0 = none does.
        rendered: beginning of texts that their clients have rendered, beside which it does not stand.
        kwargs: arguments of the image processor, of all requests.
        most: maximum pictures of a prompt.
        may_grow: arguments of a request may exceed the bounds of the image processor.
        refusal: why the model takes no pictures after all; empty = it does.
    """

    folder: str
    layout: str
    placeholder: int = 0
    markup: str = ""
    spelled: str = ""
    tokens: int = 0
    patches: int = 0
    merge: int = 1
    positions: str = "flat"
    first_position: int = 0
    most_pixels: int = 0
    template: MessageTemplate | None = None
    blank: int = 0
    rendered: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    most: int = MOST_PICTURES
    may_grow: bool = False
    refusal: str = ""


@dataclass(frozen=True)
class PairTemplate:
    """A Jinja template over two messages, roles `query` and `document`, that renders a pair for a reranker.

    Attributes:
        source: the template; `None` = the tokenizer's own chat template.
        kwargs: further variables.
        structured: message contents are lists of parts instead of text.
        add_special_tokens: whether the rendered text gets the tokenizer's special tokens besides its own.
        system: a message of that role before the two, which a request's `instruction` replaces; `None` = there is no
            such message.
        parts: templates in place of `source` whose texts are tokenised apart, without special tokens, and joined as
            ids; empty = `source` is tokenised as a whole.
        bos: the beginning-of-sequence token is put before the `parts`.
        prefix: text before the query.
        suffix: text after the document. A pair whose query begins with `prefix` and whose document ends with `suffix`
            is rendered already, and stays as it is; both empty = that is not looked for.
        cuts_whole: a prompt that is too long is cut like a text, not its document alone.
        restores: the end of the template is put back where a prompt was cut like a text.
        closing: ids behind every prompt.
    """

    source: str | None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = False
    add_special_tokens: bool = True
    system: str | None = None
    parts: tuple[str, ...] = ()
    bos: bool = False
    prefix: str = ""
    suffix: str = ""
    cuts_whole: bool = False
    restores: bool = True
    closing: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[str | None, ...]:
        """The templates whose texts are tokenised apart."""
        return self.parts or (self.source,)

    def is_rendered(self, query: str, document: str) -> bool:
        """Return whether a client has rendered the pair already."""
        is_known = bool(self.prefix and self.suffix)
        return is_known and query.startswith(self.prefix) and document.endswith(self.suffix)


LISTWISE_MARKERS = ("<|embed_token|>", "<|rerank_token|>")
"""Tokens after a document and after the query in a listwise prompt, whose states are compared."""


@dataclass(frozen=True)
class MessageTemplate:
    """A chat template that renders every text as a user's message, and its prompt as a system message.

    Attributes:
        source: the template; `None` = the tokenizer's own.
        kwargs: its further variables.
        structured: message contents are lists of parts instead of text.
        takes_task: the template gets "query" or "document" as its variable `task`, where the side is known.
        restores: the tokens that the template puts at the end are put back where an input was cut.
    """

    source: str | None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = False
    takes_task: bool = False
    restores: bool = True

    def variables(self, task: Role | None) -> Mapping[str, Any]:
        """Return the further variables for an input, whose side is `task` where it is known."""
        if task is None or not self.takes_task:
            return self.kwargs
        return {"task": task, **self.kwargs}


def plain_name(name: str) -> str:
    """Return the plain spelling of `name`: `retrieval.query`, `retrieval-query` and `retrieval_query` are one."""
    return name.lower().replace(".", "_").replace("-", "_").replace(" ", "_")


def template_text(source: str) -> str:
    """Return a Jinja template out of its text or the path of a file.

    Raises:
        ConfigError: it is neither: a text without braces would stand in place of every conversation.
    """
    if "{" in source:
        return source
    try:
        return Path(source).read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template is {source!r}, which has no braces as a Jinja template has, and is no file that can be "
            f"read: {error}; expected a template, or the path of one"
        ) from None
