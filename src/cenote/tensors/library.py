"""Compiled libraries: built with the system's C++ compiler, and kept where no other user can plant one.

A library runs as this user. So the folder of the cache and all its parents must belong to this user or to root,
and nobody else may write to them, except to a parent that keeps its entries apart (sticky, as `/tmp`). Anything else
means that libraries are compiled into a private folder, anew for each process.
"""

from __future__ import annotations

import grp
import hashlib
import logging
import os
import platform
import pwd
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

# Without -ffast-math: infinities and NaN keep their meaning.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)
COMPILERS = ("c++", "g++", "clang++")
DIGEST = hashlib.sha256().digest_size
"""Bytes at the end of a library that are the sha256 of those before: a library that was cut short is known by it."""


@contextmanager
def compiled(source: Path, march: str = "native") -> Iterator[Path]:
    """Give the library of `source` for the processor `march`, for loading it within the block.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: there is no folder that others cannot write to.
    """
    try:
        folder = _own(cache())
    except (OSError, KeyError) as error:
        log.warning("compiled kernels are not kept, and compiled at every start: %s", error)
        with tempfile.TemporaryDirectory(prefix="cenote-") as private:
            yield build(_own(Path(private)), source, march)
    else:
        yield build(folder, source, march)


def cache() -> Path:
    """Return the folder of compiled libraries.

    Raises:
        KeyError: the user has no home.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # as that specification says
        root = _home() / ".cache"
    return root / "cenote"


def _home() -> Path:
    named = Path(os.environ.get("HOME", ""))
    return named if named.is_absolute() else Path(pwd.getpwuid(os.getuid()).pw_dir)


def _own(folder: Path) -> Path:
    """Make `folder` if need be, and return it once it is known that nobody else can change its entries.

    Raises:
        OSError: it cannot be made.
        PermissionError: others can change them.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    check(folder)
    return folder


def check(folder: Path) -> None:
    """Raise `PermissionError` if another user can change the entries of `folder`, or put another in its place."""
    for path in (*folder.parents, folder):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            _check_owner(path, status)
            check(path.parent / path.readlink())
            continue
        _check_owner(path, status)
        if _is_shared(status) and (path == folder or not status.st_mode & stat.S_ISVTX):
            raise PermissionError(f"other users can write to {path}; take that from them, or set XDG_CACHE_HOME")


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.getuid()):
        raise PermissionError(f"{path} belongs to another user; set XDG_CACHE_HOME to a folder of your own")


def _is_shared(status: os.stat_result) -> bool:
    """Return whether others than the owner and root can write."""
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_alone_in(status.st_gid)


def _is_alone_in(group: int) -> bool:
    """Return whether `group` is this user's private one, as many systems give to each user: of the same name."""
    if group != os.getgid():
        return False
    try:
        entry, name = grp.getgrgid(group), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return entry.gr_name == name and not {*entry.gr_mem} - {name}


def build(folder: Path, source: Path, march: str = "native") -> Path:
    """Compile `source` for the processor `march` into `folder`, unless that has been done already; returns the library.

    Args:
        folder: see `check`.
        source: C++, which may include others beside it.
        march: name of the processor, for the compiler.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: `folder` cannot be written.
    """
    command = [*_compiler(), *FLAGS, f"-march={march}"]
    target = folder / f"{source.stem}-{_name(command, source)}.so"
    if _is_whole(target):
        return target
    problem = ""
    for openmp in (["-fopenmp"], []):  # one thread rather than nothing where OpenMP is missing
        handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        done = subprocess.run([*command, *openmp, str(source), "-o", name], capture_output=True, timeout=120)
        if done.returncode == 0:
            _seal(Path(name))
            os.replace(name, target)  # atomic: another process may build at the same time
            return target
        os.unlink(name)
        problem = done.stderr.decode(errors="replace")[-500:]
    raise RuntimeError(f"the compiler failed: {problem}")


def _compiler() -> list[str]:
    """Return the compiler and the arguments that the variable `CXX` may name with it."""
    named = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if not named:
        raise RuntimeError("there is no C++ compiler")
    return shlex.split(named)


def _name(command: list[str], source: Path) -> str:
    """Return a digest of all that a library depends on."""
    version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=20).stdout
    sources = [file.read_bytes() for file in sorted(source.parent.glob("*.cpp"))]  # one may include another
    parts = [*sources, version, " ".join(command).encode(), _processor().encode()]
    return hashlib.sha256(bytes(0).join(parts)).hexdigest()[:20]


def _seal(file: Path) -> None:
    """Put the digest behind a library, and let nobody else write to it. Loaders do not read so far."""
    file.chmod(0o700)
    digest = hashlib.sha256(file.read_bytes()).digest()
    with file.open("ab") as opened:
        opened.write(digest)


def _is_whole(file: Path) -> bool:
    """Return whether `file` is a library as `build` left it: no link, of this user, writable for nobody else."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    with os.fdopen(opened, "rb") as content:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.getuid()) or _is_shared(status):
            return False
        library = content.read()
    return library[-DIGEST:] == hashlib.sha256(library[:-DIGEST]).digest()


def _processor() -> str:
    """Return the properties on which -march=native depends: a cache on a shared disk may meet another processor."""
    kept = {"vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part"}
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in kept)
