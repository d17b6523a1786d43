"""Errors on the wire: the one place where an exception becomes a response.

The body is OpenAI's and vLLM's, `{"error": {"message", "type", "param", "code"}}`, and beside it has the message as
`detail`, where clients of Voyage and Jina read it. Texts never show a path.
"""

from __future__ import annotations

import logging
import re
import reprlib
from typing import TYPE_CHECKING, Any

import orjson
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cenote.errors import CenoteError, EngineGone, NotScored, Overloaded, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import FastAPI
    from starlette.requests import Request

log = logging.getLogger(__name__)

MOST_ENTRIES, LONGEST_ENTRY, LONGEST_INPUT = 10, 1000, 200
LONGEST_MESSAGE = 16_384
"""Characters of a message, which may repeat what the request sent."""
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxlong = _SHORTENED.maxother = LONGEST_INPUT
_SHORTENED.maxlist = _SHORTENED.maxdict = 8
_BRANCH = re.compile(r"^(list\[|dict\[|str$|int$|bool$|none|function-|constrained-)")
_PATH = re.compile(r"(?<![\w.:/])(?:/[\w.@+-]+){2,}")


def answer(error: CenoteError) -> Response:
    """The response for `error`."""
    if isinstance(error, Unauthorized):
        content = orjson.dumps({"error": "Unauthorized", "detail": "Unauthorized"})
        return Response(content, 401, {"WWW-Authenticate": "Bearer"}, media_type="application/json")
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, (Overloaded, EngineGone)) else {}
    # vLLM has no score routes for such a model, and its clients look for what a missing route answers.
    detail = "Not Found" if isinstance(error, NotScored) else None
    return body(error.message, error.type, error.param, error.status, headers, detail)


def body(
    message: str,
    kind: str,
    param: str | None,
    status: int,
    headers: Mapping[str, str] | None = None,
    detail: str | None = None,
) -> Response:
    """An error body with the given fields; its `detail` is the message unless another is given."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}..."
    text = _PATH.sub("<path>", message).encode(errors="replace").decode()  # no lone surrogates
    fields = {"message": text, "type": kind, "param": param, "code": status}
    content = orjson.dumps({"error": fields, "detail": detail or text})
    return Response(content, status, headers, media_type="application/json")


def validation(errors: Sequence[Any]) -> Response:
    """The 400 for a body that does not fit its model."""
    first = errors[0]
    named = (first.get("ctx") or {}).get("param")
    if named:
        return body(first["msg"], "Bad Request", named, 400)
    if first["type"] == "json_invalid":
        cause = (first.get("ctx") or {}).get("error", "the body is not JSON")
        return body(f"JSON decode error: {cause}", "Bad Request", _where(first["loc"]), 400)
    entries = "".join(f"\n  {_entry(error)}" for error in errors[:MOST_ENTRIES])
    plural = "s" if len(errors) != 1 else ""
    return body(f"{len(errors)} validation error{plural}:{entries}", "Bad Request", _where(first["loc"]), 400)


def install(app: FastAPI) -> None:
    """Register the handlers on `app`."""

    async def unexpected(_: Request, error: Exception) -> Response:
        return body("Internal server error", "InternalServerError", None, 500)

    for kind in (CenoteError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(Exception, unexpected)


async def respond(request: Request, error: Exception) -> Response:
    """The response for what a route raises. Unknown paths and methods keep the framework's `{"detail": ...}`."""
    if isinstance(error, CenoteError):
        if error.status >= 500:
            log.error("%s: %s", type(error).__name__, error.message)
        return answer(error)
    if isinstance(error, RequestValidationError):
        return validation(error.errors())
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # a body that could not be read at all, as one nested too deeply
        return body(str(error.detail), "Bad Request", "body", 400)
    return await http_exception_handler(request, error)


def _entry(error: Any) -> str:
    shown = {key: error[key] for key in ("type", "loc", "msg", "input") if key in error}
    if "input" in shown:
        shown["input"] = _shortened(shown["input"])
    return str(shown)[:LONGEST_ENTRY]


def _shortened(value: Any) -> str:
    """Return a representation that is bounded before it is made."""
    if isinstance(value, (list, tuple, dict, set)) and len(value) > 8:
        return f"<{type(value).__name__} of {len(value)}>"
    return _SHORTENED.repr(value)[:LONGEST_INPUT]


def _where(loc: Sequence[Any]) -> str:
    """`("body", "input", "list[str]", 0)` as `body.input`."""
    parts: list[str] = []
    for part in loc:
        if isinstance(part, str) and _BRANCH.match(part):
            break
        parts.append(str(part))
    return ".".join(parts)
