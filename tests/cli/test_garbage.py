"""When a server's garbage is collected. In processes of their own, as the collector is one for all of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.full  # processes of their own

BEGINNING = """
import gc, time, weakref
from cenote.cli.garbage import collections_by_the_clock, no_full_collections

class Node:
    pass

def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

def full():
    return gc.get_stats()[2]["collections"]
"""


def run(program: str) -> None:
    ran = subprocess.run([sys.executable, "-c", BEGINNING + program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_what_is_loaded_is_never_looked_through() -> None:
    run("""
before, thresholds = full(), gc.get_threshold()
with no_full_collections():
    loaded = [[] for _ in range(200_000)]
assert full() == before
assert gc.get_freeze_count() > 200_000
assert gc.get_threshold() == thresholds
try:
    with no_full_collections():
        raise OSError
except OSError:
    assert gc.get_threshold() == thresholds
""")


def test_many_waiting_requests_are_no_reason_to_look_through_all() -> None:
    """A thousand of them hold 150,000 objects; young cycles are collected meanwhile."""
    run("""
thresholds = gc.get_threshold()
with collections_by_the_clock(3600):
    before = full()
    held = [[] for _ in range(300_000)]
    assert full() == before
    cycles = [cycle() for _ in range(1000)]
    held += [[] for _ in range(10_000)]
    assert not any(reference() for reference in cycles)
assert gc.get_threshold() == thresholds
""")


def test_an_old_cycle_goes_by_the_clock() -> None:
    """Without a single further object."""
    run("""
node = Node()
node.itself = node
reference = weakref.ref(node)
gc.collect()
with collections_by_the_clock(0.01):
    del node
    deadline = time.monotonic() + 60
    while reference() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reference() is None
""")


def test_a_busy_server_puts_it_off_four_times() -> None:
    run("""
events = []

def collected(phase, info):
    if phase == "stop" and info["generation"] == 2:
        events.append("collected")

def is_busy():
    events.append("asked")
    return len(events) < 16

gc.callbacks.append(collected)
with collections_by_the_clock(0.001, is_busy):
    deadline = time.monotonic() + 60
    while len(events) < 18 and time.monotonic() < deadline:
        time.sleep(0.001)
busy = [*["asked"] * 5, "collected"]
assert events[:18] == [*busy, *busy, "asked", "asked", "asked", "asked", "collected", "asked"], events
""")
