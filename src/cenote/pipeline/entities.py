"""From a token classifier's probabilities to named entities: tokens, words, groups of one type.

The rules are those of Transformers' `TokenClassificationPipeline`, its oddities included, so that a caller of
`pipeline("token-classification")` gets the same entities here. No model and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cenote.errors import BadRequest, TaskNotOffered

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from cenote.core import ModelInfo

    Array = np.ndarray[Any, np.dtype[np.float32]]

T = TypeVar("T")

PER_TOKEN = ("none", "simple")
"""Strategies that label every token by itself."""

PER_WORD: dict[str, Callable[[Array], Array]] = {
    "first": lambda scores_TC: scores_TC[0],
    "average": lambda scores_TC: scores_TC.mean(axis=0),
    "max": lambda scores_TC: scores_TC[scores_TC.max(axis=1).argmax()],
}
"""Strategies that label whole words, each with the scores of a word out of those of its tokens."""

AGGREGATIONS = (*PER_TOKEN, *PER_WORD)
"""Known values of `aggregation`."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A labelled stretch of text.

    Attributes:
        label: the model's own label ("B-PER") without aggregation, else the type ("PER").
        score: probability of the label; the mean over its parts in a group.
        word: its tokens, joined by the tokenizer. The text itself is `text[start:end]`.
        start: first character.
        end: character after the last one.
        index: number of the token, special tokens counted; `None` with aggregation.
    """

    label: str
    score: float
    word: str
    start: int
    end: int
    index: int | None = None


@dataclass(frozen=True, slots=True)
class _Token:
    word: str
    start: int
    end: int
    index: int
    continues: bool
    """Whether it belongs to the same word as the token before it."""


def entities(
    text: str,
    encoding: Encoding,
    scores_TC: Array,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    first: int = 0,
    aggregation: str = "none",
    ignore_labels: Collection[str] = ("O",),
) -> list[Entity]:
    """Return the entities of `text` in reading order.

    Args:
        text: the whole text.
        encoding: the tokenizer's encoding of `text` or of a part of it, special tokens included.
        scores_TC: float32 probabilities, a row for each token of `encoding`.
        labels: name of each class, in the order of the columns.
        tokenizer: the fast tokenizer that made `encoding`.
        first: character of `text` from which the offsets of `encoding` count.
        aggregation: one of `AGGREGATIONS`. "none" gives every token; "simple" joins neighbouring tokens of one type;
            "first", "average" and "max" label whole words, by the first token, the mean of the tokens or the most
            certain token, and join neighbouring words of one type.
        ignore_labels: values of `Entity.label` that are left out.

    Raises:
        BadRequest: `aggregation` is not known.
        ValueError: `scores_TC` and `encoding` differ in length.
    """
    check_aggregation(aggregation)
    if len(encoding) != len(scores_TC):
        raise ValueError(f"{len(scores_TC)} rows of scores for {len(encoding)} tokens")
    tokens = _tokens(text, encoding, tokenizer, first)
    if aggregation in PER_TOKEN:
        parts = [_labelled(token.word, [token], scores_TC[token.index], labels) for token in tokens]
    else:
        parts = _labelled_words(_runs(tokens, _begins_word), scores_TC, labels, tokenizer, PER_WORD[aggregation])
    if aggregation != "none":
        parts = [_joined(group, tokenizer) for group in _runs(parts, _begins_group)]
    return [part for part in parts if part.label not in ignore_labels]


def softmax(logits_TC: Array) -> Array:
    """Return the probabilities of each row's classes, `[T, C]`."""
    exponentials_TC = np.exp(logits_TC - logits_TC.max(axis=-1, keepdims=True))
    probabilities_TC: Array = exponentials_TC / exponentials_TC.sum(axis=-1, keepdims=True)
    return probabilities_TC


def check_labels(info: ModelInfo) -> None:
    """Raise `TaskNotOffered` if the model rates tokens, but not by labels, as reward models do."""
    if "token_classify" in info.tasks and (info.step or not info.labels):
        units = "steps" if info.step else "tokens"
        raise TaskNotOffered(
            f"{info.name} rates {units} and has no labels that would be entities; "
            "task token_classify of /pooling and LLM.encode gives its numbers",
            param="task",
        )


def check_aggregation(aggregation: str) -> None:
    """Raise `BadRequest` if `aggregation` is not one of `AGGREGATIONS`."""
    if aggregation not in AGGREGATIONS:
        names = ", ".join(AGGREGATIONS)
        raise BadRequest(
            f"unknown aggregation_strategy {aggregation!r}; known are: {names}", param="aggregation_strategy"
        )


def _tokens(text: str, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, first: int) -> list[_Token]:
    """Return the tokens of the text, without special tokens.

    Where the tokenizer marks continuations ("##ing"), a token continues a word if it is not as long as its stretch of
    text; that takes in a word from which normalization dropped characters. Otherwise it continues a word unless there
    is a space before it or at its beginning. An unknown token is a word of its own, spelled as in the text.
    """
    marks = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
    pieces = tokenizer.convert_ids_to_tokens(encoding.ids)
    tokens = []
    for index, (piece, offsets) in enumerate(zip(pieces, encoding.offsets, strict=True)):
        if encoding.special_tokens_mask[index]:
            continue
        start, end = (first + offset for offset in offsets)
        surface = text[start:end]
        if encoding.ids[index] == tokenizer.unk_token_id:
            piece, continues = surface, False
        elif marks:
            continues = len(piece) != len(surface)
        else:
            continues = start > 0 and " " not in text[start - 1 : start + 1]
        tokens.append(_Token(piece, start, end, index, continues))
    return tokens


def _runs(items: Iterable[T], begins: Callable[[list[T], T], bool]) -> list[list[T]]:
    """Split `items` into runs. An item starts one if `begins`, called with the run before it and the item, says so."""
    runs: list[list[T]] = []
    for item in items:
        if not runs or begins(runs[-1], item):
            runs.append([])
        runs[-1].append(item)
    return runs


def _begins_word(_: list[_Token], token: _Token) -> bool:
    return not token.continues


def _begins_group(group: list[Entity], part: Entity) -> bool:
    """Return whether `part` has another type than `group` or a "B-" label; one without "B-" or "I-" has not."""
    return part.label.startswith("B-") or _type(part.label) != _type(group[0].label)


def _labelled_words(
    words: Iterable[list[_Token]],
    scores_TC: Array,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    join: Callable[[Array], Array],
) -> list[Entity]:
    """Label whole words by the scores that `join` makes of those of their tokens."""
    parts = []
    for word in words:
        spelling = tokenizer.convert_tokens_to_string([token.word for token in word])
        scores_C = join(scores_TC[[token.index for token in word]])
        parts.append(_labelled(spelling, word, scores_C, labels))
    return parts


def _labelled(word: str, tokens: Sequence[_Token], scores_C: Array, labels: Sequence[str]) -> Entity:
    """Label `tokens` by the highest score."""
    best = int(scores_C.argmax())
    return Entity(labels[best], float(scores_C[best]), word, tokens[0].start, tokens[-1].end, tokens[0].index)


def _type(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _joined(group: Sequence[Entity], tokenizer: PreTrainedTokenizerBase) -> Entity:
    """Join a group to one entity. Its label loses any prefix, "S-PER" and "X-PER" too, although these never mix."""
    return Entity(
        group[0].label.split("-", 1)[-1],
        fmean(part.score for part in group),
        tokenizer.convert_tokens_to_string([part.word for part in group]),
        group[0].start,
        group[-1].end,
    )
