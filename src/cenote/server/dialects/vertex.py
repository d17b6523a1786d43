"""Vertex AI's dialect, and KServe's first: `instances` in, `predictions` out, each as `POST /` takes and gives it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator
from starlette.requests import Request
from starlette.responses import Response

from cenote.server.dialects import tei
from cenote.server.routes import Dialect, Route
from cenote.server.wire.fields import Body, Some, is_prompt

if TYPE_CHECKING:
    from cenote.server.serving import Serving
    from cenote.server.wire.fields import Lengths

KINDS = (tei.TeiRerankRequest, tei.RootRequest)
"""Bodies that an instance may be."""
Instance = Annotated[
    Annotated[tei.TeiRerankRequest, Tag("rank")] | Annotated[tei.RootRequest, Tag("run")],
    Discriminator(lambda value: "rank" if isinstance(value, dict) and "texts" in value else "run"),
]


class VertexRequest(Body):
    """Body of `POST /vertex`: instances, each the body of `POST /`."""

    model: str | None = None
    instances: Some[Instance]
    parameters: dict[str, Any] | None = Field(None, description="fields of every instance that lacks them")

    @classmethod
    def check_lengths(cls, values: Any, lengths: Lengths) -> None:
        """See `Body.check_lengths`."""
        super().check_lengths(values, lengths)
        if not isinstance(values, dict):
            return
        instances = values.get("instances")
        for part in (values.get("parameters"), *(instances if isinstance(instances, list) else ())):
            for kind in KINDS:
                kind.check_lengths(part, lengths)

    @model_validator(mode="before")
    @classmethod
    def _shared(cls, values: Any) -> Any:
        """Put the parameters into the instances."""
        parameters = values.get("parameters") if isinstance(values, dict) else None
        instances = values.get("instances") if isinstance(parameters, dict) else None
        if not isinstance(instances, list):
            return values
        return {**values, "instances": [_with(parameters, instance) for instance in instances]}

    @property
    def inputs(self) -> int:
        """Number of inputs of all instances."""
        sides = [getattr(instance, "inputs", None) or getattr(instance, "texts", None) for instance in self.instances]
        return sum(len(side) if isinstance(side, list) and not is_prompt(side) else 1 for side in sides)


def _with(parameters: Any, instance: Any) -> Any:
    return {**parameters, **instance} if isinstance(instance, dict) else instance


async def predict(serving: Serving, request: Request, body: VertexRequest) -> Response:
    """The result of each instance."""
    serving.check_count(body.inputs)
    share = request.state.body_bytes // len(body.instances)
    state = {**request.scope["state"], "body_bytes": share}

    def run(instance: Any) -> asyncio.Task[Response]:
        part = Request({**request.scope, "state": {**state}}, request.receive)
        instance.model = body.model or instance.model
        if isinstance(instance, tei.RootRequest):
            return asyncio.ensure_future(tei.root(serving, part, instance))
        instance.model = instance.model or serving.models.made_for("score")
        return asyncio.ensure_future(tei.rerank(serving, part, instance))

    tasks = [run(instance) for instance in body.instances]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    content = b",".join(bytes(answer.body) for answer in answers)
    return Response(b'{"predictions":[' + content + b"]}", media_type="application/json")


DIALECT = Dialect(
    "Vertex AI",
    (
        Route("/vertex", predict, VertexRequest, aliases=("/v1/models/{model}:predict",)),
        Route("/predict", predict, VertexRequest, is_described=False, marks=frozenset({"instances"})),
    ),
    tei.error,
    prefix="vertex",
)
