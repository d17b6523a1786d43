"""Cenote's own route for named entities: `/v1/token_classify`, with the fields of Transformers' pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cenote.pipeline import operations
from cenote.server.routes import Dialect, Route
from cenote.server.wire import answers
from cenote.server.wire.encoding import json_response, with_data
from cenote.server.wire.fields import Many, Shared, Some

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.entities import Entity
    from cenote.pipeline.job import Job
    from cenote.server.serving import Serving


class EntityRequest(Shared):
    """Body of `POST /v1/token_classify`."""

    input: str | Some[str]
    aggregation_strategy: str = Field("none", description="none, simple, first, average or max")
    ignore_labels: Many[str] = Field(["O"], description="labels that are no entities")


async def token_classify(serving: Serving, request: Request, body: EntityRequest) -> Response:
    """The entities of each text, with label, score and character offsets."""
    service = serving.find(body.model)
    body.refuse_media()
    texts = [body.input] if isinstance(body.input, str) else body.input
    serving.check_count(len(texts))

    def make() -> Job[Response]:
        job = operations.find_entities(
            service,
            texts,
            body.text_options(),
            aggregation=body.aggregation_strategy,
            ignore_labels=body.ignore_labels,
        )

        def encode(entities: list[list[Entity]]) -> Response:
            data = [
                {"index": i, "object": "token_classify", "entities": [wire(entity) for entity in of_text]}
                for i, of_text in enumerate(entities)
            ]
            head = answers.head(serving, request, body, "token_classify", job.sequences)
            return json_response(with_data(head, data))

        return job.then(encode)

    return await serving.answer(request, service, body, make)


def wire(entity: Entity) -> dict[str, Any]:
    """Return an entity as Transformers' pipeline does: `entity` and `index` of a token, `entity_group` of a group."""
    place = {"start": entity.start, "end": entity.end}
    if entity.index is None:
        return {"entity_group": entity.label, "score": entity.score, "word": entity.word, **place}
    return {"entity": entity.label, "score": entity.score, "index": entity.index, "word": entity.word, **place}


DIALECT = Dialect(
    "Entities",
    (
        Route(
            "/v1/token_classify", token_classify, EntityRequest, aliases=("/token_classify",), purpose="token_classify"
        ),
    ),
)
