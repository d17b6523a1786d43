"""Small functions that the standard library lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


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
