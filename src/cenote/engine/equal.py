"""Equal sequences of one request, which run once: equal documents get equal results, bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenote.engine.cache import key_of

if TYPE_CHECKING:
    from collections.abc import Hashable
    from collections.abc import Sequence as Seq

    from cenote.core import Sequence


def distinct(sequences: Seq[Sequence]) -> list[list[int]]:
    """Return the places of each distinct sequence, by first place.

    Sequences are equal if their results are: in ids, types, task, parameters, adapter, and all else that is compared.
    Keys of whole sequences, which take as long as a tokeniser, are made only where ids are equal.
    """
    if len(sequences) < 2:
        return [[place] for place in range(len(sequences))]
    by_ids: dict[Hashable, list[int]] = {}
    for place, sequence in enumerate(sequences):
        by_ids.setdefault(key_of(sequence.ids), []).append(place)
    if len(by_ids) == len(sequences):
        return [*by_ids.values()]
    by_key: dict[Hashable, list[int]] = {}
    for places in by_ids.values():
        for place in places:
            key = key_of(sequences[place]) if len(places) > 1 else place
            by_key.setdefault(key, []).append(place)
    return sorted(by_key.values())
