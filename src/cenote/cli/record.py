"""The record of `cenote bench`: machine and versions, and the figures as lines of text."""

from __future__ import annotations

import os
import platform
import statistics
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import cenote
from cenote.errors import plural

if TYPE_CHECKING:
    from cenote.cli.measurements import Figures


def record(command: str) -> Figures:
    """Return the record of a measurement: command, date, machine and versions."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {"cenote": cenote.__version__, **{name: metadata.version(name) for name in packages}},
    }


INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
"""Flags of a processor that its record names."""


def machine() -> Figures:
    """Return processor, cores, memory in GiB, system and Python."""
    processor, flags = _processor()
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "instructions": list(filter(flags.__contains__, INSTRUCTIONS)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _processor() -> tuple[str, list[str]]:
    """Return the name and the flags of the processor, as far as Linux tells them."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return "", []
    entries = [line.partition(":") for line in file.read_text().splitlines()]
    values = {name.strip(): value.strip() for name, _, value in entries}
    return values.get("model name", ""), values.get("flags", "").split()


COLUMNS = {
    "requests": ("requests", ",.0f"),
    "texts/s": ("texts_per_second", ",.1f"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "p50 ms": ("p50_ms", ",.2f"),
    "p95 ms": ("p95_ms", ",.2f"),
    "p99 ms": ("p99_ms", ",.2f"),
    "errors": ("errors", ",.0f"),
}
"""Columns of the table: field of a measurement and format."""


def table(result: Figures) -> str:
    """Return the figures as lines of text."""
    rows = result["measurements"]
    grid = [["", *COLUMNS], *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = _heading(result)
    for first, *others in grid:
        lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    for row in rows:
        lines += _remarks(row)
    return "\n".join(lines)


def _heading(result: Figures) -> list[str]:
    about, options = result["model"], result["options"]
    work = f"task {result['task']}, {options['requests']} texts of each kind a round, "
    work += counted(options["rounds"], "round")
    if "url" in about:
        return [f"{about['name']} at {about['url']}", work]
    model = f"{about['name']} ({about['architecture']}), {about['dtype']} on {about['device']}, {about['layout']}"
    if about["device"] == "cpu":
        model += f", {counted(about['threads'], 'thread')}"
    return [model, work]


def _cells(row: Figures) -> list[str]:
    return [row["label"], *(_cell(row[name], form) for name, form in COLUMNS.values())]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _remarks(row: Figures) -> list[str]:
    """Return the lines below the table about one of its rows."""
    lines = []
    if "share_of_gemm_limit" in row:
        lines.append(
            f"{row['share_of_gemm_limit']:.0%} of the GEMM limit: torch.nn.functional.linear takes "
            f"{statistics.median(row['gemm_seconds']):.2f} s for the products of the Linear layers, "
            f"all texts in one request {statistics.median(row['seconds']):.2f} s"
        )
    if row["errors"]:
        lines.append(f"{row['label']}: {row['errors']} of {row['requests']} failed, first: {row['first_error']}")
    return lines


def counted(count: int, noun: str) -> str:
    return f"{count} {plural(noun, count)}"
