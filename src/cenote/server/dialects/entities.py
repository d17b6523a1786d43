"""Cenote's own route for named entities: `/v1/token_classify`, with the fields of Transformers' pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cenote.engine.entities import check_aggregation, check_labels, entities
from cenote.server.dialects import answers
from cenote.server.dialects.requests import Many, Shared, Some
from cenote.server.encoding import json_response, with_data
from cenote.types import PoolingParams

if TYPE_CHECKING:
    from tokenizers import Encoding

    from cenote.engine.entities import Entity
    from cenote.server.serving import Serving
    from cenote.types import Sequence


class EntityRequest(Shared):
    """Body of `POST /v1/token_classify`."""

    input: str | Some[str]
    aggregation_strategy: str = Field("none", description="none, simple, first, average or max")
    ignore_labels: Many[str] = Field(["O"], description="labels that are no entities")


def router(serving: Serving) -> APIRouter:
    """The routes of this dialect."""
    routes = APIRouter(tags=["Entities"])

    @routes.post("/v1/token_classify")
    @routes.post("/token_classify", include_in_schema=False)
    async def token_classify(body: EntityRequest, request: Request) -> Response:
        """The entities of each text, with label, score and character offsets."""
        service = serving.find(body.model)
        body.refuse_media()
        check_aggregation(body.aggregation_strategy)
        check_labels(service.info)
        texts = [body.input] if isinstance(body.input, str) else body.input
        serving.check_count(len(texts))
        encodings: list[Encoding] = []

        def rendered() -> list[Sequence]:
            params = PoolingParams(use_activation=True)
            made = service.renderer.annotated(texts, "token_classify", params, body.text_options())
            encodings.extend(encoding for _, encoding in made)
            return [sequence for sequence, _ in made]

        sequences, outputs = await serving.compute(request, service, rendered)

        def found() -> list[list[Entity]]:
            return [
                entities(
                    text,
                    encoding,
                    output.data,
                    service.info.labels,
                    service.renderer.tokenizer,
                    aggregation=body.aggregation_strategy,
                    ignore_labels=body.ignore_labels,
                )
                for text, encoding, output in zip(texts, encodings, outputs, strict=True)
            ]

        data = [
            {"index": i, "object": "token_classify", "entities": [wire(entity) for entity in own]}
            for i, own in enumerate(await serving.in_pool("encode", found))
        ]
        return json_response(with_data(answers.head(serving, request, body, "token_classify", sequences), data))

    return routes


def wire(entity: Entity) -> dict[str, Any]:
    """An entity as Transformers' pipeline writes it: `entity` and `index` for tokens, `entity_group` for groups."""
    place = {"start": entity.start, "end": entity.end}
    if entity.index is None:
        return {"entity_group": entity.label, "score": entity.score, "word": entity.word, **place}
    return {"entity": entity.label, "score": entity.score, "index": entity.index, "word": entity.word, **place}
