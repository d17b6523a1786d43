"""Draws the figures of `cenote bench`. Needs matplotlib, which the extra `cenote[bench]` brings."""

from __future__ import annotations

import html
import io
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<h1>{title}</h1>
{picture}
<pre>{table}</pre>
"""


def draw(result: dict[str, Any], table: str, file: Path) -> None:
    """Write a picture, or for `.html` a page with the picture and the table.

    Args:
        result: as `cenote bench --save` writes it.
        table: shown below the picture.
        file: its suffix is the format.
    """
    title = f"{result['model']['name']}, {result['task']}"
    figure = picture(result, title)
    if file.suffix != ".html":
        figure.savefig(file, dpi=150)
        return
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    shown = drawn.getvalue()
    page = PAGE.format(title=html.escape(title), table=html.escape(table), picture=shown[shown.index("<svg") :])
    file.write_text(page, encoding="utf-8")


def picture(result: dict[str, Any], title: str) -> Figure:
    """Draw latency of single texts by their length, and texts a second by clients (or arrivals) and by request."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["measurements"]:
        if row["texts"]:
            rows[row["kind"]].append(row)
    for part in (50, 95, 99):
        _line(left, rows["latency"], f"p{part}_ms", f"p{part}")
    _finish(left, "tokens of a text", "ms")
    across = "texts that arrive per second"
    _line(right, rows["load"], "texts_per_second", "one text a request")
    if not result["options"]["rate"]:
        across = "clients, or texts a request"
        _line(right, rows["batches"], "texts_per_second", "one client, by texts a request")
    for row in rows["throughput"]:
        right.axhline(row["texts_per_second"], linestyle="--", color="grey", label=row["label"])
    _finish(right, across, "texts per second")
    return figure


def _line(axes: Axes, rows: list[dict[str, Any]], name: str, label: str) -> None:
    points = sorted((row["value"], row[name]) for row in rows)
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", label=label)


def _finish(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if axes.lines:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.set_ylim(bottom=0)
        axes.legend()
    axes.grid(alpha=0.3)
