"""Every error that Cenote raises on purpose, and the HTTP status each one becomes.

CenoteError
├── ConfigError            start-up: an option or flag is wrong
├── CheckpointError        start-up: a checkpoint cannot be honoured
├── BadRequest        400  also a ValueError, as callers of the Python API expect
│   ├── TooLong
│   ├── TaskNotOffered
│   │   └── NotScored 404
│   ├── BodyTooLarge  413
│   ├── HeadTooLarge  431
│   ├── TooSlow       408
│   └── Unfetched     422
├── ModelNotFound     404
├── Unauthorized      401
├── Overloaded        429  carries `retry_after`
│   └── TooManyConnections 503
├── Closed            503  the engine is shutting down
├── EngineGone        503  carries `retry_after`; its process does not answer
├── EngineFailed      500
└── PluginFailed      500
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class CenoteError(Exception):
    """Root of the tree.

    Attributes:
        status: HTTP status that the server answers with.
        type: value of `error.type` in an OpenAI-shaped body.
        param: the request parameter at fault, if one is.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(CenoteError, ValueError):
    """An option, flag, environment variable or config file entry is wrong."""


class CheckpointError(CenoteError, ValueError):
    """A checkpoint is missing, incomplete, or asks for something that Cenote does not honour."""


class BadRequest(CenoteError, ValueError):
    """The caller sent something that cannot be served."""

    status = 400
    type = "BadRequestError"


class TooLong(BadRequest):
    """An input has more tokens than the model takes, and truncation was not asked for."""


class TaskNotOffered(BadRequest):
    """The task is unknown, or this model cannot do it."""


class NotScored(TaskNotOffered):
    """This model cannot score pairs. Where vLLM serves such a model, its score routes do not exist."""

    status = 404
    type = "NotFoundError"


class BodyTooLarge(BadRequest):
    """The request body exceeds the server's limit."""

    status = 413


class HeadTooLarge(BadRequest):
    """The request line and the headers exceed the server's limits."""

    status = 431


class TooSlow(BadRequest):
    """The client sends its request too slowly."""

    status = 408


class Unfetched(BadRequest):
    """A picture behind a URL does not arrive: its host is not found, does not answer in time, or with an error."""

    status = 422


class ModelNotFound(CenoteError):
    """The request names a model that is not served here."""

    status = 404
    type = "NotFoundError"


class Unauthorized(CenoteError):
    """The API key is missing or wrong."""

    status = 401
    type = "AuthenticationError"


class Overloaded(CenoteError):
    """The queue is full, or a request would wait too long.

    Attributes:
        retry_after: seconds after which a retry has a fair chance.
        reason: the bound, a label of the metrics: queue, waiting, bytes, connections.
    """

    status = 429
    type = "RateLimitError"

    def __init__(self, message: str, *, retry_after: int = 1, reason: str = "queue") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class TooManyConnections(Overloaded):
    """The server has as many connections as it serves."""

    status = 503
    type = "ServiceUnavailableError"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="connections")


class Closed(CenoteError):
    """The engine no longer accepts work."""

    status = 503
    type = "ServiceUnavailableError"


class EngineGone(CenoteError):
    """The engine's process cannot be reached, or was lost before it answered.

    Attributes:
        retry_after: seconds after which a retry has a fair chance.
    """

    status = 503
    type = "ServiceUnavailableError"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(CenoteError):
    """A forward pass failed, or the device thread died."""


class PluginFailed(CenoteError):
    """An IO-processor plugin raised an error that is not a fault of the request."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for a message that quotes it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


_PATH = re.compile(r"(?<![\w.:/])(?:/[\w.@+-]+){2,}")


def without_paths(text: str) -> str:
    """Return the text of another library's error without paths of files, which are not for strangers."""
    return _PATH.sub("<path>", text)


def plural(noun: str, count: int) -> str:
    """Return `noun` as it stands behind the number `count`."""
    return noun if count == 1 else f"{noun}s"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a sentence for a name that does not exist: the nearest of `known` if any is near, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}"
    return f"unknown {kind} {name!r}; {hint}"
