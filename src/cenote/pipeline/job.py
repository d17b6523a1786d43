"""The work of one request, between its operation and its answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from cenote.core import Output, Sequence

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """The sequences of a request, and the function that makes its answer of their outputs.

    Attributes:
        sequences: input of the engine, in order.
        finish: makes the answer of the outputs, in the order of `sequences`.
        is_slow: finishing takes long even for small outputs.
    """

    sequences: list[Sequence]
    finish: Callable[[list[Output]], T]
    is_slow: bool = False

    def queued(self, *, priority: int = 0, salt: str | None = None) -> Job[T]:
        """Return the job with that priority, and with cached results kept apart by that salt."""
        if not priority and salt is None:
            return self
        sequences = [replace(sequence, priority=priority, salt=salt) for sequence in self.sequences]
        return Job(sequences, self.finish, self.is_slow)

    def adapted(self, names: Seq[str | None]) -> Job[T]:
        """Return the job whose sequences run with these adapters; `None` = as they are."""
        if not any(names):
            return self
        pairs = zip(self.sequences, names, strict=True)
        sequences = [replace(sequence, adapter=name or sequence.adapter) for sequence, name in pairs]
        return Job(sequences, self.finish, self.is_slow)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))

    def then(self, change: Callable[[T], U]) -> Job[U]:
        """Return the job whose answer is `change` of the answer of this one."""
        return Job(self.sequences, lambda outputs: change(self.finish(outputs)), self.is_slow)
