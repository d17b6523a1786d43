"""Small functions that the standard library lacks."""

from __future__ import annotations

from itertools import compress
from operator import not_
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


T = TypeVar("T")
U = TypeVar("U")
K = TypeVar("K")


def coalesce(value: T | None, default: T) -> T:
    """Return `value`, or `default` if it is `None`, as in SQL."""
    return default if value is None else value


def optional(function: Callable[[T], U], value: T | None) -> U | None:
    """Return `function(value)`, or `None` for `None`."""
    return None if value is None else function(value)


def places_by(keys: Iterable[K]) -> dict[K, list[int]]:
    """Return the places of each of `keys`, by its first one."""
    places: dict[K, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def map_apart(
    flags: Sequence[bool],
    of_flagged: Callable[[list[T]], Iterable[U]],
    of_others: Callable[[list[T]], Iterable[U]],
    items: Sequence[T],
) -> list[U]:
    """Return the results for `items`, in order: of those with a flag one function makes them, another of the rest."""
    if not any(flags):
        return list(of_others(list(items)))
    if all(flags):
        return list(of_flagged(list(items)))
    flagged = iter(of_flagged(list(compress(items, flags))))
    others = iter(of_others(list(compress(items, map(not_, flags)))))
    return [next(flagged if flag else others) for flag in flags]
