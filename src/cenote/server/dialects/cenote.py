"""Cenote's own route for named entities: `/v1/token_classify`, with the fields of Transformers' pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenote.server.routes import Dialect, Route
from cenote.server.wire import answers
from cenote.server.wire.encoding import json_response, with_data
from cenote.server.wire.entities import EntityFields, entities_of
from cenote.server.wire.fields import Shared, Some

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Sequence
    from cenote.server.serving import Serving
    from cenote.server.wire.entities import Forms


class EntityRequest(Shared, EntityFields):
    """Body of `POST /v1/token_classify`."""

    input: str | Some[str]


async def token_classify(serving: Serving, request: Request, body: EntityRequest) -> Response:
    """The entities of each text, with label, score and character offsets."""
    body.refuse_media()

    def encode(forms: Forms, sequences: Seq[Sequence]) -> Response:
        data = [{"index": i, "object": "token_classify", "entities": entities} for i, entities in enumerate(forms)]
        return json_response(with_data(answers.head(serving, request, body, "token_classify", sequences), data))

    return await entities_of(serving, request, body, body.input, body.text_options(), encode)


DIALECT = Dialect(
    "Entities",
    (
        Route(
            "/v1/token_classify", token_classify, EntityRequest, aliases=("/token_classify",), purpose="token_classify"
        ),
    ),
)
