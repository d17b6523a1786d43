"""Texts of `cenote bench`: common words, as many as make a given number of tokens."""

from __future__ import annotations

import random
import statistics
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from cenote.errors import CenoteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Seq

TRIES = 16
"""Numbers of words that are tried for a text of a given number of tokens."""

# All of five letters, so that tokenizers of letters and bytes give every text of so many words as many tokens.
_SOME = (
    "above after again along among begin below black board bread break bring brown build carry catch cause chair "
    "child claim class clean clear close coast could count cover cross dance doubt dream dress drink drive early "
    "earth eight enemy enjoy enter equal event every field fight final first floor force forty found fresh front "
    "fruit glass grass great green group guard guess happy heart heavy horse hotel house human judge large laugh "
    "learn leave level light local lunch major match maybe metal might money month mouth music never night noise "
    "north novel occur offer often order other owner paint paper party peace phone piece place plain plane plant "
    "point power press price proud quick quiet quite radio raise range reach ready right river round scale scene "
    "score sense serve seven shall shape share sharp shore short shown sight since skill sleep small smile solid "
    "sound south space speak speed spend sport staff stage stand start state steel stone store storm story study "
    "sugar table taken teach thank their theme there thick thing think third those three throw title today total "
    "touch tower track trade train treat trial truth twice under union until upper usual value visit voice waste "
    "watch water wheel where which while white whole whose woman world worry would write wrong young"
)
WORDS = _SOME.split()
"""Words of the texts: a token each in most vocabularies."""


class Fit(NamedTuple):
    """A number of words, and the number of tokens that they make."""

    words: int
    tokens: int


class Texts:
    """Texts of given numbers of tokens, made of common words; new ones each time.

    Args:
        count: returns the tokens of a text.
        choosy: use only words of the most common number of tokens; each word is counted once.
    """

    def __init__(self, count: Callable[[str], int], *, choosy: bool = False) -> None:
        self._count = count
        self._vocabulary = WORDS
        if choosy:
            tokens = {word: count(f"{WORDS[0]} {word}") for word in WORDS}
            usual = statistics.mode(tokens.values())
            self._vocabulary = [word for word in WORDS if tokens[word] == usual]
        self._random = random.Random(0)
        self._fits: dict[int, Fit | None] = {}

    def of(self, fits: Seq[Fit]) -> list[str]:
        """Return a text of each size."""
        return [self._text(fit.words) for fit in fits]

    def fit(self, tokens: int) -> Fit | None:
        """Return the words for `tokens` tokens, or for the most below; `None` if even one word makes more."""
        if tokens not in self._fits:
            self._fits[tokens] = self._search(tokens)
        return self._fits[tokens]

    def fits(self, lengths: Iterable[int], longest: int) -> list[Fit]:
        """Return the fit of each of `lengths`, of at most `longest` tokens; without those that one word exceeds."""
        sizes = [min(length, longest) for length in lengths]
        return list(filter(None, map(self.fit, sizes)))

    def _search(self, tokens: int) -> Fit | None:
        one, three = self._line
        words = max(1, 1 + round(2 * (tokens - one) / max(1, three - one)))
        below: Fit | None = None
        for _ in range(TRIES):
            try:
                count = self._count(self._text(words))
            except CenoteError:  # too long
                count = tokens + 1
            if count == tokens:
                return Fit(words, count)
            if count < tokens:
                below = Fit(words, count)
                words += 1
                continue
            words -= 1
            if words == 0 or (below and below.words == words):
                break
        return below

    @cached_property
    def _line(self) -> tuple[int, int]:
        """The tokens of one word and of three."""
        return self._count(self._text(1)), self._count(self._text(3))

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(self._vocabulary, k=words))
