"""Errors on the wire: the one place where an exception becomes a response.

Every dialect makes its body of an error out of a `Fault`. The common body is OpenAI's and vLLM's,
`{"error": {"message", "type", "param", "code"}}`, with the message once more as `detail`, where clients of Voyage and
Jina read it. Nothing is logged here: an error is counted, and the part that fails tells of it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from cenote import metrics
from cenote.errors import (
    CenoteError,
    EngineGone,
    Overloaded,
    TooManyConnections,
    Unauthorized,
    plural,
    without_paths,
)
from cenote.server.wire.encoding import to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_ENTRIES, LONGEST_ENTRY, LONGEST_INPUT = 10, 1000, 200
LONGEST_MESSAGE = 16_384
"""Characters of a message, which may repeat parts of the request."""
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxlong = _SHORTENED.maxother = LONGEST_INPUT
_SHORTENED.maxlist = _SHORTENED.maxdict = 8
_BRANCH = re.compile(r"^(list\[|dict\[|literal\[|union\[|str$|int$|bool$|none|function-|constrained-|[A-Z])")
"""Names of the forms that a field may have."""
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


class BadBody(Exception):
    """A body that is not JSON, or does not fit the model of its route.

    Attributes:
        errors: pydantic's reports, each with `loc` from the body on.
    """

    def __init__(self, errors: Sequence[Any]) -> None:
        super().__init__("the body does not fit the route")
        self.errors = errors


@dataclass(frozen=True)
class Fault:
    """An error as dialects see it.

    Attributes:
        message: without paths of the server's files, of valid Unicode.
        type: name of the kind, as OpenAI spells them.
        param: the request parameter at fault, if one is.
        error: the exception.
    """

    status: int
    message: str
    type: str
    param: str | None
    error: Exception
    headers: Mapping[str, str] = field(default_factory=dict)


Failures = (CenoteError, BadBody, HTTPException)
"""Exceptions that are answers; any other is a defect of the server."""


def openai_error(fault: Fault) -> dict[str, Any]:
    """Return the body of OpenAI and vLLM, with the message once more where clients of other services read it.

    `detail` is read by those of Voyage and Jina, `message` by Cohere's.
    """
    fields = {"message": fault.message, "type": fault.type, "param": fault.param, "code": fault.status}
    return {"error": fields, "detail": fault.message, "message": fault.message}


def text_error(fault: Fault) -> dict[str, Any]:
    """Return the body of KServe, Ollama and Weaviate, whose clients read `error` as a text."""
    return {"error": fault.message}


SPELLINGS = {
    "dimensions": ("output_dimension", "truncate_dim"),
    "documents": ("text_2", "data_2", "items", "texts", "passages", "input"),
    "queries": ("text_1", "data_1", "query"),
    "input": ("inputs", "texts", "content", "instances", "messages"),
    "messages": ("input", "inputs", "images", "documents", "passages", "data_2", "prompt_token_ids"),
    "truncate_prompt_tokens": ("max_tokens", "truncation", "truncate"),
    "use_activation": ("normalize", "raw_scores"),
    "top_n": ("top_k",),
    "instruction": ("instruct",),
}
"""Parameters, and their spellings in other dialects."""


def respond(error: Exception, body: Callable[[Fault], dict[str, Any]] = openai_error, request: Any = None) -> Response:
    """Return the response for an exception, and count it by its reason.

    Args:
        error: any exception.
        body: makes the dialect's error body.
        request: body of the request.
    """
    metrics.refusals_of(reason_of(error)).inc()
    fault = fault_of(error)
    if isinstance(error, CenoteError):
        fault = replace(fault, param=as_sent(fault.param, request))
    return _json(body(fault), fault.status, fault.headers)


def as_sent(param: str | None, request: Any) -> str | None:
    """Return the spelling of a parameter that a request has, if it has another than ours."""
    if param is None or not isinstance(request, dict) or param in request:
        return param
    return next(filter(request.__contains__, SPELLINGS.get(param, ())), param)


def fault_of(error: Exception) -> Fault:
    """Return `error` as dialects see it."""
    if isinstance(error, BadBody):
        message, param = validation(error.errors)
        return Fault(400, _bounded(message), "Bad Request", param, error)
    if isinstance(error, HTTPException):
        kind, param = HTTP_ERRORS.get(error.status_code, ("HTTPError", None))
        return Fault(error.status_code, str(error.detail), kind, param, error, error.headers or {})
    if not isinstance(error, CenoteError):
        return Fault(500, "Internal server error", "InternalServerError", None, error)
    # a refusal repeats the request and the served name, which may look like paths; a failure may quote another library
    message = _bounded(error.message)
    if error.status >= 500:
        message = without_paths(message)
    return Fault(error.status, message, error.type, error.param, error, _headers(error))


def reason_of(error: Exception) -> str:
    """Return the label of an error in the metrics: one for each class of errors, so that there are not many."""
    if isinstance(error, Overloaded):
        return error.reason
    if isinstance(error, HTTPException):
        return HTTP_REASONS.get(error.status_code, "http_error")
    if not isinstance(error, Failures):
        return "internal_error"
    return _CAPITAL.sub("_", type(error).__name__.lstrip("_")).lower()


HTTP_REASONS = {400: "unreadable_body", 404: "path_not_found", 405: "method_not_allowed", 499: "client_closed"}
"""Labels of the web framework's exceptions, by their status."""
HTTP_ERRORS = {
    400: ("Bad Request", "body"),  # a body that could not be read at all, as one nested too deeply
    404: ("NotFoundError", None),
    405: ("MethodNotAllowedError", None),
}
"""Type and parameter of errors by status, of the web framework's exceptions."""


