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
        axes.bar_label(drawn, [f"{w:.2g}" if w < 10 else f"{w:.0f}" for w in widths], fontsize=7, padding=2)
    axes.set_yticks(range(len(peers)), peers, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=8)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="lower right")


def ratios(axes: Any, result: dict[str, Any], task: str, kind: str, label: str) -> None:
    """How many times as fast Cenote is, by workload."""
    tables = result["offline"][task]
    groups = {w: {p: row[f"{kind}_ratio"] for p, row in table.items()} for w, table in tables.items()}
    peers = [peer for peer in dict.fromkeys(p for t in groups.values() for p in t) if peer != OURS]
    bars(axes, peers, groups, f"{task}: how many times as fast Cenote is", label)
    axes.axvline(1, color="black", linewidth=0.8)


def main(source: str, target: str) -> None:
    """Read the result, write the picture."""
    result = json.loads(Path(source).read_text())
    panels: list[Any] = []
    for task in result["offline"]:
        panels.append(lambda axes, task=task: ratios(axes, result, task, "cpu", "CPU time, 1 thread"))
        panels.append(lambda axes, task=task: ratios(axes, result, task, "wall", "wall time, all cores"))
    served = result["served"]
    if served:
        for workload, table in served.items():
            levels = list(dict.fromkeys(c for row in table.values() for c in row["closed"]))
            groups = {f"{c} clients": {p: r["closed"].get(c, {}).get("rate") for p, r in table.items()} for c in levels}
            title = f"served: {workload}, one text a request"
            panels.append(
                lambda axes, table=table, groups=groups, title=title: bars(
                    axes, list(table), groups, title, "answers per second"
                )
            )
            late = {p: {n: (r["open"] or {}).get(p) for n, r in table.items()} for p in ("p50", "p95", "p99")}
            panels.append(
                lambda axes, table=table, late=late, title=title: bars(
                    axes, list(table), late, title, "ms, arrivals at 70 % of what each can do"
                )
            )
    rows = (len(panels) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(13, 3.6 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        panel(axes)
    machine = result["machine"]
    figure.suptitle(
        f"Cenote beside its peers, {result['date']} · {machine['processor']}, {machine['cores']} cores", fontsize=11
    )
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
