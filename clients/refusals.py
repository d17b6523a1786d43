"""Bad requests, as each client sends them: what is bad, what the server says, and what the client raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from clients.call import FULL, LARGE, VALUES, A, B, C, Call

STATUS = {"missing": 400, "type": 400, "model": 404, "long": 400, "key": 401, "full": 429, "large": 413}
"""What is bad, and the status: no input, one of a wrong type, a model that is not served, an input that is too long, a
wrong key, a server that is overloaded, a body that is too large."""
SAYS = {
    "missing": "Field required",
    "type": "validation error",
    "model": "The model `none` does not exist",
    "long": "maximum context length is",
    "key": "missing or wrong API key",
    "full": FULL,
    "large": LARGE,
}
"""Part of the server's message."""
EXACTLY = {"missing": "Exactly one of `input` and `messages` must be given"}
"""That of the missing input of OpenAI's embeddings."""
OPENAI = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "APIStatusError",
    429: "RateLimitError",
}
"""Exceptions of openai, and of clients that are generated as it is."""
COHERE = {
    400: "BadRequestError",
    401: "UnauthorizedError",
    404: "NotFoundError",
    413: "ApiError",
    429: "TooManyRequestsError",
}
"""Those of cohere."""
LONG, BIG = VALUES["long"], "deep " * 500


def refusals(
    send: Callable[..., Any],
    field: str,
    raises: str | Mapping[int, str],
    *,
    of: str = "",
    says: Mapping[str, str] = {},
    fails: Mapping[str, str] = {},
    without: Iterable[str] = (),
    **inputs: Any,
) -> list[Call]:
    """Return the calls of all bad requests.

    Args:
        send: makes a right request of a model in `minilm`'s place; takes the URL of a server, a key, and fields that
            replace those of the request.
        field: the input.
        raises: name of the exception, for all or by the status.
        of: what is called, where a client has several.
        says: messages that differ from `SAYS`.
        fails: why the client cannot tell of them.
        without: what the client refuses by itself, or what the dialect cannot have.
        inputs: values of the input that differ from plain texts: `type`, `long`, `large`.
    """
    bad = {
        "missing": partial(send, A, **{field: None}),
        "type": partial(send, A, **{field: inputs.get("type", [1.5])}),
        "model": partial(send, A, model="none"),
        "long": partial(send, A, **{field: inputs.get("long", LONG)}),
        "key": partial(send, B, "wrong"),
        "full": partial(send, C),
        "large": partial(send, C, **{field: inputs.get("large", BIG)}),
    }
    calls = []
    for name in bad.keys() - set(without):
        kind = raises if isinstance(raises, str) else raises[STATUS[name]]
        title, message = f"{of}: {name}" if of else name, says.get(name, SAYS[name])
        told = {"bad": name, "cause": "readable-errors", "fails": fails.get(name, "")}
        calls.append(Call(title, bad[name], error=message, raises=kind, **told))
    return sorted(calls, key=lambda call: [*STATUS].index(call.bad))
