"""Equal sequences of one request, which run once: equal documents get equal results, bit by bit."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cenote.engine.cache import key_of
from cenote.functions import places_by

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.core import Sequence


def distinct(sequences: Seq[Sequence]) -> list[list[int]]:
    """Return the places of each distinct sequence, by first place.

    Sequences are equal if their results are: in ids, types, task, parameters, adapter, and all else that is compared.
    Keys of whole sequences, which take as long as a tokeniser, are made only where ids are equal.
    """
    if len(sequences) < 2:
        return [[place] for place in range(len(sequences))]
    ids = [key_of(sequence.ids) for sequence in sequences]
    counts = Counter(ids)
    keys = (key_of(sequence) if counts[key] > 1 else key for sequence, key in zip(sequences, ids, strict=True))
    return [*places_by(keys).values()]
