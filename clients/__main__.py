"""`python -m clients [ENVIRONMENT ...]`: run the calls of some environments, of all by default.

Ends with status 1 where a call does not do as it should, or one does that is said to fail. With all environments it
writes `docs/clients.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from clients import served
from clients.page import Results, count, page

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
MADE = ROOT / ".clients"
ENVIRONMENTS = ("one", "two", "js", "misc", "heavy")
VARIABLES = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "ANONYMIZED_TELEMETRY": "False",
    "MEM0_TELEMETRY": "False",
}
"""Nothing is fetched and nothing is reported."""
TIKTOKEN = "lib/python3*/site-packages/llama_index/core/_static/tiktoken_cache"
"""The vocabulary of OpenAI's tokenizer, which lies in a package of environment one."""


def rows() -> list[dict[str, Any]]:
    """Return the rows of the table, each with its `title`."""
    listed: list[dict[str, Any]] = tomllib.loads((FOLDER / "rows.toml").read_text())["row"]
    return [{"title": ", ".join(named(row)), **row} for row in listed]


def named(row: dict[str, Any]) -> list[str]:
    """Return the packages of a row with their versions."""
    environment = row["environment"]
    if environment == "js":
        versions = json.loads((FOLDER / "js" / "package.json").read_text())["dependencies"]
        return [f"{name} {versions[name]} (JavaScript)" for name in row["packages"]]
    pins = (FOLDER / "requirements" / f"{environment}.txt").read_text()
    versions = {plain(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", pins, re.MULTILINE)}
    return [f"{name} {versions[plain(name)]}" for name in row["packages"]]


def plain(name: str) -> str:
    """Return the name of a package as an index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def run(environment: str, files: list[str], values: Path) -> dict[str, Results]:
    """Make the calls of `files` in an environment, and return what came of them."""
    output = values.with_name(f"{environment}.json")
    if environment == "js":
        command = ["node", str(FOLDER / "js" / "run.mjs"), str(output)]
    else:
        command = [str(MADE / environment / "bin" / "python"), "-m", "clients.run", str(output), *files]
    variables = {**os.environ, "CENOTE_CLIENT_VALUES": str(values), "PYTHONPATH": str(ROOT)}
    variables.pop("HF_HUB_OFFLINE", None)  # the hub's client would refuse loopback, too
    subprocess.run(command, cwd=ROOT, env=variables, check=True)
    results: dict[str, Results] = json.loads(output.read_text())
    return results


def results_of(listed: list[dict[str, Any]]) -> list[Results]:
    """Start the servers, make the calls of some rows, and return what came of each row's."""
    environments = dict.fromkeys(row["environment"] for row in listed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = served.models(folder)
        with served.servers([*paths, "--served-model-name", *served.A_NAMES], served.B_FLAGS) as (a, b, c):
            file = folder / "values.json"
            file.write_text(json.dumps({**served.values(paths), "a": a, "b": b, "c": c}))
            results = {
                environment: run(environment, [r["file"] for r in listed if r["environment"] == environment], file)
                for environment in environments
            }
    return [results[row["environment"]][row["file"]] for row in listed]


def main() -> int:
    """Run, report, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m clients", description=__doc__)
    parser.add_argument("environments", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; default: all, and the page")
    environments = parser.parse_args().environments or ENVIRONMENTS
    if unknown := set(environments) - set(ENVIRONMENTS):
        parser.error(f"unknown environments {unknown}; known are {ENVIRONMENTS}")
    os.environ.update(VARIABLES, TIKTOKEN_CACHE_DIR="".join(map(str, (MADE / "one").glob(TIKTOKEN))))
    listed = [row for row in rows() if row["environment"] in environments]
    results = results_of(listed)
    is_right = True
    for row, result in zip(listed, results, strict=True):
        print(f"{count(result['calls'])}: {row['title']}")
        for entry in result["calls"] + result["errors"]:
            if bool(entry["trouble"]) != bool(entry["fails"]):
                is_right = False
                print(f"  {entry['name']}: {entry['trouble'] or 'works, and is said to fail'}")
    if set(environments) == set(ENVIRONMENTS):
        (ROOT / "docs" / "clients.md").write_text(page(listed, results))
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
