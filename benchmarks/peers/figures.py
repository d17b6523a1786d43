"""From measurements to ratios, and from ratios to a page."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import numpy as np

from benchmarks.peers.table import CENOTE, PEERS

AGREES = 1e-4
"""Differences up to here are rounding: float32 in another order."""

median = statistics.median


def agreement(got: list[np.ndarray], wanted: list[np.ndarray]) -> dict[str, Any]:
    """The largest difference between two answers and the least cosine of their rows; None where they have none."""
    shapes = [a.shape for a in got], [b.shape for b in wanted]
    if shapes[0] != shapes[1] or not all(np.isfinite(a).all() for a in got):
        return {"difference": None, "cosine": None}
    difference = max(float(np.abs(a - b).max()) for a, b in zip(got, wanted, strict=True))
    if wanted[0].ndim < 2:
        return {"difference": difference, "cosine": None}
    pairs = zip(np.concatenate(got).astype(float), np.concatenate(wanted).astype(float), strict=True)
    return {
        "difference": difference,
        "cosine": min(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs),
    }


def offline(measured: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """Medians by task, workload and peer.

    Returns:
        per peer: "cpu_rate", texts per CPU second on one thread; "wall_rate", texts per second on all; "cpu_ratio" and
        "wall_ratio": the peer's seconds over Cenote's of the same round.
    """
    by: dict[tuple[str, str], dict[str, dict[tuple[str, int], float]]] = defaultdict(lambda: defaultdict(dict))
    texts = {}
    for one in measured:
        for kind, threads in (("cpu", 1), ("wall", cores)):
            if one["threads"] == threads:
                by[one["task"], one["workload"]][one["peer"]][kind, one["round"]] = one[kind]
                texts[one["workload"]] = one["texts"]
    result: dict[str, Any] = {}
    for (task, workload), peers in by.items():
        table = result.setdefault(task, {}).setdefault(workload, {})
        for peer, seconds in peers.items():
            table[peer] = {}
            for kind in ("cpu", "wall"):
                theirs = {key: value for key, value in seconds.items() if key[0] == kind}
                shared = [value / peers[CENOTE][key] for key, value in theirs.items() if key in peers.get(CENOTE, {})]
                table[peer][f"{kind}_rate"] = texts[workload] / median(theirs.values()) if theirs else None
                table[peer][f"{kind}_ratio"] = median(shared) if shared else None
    return result


def served(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by workload and peer.

    Returns:
        per peer: "closed", clients to {"rate", "ratio"}: answers per second, and Cenote's over them in the same round;
        "open", {"rate", "count", "p50", "p95", "p99"}: requests per second and milliseconds, all rounds together.
    """
    rates: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    late: dict[tuple[str, str], list[float]] = defaultdict(list)
    arrived: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in measured:
        if one["clients"] is None:
            late[one["workload"], one["peer"]] += one["latencies"]
            arrived[one["workload"], one["peer"]].append(one["rate"])
        else:
            rates[one["workload"], one["peer"], one["clients"]][one["round"]] = one["rate"]
    result: dict[str, Any] = {}
    for (workload, peer, clients), found in rates.items():
        row = result.setdefault(workload, {}).setdefault(peer, {"closed": {}, "open": None})
        ours = rates.get((workload, CENOTE, clients), {})
        shared = [ours[turn] / rate for turn, rate in found.items() if turn in ours and rate]
        row["closed"][str(clients)] = {"rate": median(found.values()), "ratio": median(shared) if shared else None}
    for (workload, peer), latencies in late.items():
        if latencies:
            parts = {f"p{p}": float(np.percentile(latencies, p) * 1000) for p in (50, 95, 99)}
            counted = {"rate": median(arrived[workload, peer]), "count": len(latencies)}
            result[workload][peer]["open"] = counted | parts
    return result


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What Cenote is meant to reach against each peer on mixed texts, and what it reaches (None = not measured)."""
    found = []
    for peer in PEERS:
        for (task, kind), goal in peer.goals.items():
            row = figures.get(task, {}).get("mixed", {}).get(peer.name, {})
            reached = row.get(f"{kind}_ratio")
            found.append({"peer": peer.name, "task": task, "kind": kind, "goal": goal, "measured": reached})
    return found


def _cell(rate: float | None, ratio: float | None) -> str:
    number = "-" if rate is None else f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
    return number if ratio is None else f"{number} ({ratio:.2f} x)"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _versions(versions: dict[str, dict[str, str]]) -> str:
    return _table(
        ["environment", "versions"],
        [[name, ", ".join(f"{k} {v}" for k, v in found.items())] for name, found in versions.items()],
    )


def page(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    machine, named = result["machine"], {"cpu": "CPU time, 1 thread", "wall": "wall time, all cores"}
    parts = [
        f"# Cenote beside its peers, {result['date']}\n",
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}. all-MiniLM-L6-v2 in float32; "
        f"every engine has the same texts, threads and turns. Medians of {result['rounds']} interleaved rounds; a "
        f"ratio says how many times as fast Cenote is. Differences are to {' and '.join(result['references'])}.\n\n"
        f"    {result['command']}\n",
    ]
    if result["goals"]:
        rows = []
        for goal in result["goals"]:
            measured = goal["measured"]
            verdict = "not measured" if measured is None else "reached" if measured >= goal["goal"] else "missed"
            what = f"{goal['peer']}, {goal['task']}, mixed, {named[goal['kind']]}"
            rows.append([what, f"{goal['goal']:g} x", "-" if measured is None else f"{measured:.2f} x", verdict])
        parts += ["## Goals\n", _table(["against", "goal", "measured", ""], rows)]
    for task, workloads in result["offline"].items():
        names = list(dict.fromkeys(peer for table in workloads.values() for peer in table))
        head, rows = [task], [[name] for name in names]
        for workload, table in workloads.items():
            head += [f"{workload}, per CPU second, 1 thread", f"{workload}, per second, all cores"]
            for row in rows:
                found = table.get(row[0], {})
                row += [_cell(found.get(f"{kind}_rate"), found.get(f"{kind}_ratio")) for kind in ("cpu", "wall")]
        head += ["largest difference", *(["least cosine"] if task != "rerank" else [])]
        for row in rows:
            row += _agreement(result["agreement"].get(task, {}), row[0], task != "rerank")
        parts += [f"## Offline: {task}\n", _table(head, rows)]
    for workload, table in result["served"].items():
        clients = list(dict.fromkeys(c for row in table.values() for c in row["closed"]))
        head = [workload, *(f"{c} client{'s' if c != '1' else ''}" for c in clients)]
        head += ["arrivals at 70 %", "p50", "p95", "p99", "largest difference"]
        rows = []
        for peer, row in table.items():
            cells = [_cell(*(row["closed"].get(c, {}).get(k) for k in ("rate", "ratio"))) for c in clients]
            found = row["open"]
            late = [f"{found['rate']:,.0f}/s", *(f"{found[p]:.1f} ms" for p in ("p50", "p95", "p99"))] if found else []
            close = _agreement(result["agreement"].get("served", {}), peer, False, workload)
            rows.append([peer, *cells, *(late or ["-"] * 4), *close])
        parts += [f"## Served: {workload}, one text a request\n", _table(head, rows)]
    sizes = [[name, str(size["texts"]), f"{size['tokens']:,}", *(f"{size[k]:g}" for k in ("least", "median", "most"))]
             for name, size in result["workloads"].items()]  # fmt: skip
    parts += ["## Texts\n", _table(["workload", "texts", "tokens", "least", "median", "most"], sizes)]
    if result["missing"]:
        rows = [[one["peer"], one["what"], one["reason"].replace("|", "\\|")] for one in result["missing"]]
        parts += ["## Not measured, or less than the others\n", _table(["peer", "what", "reason"], rows)]
    return "\n".join([*parts, "## Versions\n", _versions(result["versions"])])


def _agreement(found: dict[str, Any], peer: str, with_cosine: bool, only: str | None = None) -> list[str]:
    """The worst of all workloads, in bold where it is more than rounding."""
    rows = [table[peer] for workload, table in found.items() if peer in table and only in (None, workload)]
    if not rows:
        return ["-"] * (1 + with_cosine)
    if any(row["difference"] is None for row in rows):
        return ["**other shapes**", *(["-"] if with_cosine else [])]
    difference = max(row["difference"] for row in rows)
    cells = [f"{difference:.1e}" if difference <= AGREES else f"**{difference:.1e}**"]
    return cells + ([f"{min(row['cosine'] for row in rows):.6f}"] if with_cosine else [])
