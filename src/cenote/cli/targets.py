"""Targets of `cenote bench`: a model in this process, or a server over HTTP."""

from __future__ import annotations

import http.client
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import orjson

from cenote.calls import RENDERED_AT_ONCE
from cenote.core import PoolingParams
from cenote.engine.waiting import UnderWay
from cenote.errors import CenoteError, ConfigError
from cenote.pipeline import operations
from cenote.pipeline.options import TextOptions
from cenote.pipeline.pairs import PairOptions
from cenote.tasks import check_task

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.pipeline.job import Job
    from cenote.pipeline.pipeline import Service

QUERY = "how deep is the water"
"""The query that documents are scored against."""

PATIENCE = 600.0
"""Default of the seconds that an answer may take."""

IDLE = 2.0
"""Seconds for which a connection is kept without use; servers close theirs after a few more."""


class Target(Protocol):
    """A model or a server that answers texts.

    Attributes:
        name: of the model.
        task: the task that is measured.
        longest: maximum tokens of a text; `None` = unknown.
    """

    name: str
    task: str
    longest: int | None

    def ask(self, texts: Seq[str]) -> int:
        """Run one request and return the tokens that the model counts in it. Thread-safe.

        Raises:
            CenoteError: it failed.
        """

    def count(self, text: str) -> int:
        """Return the tokens of a request of one text."""


class Local:
    """A model in this process, below `LLM` and the server.

    Args:
        service: the model.
        task: a task that it offers, or "score"; `None` = its default.

    Raises:
        BadRequest: it does not offer the task.
    """

    def __init__(self, service: Service, task: str | None) -> None:
        self.service = service
        self.name = service.info.name
        self.task = task or service.info.default_task
        self.longest: int | None = service.info.limit(self.task)
        if self.task == "score":
            self._job([QUERY])
        else:
            check_task(self.task, service.info.tasks)

    def ask(self, texts: Seq[str]) -> int:
        """See `Target.ask`."""
        at_once = len(texts) if self.task == "score" else RENDERED_AT_ONCE
        jobs = []
        with UnderWay() as under_way:
            for start in range(0, len(texts), at_once):
                jobs.append(self._job(texts[start : start + at_once]))
                under_way.submit(self.service.engine, jobs[-1].sequences)
            for job, outputs in zip(jobs, under_way.results(), strict=True):
                job.finish(outputs)
        return sum(job.tokens for job in jobs)

    def count(self, text: str) -> int:
        """See `Target.count`."""
        return self._job([text]).tokens

    def _job(self, texts: Seq[str]) -> Job[Any]:
        params, options = PoolingParams(), TextOptions()
        if self.task == "score":
            return operations.score(self.service, [QUERY], texts, params, options, PairOptions())
        return operations.encode(self.service, texts, self.task, params, options)


class Remote:
    """A server with the routes of OpenAI and vLLM.

    Args:
        url: its address, with or without `/v1`.
        name: of the model; `None` = the server's first.
        task: `None` = embed.
        key: sent as bearer token.
        patience: maximum seconds of an answer.

    Raises:
        ConfigError: it does not answer, or does not serve the model.
    """

    def __init__(self, url: str, name: str | None, task: str | None, key: str = "", patience: float = PATIENCE) -> None:
        parts = urlsplit(url)
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host = parts.netloc
        self._patience = patience
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._idle: deque[tuple[float, http.client.HTTPConnection]] = deque()
        self.task = task or "embed"
        try:
            cards = {str(card["id"]): card for card in self._call("GET", "/v1/models")["data"]}
        except (CenoteError, LookupError, TypeError) as error:
            self.close()
            raise ConfigError(f"no model can be had at {url}: {error}") from None
        self.name = name or next(iter(cards), "")
        if self.name not in cards:
            self.close()
            raise ConfigError(f"{url} does not serve {self.name!r}, but {', '.join(cards) or 'nothing'}")
        self.longest: int | None = cards[self.name].get("max_model_len")

    def ask(self, texts: Seq[str]) -> int:
        """See `Target.ask`."""
        path, fields = _request(self.task, list(texts))
        usage = self._call("POST", path, orjson.dumps({"model": self.name, **fields})).get("usage") or {}
        return int(usage.get("prompt_tokens") or usage.get("total_tokens") or 0)

    def count(self, text: str) -> int:
        """See `Target.count`."""
        return self.ask([text])

    def version(self) -> str | None:
        """Return the server's version, if it has one."""
        try:
            return str(self._call("GET", "/version")["version"])
        except (CenoteError, LookupError, TypeError):
            return None

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            self._idle.pop()[1].close()

    def _call(self, method: str, path: str, content: bytes | None = None) -> Any:
        """Send a request, and return the JSON of its answer.

        Raises:
            CenoteError: the server cannot be reached, or its answer is an error or no JSON.
        """
        status, body = self._exchange(method, path, content)
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if status != 200 or not isinstance(answer, dict):
            message = _message(answer) or body[:200].decode(errors="replace")
            raise CenoteError(f"{method} {path} was answered with {status}: {message}")
        return answer

    def _exchange(self, method: str, path: str, content: bytes | None) -> tuple[int, bytes]:
        """Send a request, and return the status and the body of its answer."""
        connection = None
        try:
            connection = self._connection()
            connection.request(method, self._prefix + path, content, self._headers)
            answer = connection.getresponse()
            status, body = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            if connection is not None:
                connection.close()
            reason = getattr(error, "strerror", None) or error
            raise CenoteError(f"{type(error).__name__}: {reason}") from None
        self._idle.append((time.monotonic(), connection))
        return status, body

    def _connection(self) -> http.client.HTTPConnection:
        while True:
            try:
                since, connection = self._idle.pop()
            except IndexError:
                return self._connect(self._host, timeout=self._patience)
            if time.monotonic() - since < IDLE:
                return connection
            connection.close()


def _request(task: str, texts: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a request."""
    routes: dict[str, tuple[str, dict[str, Any]]] = {
        "embed": ("/v1/embeddings", {"input": texts, "encoding_format": "base64"}),
        "classify": ("/classify", {"input": texts}),
        "score": ("/score", {"text_1": QUERY, "text_2": texts}),
        "sparse": ("/pooling", {"task": task, "input": texts, "encoding_format": "float"}),
    }
    others = ("/pooling", {"task": task, "input": texts, "encoding_format": "base64"})
    return routes.get(task, others)


def _message(answer: Any) -> str:
    """Return the message of an error body in the forms of OpenAI and FastAPI, or an empty string."""
    if not isinstance(answer, dict):
        return ""
    error = answer.get("error", answer.get("detail", answer.get("message", "")))
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)
