"""Virtual environments of the peers, made once and kept until their row changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.peers.table import Env

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


class PeerError(Exception):
    """Why a peer cannot be measured, in one line without paths and addresses."""

    def __init__(self, reason: str) -> None:
        plain = re.sub(r"\S+://\S+", "", reason)  # results are published: no machine's paths, no registry's address
        plain = re.sub(r"(?<![\w.])(?:/[\w.@+-]+)+/", "", plain)
        super().__init__(" ".join(plain.split())[:300] or "no reason given")


def python_of(env: Env, root: Path) -> Path:
    """The environment's Python."""
    return root / env.name / "bin" / "python"


def make(env: Env, root: Path) -> None:
    """Make `env` under `root`, or keep it where it is already made as the row says. pip's words go to NAME.log there.

    Raises:
        PeerError: pip's last error.
    """
    folder, made = root / env.name, root / env.name / ".made"
    if made.is_file() and made.read_text() == repr(env):
        return
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    log = root / f"{env.name}.log"
    log.write_text("")
    _run([sys.executable, "-m", "venv", str(folder)], log)
    pinned = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")] if env.torch else []
    limits = ["--constraint", str(CONSTRAINTS)] if env.constrained else []
    # Alone and first: together with others, pip might choose another build of it.
    for packages in ([*pinned], [*pinned, *limits, *env.install, *_requirements(env, root, log)]):
        if packages:
            _pip(env, root, log, "install", *packages)
    if env.partly:
        _pip(env, root, log, "install", "--no-deps", env.partly[0])
    made.write_text(repr(env))


def versions(python: Path, distributions: tuple[str, ...]) -> dict[str, str]:
    """Versions of `distributions` in a Python."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    words = subprocess.run([str(python), "-c", code, *distributions], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(words.stdout)
    return found


def _requirements(env: Env, root: Path, log: Path) -> list[str]:
    """What the distribution of `env.partly` asks for, without what is left out."""
    if env.partly is None:
        return []
    wanted, left_out = env.partly
    folder = root / f"{env.name}-wheel"
    _pip(env, root, log, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), wanted)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    shutil.rmtree(folder)
    requirements = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    kept = [r for r in requirements if "extra ==" not in r and re.split(r"[^\w.-]", r)[0] not in left_out]
    file = root / f"{env.name}-requirements.txt"
    file.write_text("\n".join(kept) + "\n")
    return ["--requirement", str(file)]


def _pip(env: Env, root: Path, log: Path, command: str, *arguments: str) -> None:
    pip = [str(python_of(env, root)), "-m", "pip", "--disable-pip-version-check", command, "--quiet"]
    _run([*pip, *arguments], log)


def _run(command: list[str], log: Path) -> None:
    with log.open("a") as words:
        code = subprocess.run(command, stdout=words, stderr=words, check=False).returncode
    if code:
        errors = [line for line in log.read_text().splitlines() if line.startswith("ERROR:")]
        raise PeerError(f"its environment cannot be made: {errors[-1] if errors else f'exit status {code}'}")
