"""Draws a result. Run by the Python of the environment "plot", the only one that has matplotlib.

python -P plot.py RESULT.json PICTURE.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS = "Cenote"
COLORS = ("#4878a8", "#e0a030", "#6a9a58", "#a05878")


def bars(axes: Any, peers: list[str], groups: dict[str, dict[str, float | None]], title: str, label: str) -> None:
    """Horizontal bars: peers downwards, one colour a group."""
    height = 0.8 / max(len(groups), 1)
    for i, (group, values) in enumerate(groups.items()):
        places = [row + (i - (len(groups) - 1) / 2) * height for row in range(len(peers))]
        widths = [values.get(peer) or 0 for peer in peers]
        drawn = axes.barh(places, widths, height, label=group, color=COLORS[i % len(COLORS)])
        words = ["-" if not w else f"{w:.2f}" if w < 10 else f"{w:.0f}" for w in widths]
        axes.bar_label(drawn, words, fontsize=7, padding=2)
    axes.set_yticks(range(len(peers)), peers, fontsize=8)
    axes.invert_yaxis()
    if OURS not in peers:  # ratios to it
        axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=8)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def ratios(result: dict[str, Any], task: str, kind: str, label: str) -> tuple[Any, ...]:
    """How many times as fast Cenote is, by workload: the arguments of `bars`."""
    tables = result["offline"][task]
    groups = {w: {p: row[f"{kind}_ratio"] for p, row in table.items()} for w, table in tables.items()}
    peers = [peer for peer in dict.fromkeys(p for t in groups.values() for p in t) if peer != OURS]
    return peers, groups, f"{task}: how many times as fast Cenote is", label


def served(workload: str, table: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Rates of the closed loops, and latencies of the open one: the arguments of `bars`."""
    levels = list(dict.fromkeys(c for row in table.values() for c in row["closed"]))
    rates = {f"{c} clients": {p: r["closed"].get(c, {}).get("rate") for p, r in table.items()} for c in levels}
    late = {p: {name: (row["open"] or {}).get(p) for name, row in table.items()} for p in ("p50", "p95", "p99")}
    title = f"served: {workload}, one text a request"
    return (
        (list(table), rates, title, "answers per second"),
        (list(table), late, title, "ms, arrivals at 70 % of what each can do"),
    )


def main(source: str, target: str) -> None:
    """Read the result, write the picture: two panels a row."""
    result = json.loads(Path(source).read_text())
    rows: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
    for task in result["offline"]:
        cpu, wall = (("cpu", "CPU time, 1 thread"), ("wall", "wall time, all cores"))
        rows.append((ratios(result, task, *cpu), ratios(result, task, *wall)))
    rows += [served(workload, table) for workload, table in result["served"].items()]
    heights = [1.2 + 0.16 * max(len(peers) * max(len(groups), 1.5) for peers, groups, *_ in row) for row in rows]
    figure, grid = plt.subplots(
        *(len(rows), 2), figsize=(13, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    for row, pair in zip(rows, grid, strict=True):
        for axes, panel in zip(pair, row, strict=True):
            bars(axes, *panel)
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores"
    figure.suptitle(f"Cenote beside its peers, {result['date']} · {where}", fontsize=11)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
