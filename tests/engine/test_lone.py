"""Lone sequences run where they have been faster of late, and the other way is tried again now and then."""

from __future__ import annotations

from cenote.engine.lone import LATEST, SOONEST, Lone


def run(lone: Lone, tokens: int, count: int, wide: float, narrow: float) -> list[bool]:
    """Let `count` sequences take the seconds of the way that is chosen; returns the ways."""
    ways = []
    for _ in range(count):
        is_wide = lone.is_wide(tokens)
        assert lone.is_wide(tokens) is is_wide, "asking changes nothing"
        lone.note(tokens, is_wide=is_wide, seconds=wide if is_wide else narrow)
        ways.append(is_wide)
    return ways


def test_both_ways_are_tried_at_first_then_the_faster_one_is_taken() -> None:
    ways = run(Lone(), 12, SOONEST, wide=0.004, narrow=0.006)
    assert ways[:2] == [True, False]
    assert all(ways[2:])


def test_beside_something_else_a_part_of_the_cores_is_faster() -> None:
    ways = run(Lone(), 12, 2_000, wide=0.4, narrow=0.03)
    assert sum(ways) < 12, "all cores are tried the more seldom the worse they are"
    assert not any(ways[-LATEST // 2 :])


def test_all_cores_are_taken_again_once_the_machine_is_idle() -> None:
    lone = Lone()
    run(lone, 12, 300, wide=0.4, narrow=0.03)
    ways = run(lone, 12, 2 * LATEST, wide=0.004, narrow=0.03)
    first = ways.index(True)
    assert first <= LATEST
    assert sum(ways[first:]) > 0.9 * len(ways[first:])


def test_a_part_is_taken_once_the_machine_is_busy() -> None:
    lone = Lone()
    run(lone, 12, 300, wide=0.004, narrow=0.006)
    ways = run(lone, 12, 100, wide=0.4, narrow=0.006)
    assert ways.index(False) <= SOONEST
    assert sum(ways[20:]) <= 5


def test_lengths_are_apart() -> None:
    lone = Lone()
    run(lone, 12, 100, wide=0.4, narrow=0.03)
    assert lone.is_wide(400), "nothing is known of long texts yet"
    run(lone, 400, 100, wide=0.1, narrow=0.2)
    assert lone.is_wide(400)
    assert not lone.is_wide(12)
