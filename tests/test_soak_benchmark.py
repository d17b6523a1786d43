"""The judgement of the benchmark that runs for long: no noise is a leak, and no leak is flat."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.soak import LIMITS, SHARED, growth, judged, status

COUNT = 50
"""Rounds of twenty minutes."""
RUNS = 40
FLAT = {
    "megabytes": 650.0, "descriptors": 40.0, "threads": 12.0, "cpu_ms_per_1000_tokens": 120.0, "mean_ms": 80.0,
    "p95_ms": 200.0,
}  # fmt: skip
NOISE = {"megabytes": 0.003, "descriptors": 0.02, "cpu_ms_per_1000_tokens": 0.03, "mean_ms": 0.06, "p95_ms": 0.1}
"""Standard deviations of a reading, of its value."""
pytestmark = pytest.mark.full  # a tool for developers


def readings(seed: int, others: np.ndarray, **leaks: float) -> list[dict[str, float]]:
    """Return readings of a flat server, but for leaks, by how much a figure grows in all.

    What other processes take makes latencies and CPU time as much longer as less is left.
    """
    generator = np.random.default_rng(seed)
    times = np.linspace(0, 1, COUNT)
    columns = {"others": others}
    for name, value in FLAT.items():
        noise = np.exp(NOISE.get(name, 0) * generator.standard_normal(COUNT))
        slower = 1 / (1 - others) ** (2 if name in SHARED - {"cpu_ms_per_1000_tokens"} else 0.3 * (name in SHARED))
        columns[name] = value * noise * slower * (1 + leaks.get(name, 0) * times)
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def quiet() -> np.ndarray:
    return np.full(COUNT, 0.01)


def in_pieces(seed: int = 0) -> np.ndarray:
    """Other processes for two minutes, time and again."""
    generator = np.random.default_rng(seed)
    return np.repeat(generator.uniform(0, 0.6, COUNT // 5), 5)


def late() -> np.ndarray:
    """Another process that comes in the middle and stays."""
    return np.where(np.arange(COUNT) < COUNT // 2, 0.0, 0.45) + 0.01


@pytest.mark.parametrize(
    ("others", "told"),
    [(quiet(), 0.9), (in_pieces(), 0.9), (late(), 0.2)],
    ids=["alone", "beside some", "beside one, later"],
)
def test_no_noise_is_a_leak(others: np.ndarray, told: float) -> None:
    statuses = Counter(status(judged(readings(seed, others)), Counter()) for seed in range(RUNS))
    assert statuses[1] == 0
    assert statuses[0] >= RUNS * told


@pytest.mark.parametrize("others", [quiet(), in_pieces(), late()], ids=["alone", "beside some", "beside one, later"])
@pytest.mark.parametrize("name", sorted(LIMITS))
def test_no_leak_is_flat(others: np.ndarray, name: str) -> None:
    grows = 2.5 * (LIMITS[name] - 1)
    growths = [judged(readings(seed, others, **{name: grows}))[name] for seed in range(RUNS)]
    assert Counter(growth.verdict for growth in growths)["flat"] == 0


def test_where_the_machine_tells_nothing_the_run_does_not_either() -> None:
    """Others take ever more, as the latency grows: it is theirs, or a leak, and nobody knows."""
    others = np.linspace(0, 0.6, COUNT)
    growths = judged(readings(0, others, mean_ms=0.5))
    assert growths["mean_ms"].verdict != "flat"
    assert status(judged(readings(0, others)), Counter()) in (0, 2)


def test_a_growth_is_that_of_the_line() -> None:
    times = np.linspace(0, 1, 100)
    grown = growth([*np.exp(0.3 * times)], [*times], [0.0] * 100, 1.1)
    assert [grown.times, grown.low, grown.high] == pytest.approx([np.exp(0.3)] * 3)
    assert grown.verdict == "grown"
    assert growth([5.0] * 100, [*times], [0.0] * 100, 1.1)[:3] == pytest.approx((1, 1, 1))


def test_readings_that_follow_each_other_say_less() -> None:
    count, generator = 4 * COUNT, np.random.default_rng(0)
    noise = 0.1 * generator.standard_normal(count)
    times = [*np.linspace(0, 1, count)]
    free = growth([*np.exp(noise)], times, [0.0] * count, 1.1)
    held = growth([*np.exp(np.repeat(noise[::20], 20))], times, [0.0] * count, 1.1)
    widths = [np.log(line.high / line.low) for line in (free, held)]
    assert widths[1] > 2 * widths[0]


def test_a_machine_that_others_have_all_the_while_tells_nothing() -> None:
    assert status(judged(readings(0, np.full(COUNT, 0.9))), Counter()) == 2


def test_a_wrong_answer_fails_a_flat_run() -> None:
    growths = judged(readings(0, quiet()))
    assert [status(growths, wrong) for wrong in (Counter[str](), Counter({"/nowhere: 200": 1}))] == [0, 1]
