"""The one place around reading: whatever a file of a checkpoint makes a parser raise is an error about that file.

Every reader opens files through here, or runs in `about`. JSON is bounded in bytes, has one meaning (no key twice) and
is UTF-8.
"""

from __future__ import annotations

import json
import re
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cenote.errors import CenoteError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

LARGEST_JSON = 64 << 20
"""Maximum bytes of a JSON file; the index of a model of thousands of tensors has a few MiB."""

REMEDY = "correct it, or download it again"

FILE = re.compile(r"\.(json|safetensors|bin|pt|metadata)\b")
"""The end of the name of a file, in a message."""

NEVER = (CenoteError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""Exceptions that are no fault of a file, or say already which."""


@contextmanager
def about(
    file: Path | str, remedy: str = REMEDY, content: Callable[[], Mapping[str, Any]] | None = None
) -> Iterator[None]:
    """Refuse the checkpoint for whatever the block raises, in the name of the file that it reads.

    Parsers raise anything: `RecursionError`, `MemoryError`, and the panics of Rust's extensions, which are no
    `Exception`.

    Args:
        file: its path, or its name for the message.
        remedy: the way to go on, the end of the message.
        content: returns the JSON object in it, whose key is named where an error quotes its value.

    Raises:
        CheckpointError: instead of any other error but Cenote's own; with the name of the file.
    """
    try:
        yield
    except CheckpointError as error:
        if isinstance(file, str) or FILE.search(error.message):
            raise
        raise CheckpointError(f"{named(file)}: {error.message}") from error.__cause__
    except NEVER:
        raise
    except BaseException as error:
        keys = "" if content is None else _keys_of(content(), str(error))
        raise CheckpointError(f"cannot read {named(file)}: {keys}{cause(error)}; {remedy}") from error


def named(file: Path | str) -> str:
    """Return a file with its folder, for a message: never the whole path, which is not for strangers."""
    if isinstance(file, str):
        return file
    shown = repr(f"{file.name} of {file.parent.name}")[1:-1]  # without control characters
    return shown[:LONGEST_NAME]


LONGEST_NAME = 200
"""Characters of a name in a message."""


def _keys_of(content: Mapping[str, Any], text: str) -> str:
    """Return the keys of a JSON object whose values are quoted in an error's text, for a message."""
    quoted = set(QUOTED.findall(text))
    keys = [key for key, value in content.items() if not quoted.isdisjoint(_texts(value))]
    return f"by the value of {', '.join(keys)}: " if keys else ""


QUOTED = re.compile("['`\"]([^'`\"]+)['`\"]")
"""A text in quotes."""


def _texts(value: Any) -> list[str]:
    """Return a text, or the texts of an object, as a list; of other values their spelling."""
    parts = value.values() if isinstance(value, dict) else (value,)
    return list(map(str, parts))


SENTENCES: dict[type[BaseException], str] = {
    UnicodeDecodeError: "expected UTF-8 ({})",
    json.JSONDecodeError: "expected JSON ({})",
    RecursionError: "it is nested too deeply",
    MemoryError: "it asks for more memory than there is",
    KeyError: "it lacks {}",
    ValueError: "{}",
}
"""Exceptions to sentences about a file, with the exception's text. The first that fits counts."""


def cause(error: BaseException) -> str:
    """Return the text of an error in one line, without paths."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    for kind, sentence in SENTENCES.items():
        if isinstance(error, kind):
            return sentence.format(text)
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {text}"


def load(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`, empty if there is no file.

    Raises:
        CheckpointError: it cannot be read, or is no object.
    """
    if not path.is_file():
        check_kind(path)
        return {}
    return as_object(path, read_json(path))


def as_object(path: Path, content: Any) -> dict[str, Any]:
    """Return the content of a JSON file, which has to be an object.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{named(path)} is {type(content).__name__}, expected a JSON object; {REMEDY}")
    return content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: it cannot be read, is too large, or has a key twice.
    """
    check_kind(path)
    with about(path):
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise ValueError(f"it has {size} bytes, expected at most {LARGEST_JSON}")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. One that has two values for a key means two things, and NaN is no number."""
    content = dict(pairs)
    for name, value in pairs:
        if value != value:
            raise ValueError(f"its key {name!r} is NaN, which is not JSON")
    if len(content) == len(pairs):
        return content
    for name, value in pairs:
        if value != content[name]:
            raise ValueError(f"it has the key {name!r} twice, with two values")
    return content


def check_kind(path: Path) -> None:
    """Refuse something that has the name of a file and is none: a folder, a pipe, a link to nothing.

    Reading a pipe would wait for ever; a link to nothing reads as a file that is missing, in whose place another may
    count.

    Raises:
        CheckpointError: it is there, and is no regular file.
    """
    with about(path):
        if path.is_symlink() and not path.exists():
            raise ValueError("it is a link to a file that is not there")
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"it is {_kind(path.stat().st_mode)}, expected a file")


def _kind(mode: int) -> str:
    """Return the kind of a thing in a folder that is no file."""
    return {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}.get(stat.S_IFMT(mode), "a device")
