"""The audit of a checkpoint: nothing that its files say is dropped unsaid.

Each entry of a checkpoint is honoured, known to be without effect here, or an error that names it. Readers enter into
one `Audit` a load the keys, tensors and files that they honour; the tables below name, with the reason, the entries
that change no answer. Everything else is unread, and refused unless `--allow-unread` names it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import filterfalse, product, starmap
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cenote.core import Entries
from cenote.errors import CheckpointError, plural
from cenote.models import value_types

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

SHOWN = 8
"""Most names that a message lists."""


@dataclass(frozen=True)
class Keys:
    """The keys that one kind of JSON file may have.

    Attributes:
        honoured: names of the keys that are read.
        idle: names, or patterns of names, of keys that change no answer, each with the reason.
        types: of values, by keys (`cenote.models.value_types`).
    """

    honoured: frozenset[str]
    idle: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    types: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def reason(self, name: str) -> str:
        """Return why the key `name` changes no answer; empty if that is not known."""
        return reason_in(self.idle, name)


def reason_in(reasons: Mapping[str, str], name: str) -> str:
    """Return the reason of the first pattern that `name` matches; empty if it matches none."""
    return next((reason for pattern, reason in reasons.items() if fnmatchcase(name, pattern)), "")


def shortened(names: Sequence[str], count: int) -> str:
    """Return the first `count` names as a list for a message, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


class Audit:
    """The ledger of one load: entries that were honoured, and entries that were left, with the reason.

    Args:
        allowed: names or patterns that the user lets go unread, bare (`key`) or with their file (`file:key`).
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = tuple(allowed)
        self._used: dict[str, dict[str, None]] = defaultdict(dict)
        self._left: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)

    @property
    def used(self) -> tuple[Entries, ...]:
        """The entries that were honoured, by their file."""
        return tuple(Entries(file, tuple(names)) for file, names in self._used.items())

    @property
    def left(self) -> tuple[Entries, ...]:
        """The entries that were left, by their file and the reason."""
        return tuple(Entries(file, tuple(names), reason) for (file, reason), names in self._left.items())

    def use(self, file: str, *names: str) -> None:
        """Enter entries of `file` that are honoured."""
        self._used[file].update(dict.fromkeys(names))

    def leave(self, file: str, names: Iterable[str], reason: str) -> None:
        """Enter entries of `file` that change no answer, with the reason."""
        for name in names:
            self._left[file, reason][name] = None

    def read(self, file: str, content: Mapping[str, Any], keys: Keys) -> None:
        """Enter all keys of a JSON file.

        Raises:
            CheckpointError: a key is neither honoured nor known to be without effect, nor allowed to go unread; or its
                value is of another type than it has.
        """
        value_types.check(file, content, keys.types)
        reasons = {name: keys.reason(name) for name in content} | dict.fromkeys(keys.honoured.intersection(content))
        self.enter(file, reasons, f"honoured are {', '.join(sorted(keys.honoured))}")

    def enter(
        self,
        file: str,
        reasons: Mapping[str, str | None],
        remedy: str,
        *,
        noun: str = "the key",
        listed: Callable[[str], str] = str,
    ) -> None:
        """Enter entries of `file`.

        Args:
            file: their file, relative to the checkpoint's folder.
            reasons: why each changes no answer; empty = nobody knows, `None` = it is honoured.
            remedy: see `refuse`.
            noun: see `refuse`.
            listed: the name under which an entry that is read or left is listed, maybe with others.

        Raises:
            CheckpointError: see `refuse`.
        """
        unread = []
        for name, reason in reasons.items():
            if reason is None:
                self.use(file, listed(name))
            elif reason:
                self.leave(file, [listed(name)], reason)
            else:
                unread.append(name)
        self.refuse(file, unread, remedy, noun=noun)

    def refuse(self, file: str, names: Collection[str], remedy: str, *, noun: str = "the key") -> None:
        """Refuse entries of `file` that nothing reads, but for those that the user lets go unread.

        Args:
            file: their file, relative to the checkpoint's folder.
            names: of the entries; none is no error.
            remedy: the way to go on, the end of the message.
            noun: for one of them.

        Raises:
            CheckpointError: the user has not allowed one of them.
        """
        allowed = list(filter(partial(self.allows, file), names))
        self.leave(file, allowed, "allowed to go unread")
        refused = list(filterfalse(allowed.__contains__, names))
        if not refused:
            return
        raise CheckpointError(
            f"{file} has {plural(noun, len(refused))} {shortened(refused, SHOWN)}, which Cenote does not honour, so "
            f"answers could differ from those that the checkpoint was made for; {remedy}. To go on without: "
            f"--allow-unread {refused[0]}"
        )

    def allows(self, file: str, name: str) -> bool:
        """Return whether the user lets `name` of `file` go unread."""
        return any(starmap(fnmatchcase, product((name, f"{file}:{name}"), self._allowed)))
