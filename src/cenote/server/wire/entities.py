"""The trip of requests for named entities, and the form of these: that of Transformers' pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cenote.pipeline import operations
from cenote.server.wire.fields import Many, Queued

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Sequence
    from cenote.pipeline.entities import Entity
    from cenote.pipeline.job import Job
    from cenote.pipeline.options import TextOptions
    from cenote.server.serving import Serving

    Forms = list[list[dict[str, Any]]]
    """The entities of each text, as an answer has them."""


class EntityFields(Queued):
    """Fields of requests for entities."""

    model: str | None = None
    aggregation_strategy: str = Field("none", description="none, simple, first, average or max")
    ignore_labels: Many[str] = Field(["O"], description="labels that are no entities")


async def entities_of(
    serving: Serving,
    request: Request,
    body: EntityFields,
    texts: str | list[str],
    options: TextOptions,
    encode: Callable[[Forms, Seq[Sequence]], Response],
) -> Response:
    """Answer with the named entities of one text or several.

    Args:
        serving: the models.
        request: the request.
        body: of the request.
        texts: one, or several.
        options: how text becomes ids.
        encode: makes the response of the entities of each text and of the sequences.

    Raises:
        BadRequest: there are too many texts, or as `operations.find_entities`.
        TaskNotOffered: the model does not label tokens.
    """
    service = serving.find(body.model)
    listed = [texts] if isinstance(texts, str) else texts
    serving.check_count(len(listed))

    def make() -> Job[Response]:
        job = operations.find_entities(
            service, listed, options, aggregation=body.aggregation_strategy, ignore_labels=body.ignore_labels
        )
        return job.then(lambda entities: encode([[*map(form, of_text)] for of_text in entities], job.sequences))

    return await serving.answer(request, service, body, make)


def form(entity: Entity) -> dict[str, Any]:
    """Return an entity as Transformers' pipeline does: `entity` and `index` of a token, `entity_group` of a group."""
    place = {"start": entity.start, "end": entity.end}
    if entity.index is None:
        return {"entity_group": entity.label, "score": entity.score, "word": entity.word, **place}
    return {"entity": entity.label, "score": entity.score, "index": entity.index, "word": entity.word, **place}