def _headers(error: CenoteError) -> dict[str, str]:
    if isinstance(error, TooManyConnections):
        return {"Retry-After": str(error.retry_after), "Connection": "close"}
    if isinstance(error, (Overloaded, EngineGone)):
        return {"Retry-After": str(error.retry_after)}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}


def _bounded(message: str) -> str:
    """Return `message` bounded and without lone surrogates."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}..."
    return message.encode(errors="replace").decode()


def _json(content: dict[str, Any], status: int, headers: Mapping[str, str] | None) -> Response:
    return Response(to_json(content), status, headers, media_type="application/json")


def validation(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Return the message and the parameter for a body that does not fit its model."""
    errors = _farthest(errors)
    first = errors[0]
    context = first.get("ctx") or {}
    if context.get("param"):
        return first["msg"], context["param"]
    if first["type"] == "json_invalid":
        return f"JSON decode error: {context.get('error', 'the body is not JSON')}", _where(_loc(first))
    entries = "".join(f"\n  {_entry(error)}" for error in errors[:MOST_ENTRIES])
    return f"{len(errors)} validation {plural('error', len(errors))}:{entries}", _where(_loc(first))


def _farthest(errors: Sequence[Any]) -> list[Any]:
    """Return the errors of each field that lie farthest in it.

    A field of several forms is read as each of them. The form that was meant is the one that was read farthest, and its
    error names the element at fault; the others fail at the first.
    """
    places = [*map(_place, errors)]
    farthest: dict[tuple[str, ...], list[int]] = {}
    for name, place in places:
        farthest[name] = max(place, farthest.get(name, []))
    return [error for error, (name, place) in zip(errors, places, strict=True) if farthest[name] == place]


def _place(error: Any) -> tuple[tuple[str, ...], list[int]]:
    """Return the field of an error, and the indices in it."""
    loc = _loc(error)
    return tuple(map(str, loc[:2])), [*filter(_is_index, loc[2:])]


def _is_index(part: Any) -> bool:
    return isinstance(part, int)


def _loc(error: Any) -> tuple[Any, ...]:
    """Return the location of an error; one about a list as a whole may know the element."""
    return (*error["loc"], *error.get("ctx", {}).get("place", ()))


def _entry(error: Any) -> str:
    shown = {key: error[key] for key in ("type", "loc", "msg", "input") if key in error} | {"loc": _loc(error)}
    if "input" in shown:
        shown["input"] = _shortened(shown["input"])
    return str(shown)[:LONGEST_ENTRY]


def _shortened(value: Any) -> str:
    """Return a representation that is bounded before it is made."""
    if isinstance(value, (list, tuple, dict, set)) and len(value) > 8:
        return f"<{type(value).__name__} of {len(value)}>"
    return _SHORTENED.repr(value)[:LONGEST_INPUT]


def _where(loc: Sequence[Any]) -> str:
    """`("body", "input", "list[str]", 0)` as `body.input.0`."""
    return ".".join(part for part in map(str, loc) if not _BRANCH.match(part))
