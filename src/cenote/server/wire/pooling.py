"""The trip of requests for a vector, a matrix or a sparse vector per input, or for several of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cenote.errors import BadRequest
from cenote.pipeline import operations
from cenote.server.wire import answers, sizes
from cenote.server.wire.encoding import entries, json_response, vectors_response, with_data
from cenote.tasks import TASKS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Output, PoolingParams, Sequence
    from cenote.pipeline.job import Job
    from cenote.pipeline.pipeline import Service
    from cenote.server.serving import Serving
    from cenote.server.wire.fields import Form, PoolingFields


async def answer_vectors(
    serving: Serving,
    request: Request,
    body: PoolingFields,
    task: str,
    params: PoolingParams,
    *,
    also: tuple[str, ...] = (),
    prefix: str,
    kind: str,
    field: str,
) -> Response:
    """Answer a request for a vector, a matrix or a sparse vector per input, or for several of them."""
    service = serving.find(body.model)
    body.check_media(service)
    tasks = (task, *also)
    only_float = bool(also) or task == "sparse"
    if also and params.late_chunking_params is not None:
        raise BadRequest(
            f"late chunking is for the task 'token_embed' alone, not for {[*tasks]}", param="late_chunking_params"
        )
    applied = body.applied(service.renderer.prompts)
    limit = serving.config.max_response_bytes

    def make() -> Job[Response]:
        prompts, options = answers.prompts_of(serving, service, body, applied)
        job = operations.encode(service, prompts, task, params, options, also=also)
        body.check_answer(limit, service.info, job.sequences)
        form = body.form(service, tasks, params)
        if only_float:
            _check_float(body)

        def encode(outputs: list[Output]) -> Response:
            sizes.check_weights(limit, outputs)
            head = answers.head(serving, request, body, prefix, job.sequences, applied)
            if only_float:
                values = _several(service, body, outputs, tasks, form)
            elif form is not None:
                values = form([output.data for output in outputs])
            else:
                return _vectors(body, head, outputs, job.sequences, kind, field)
            return json_response(with_data(head, entries(kind, field, values)))

        return job.then(encode)

    is_short = answers.is_short(serving, request, service, body, applied)
    return await serving.answer(request, service, body, make, is_short=is_short)


def _check_float(body: PoolingFields) -> None:
    if body.encoding_format != "float":
        raise BadRequest(
            f"sparse embeddings and several kinds at once have only the encoding_format 'float', "
            f"got {body.encoding_format!r}",
            param="encoding_format",
        )


def _vectors(
    body: PoolingFields,
    head: dict[str, Any],
    outputs: list[Output],
    sequences: list[Sequence],
    kind: str,
    field: str,
) -> Response:
    """Return an answer of plain vectors or matrices, in any encoding."""
    beside = [{"late_chunking": sequence.late_chunking} for sequence in sequences] if body.late() else None
    return vectors_response(
        head,
        [output.data for output in outputs],
        kind=kind,
        field=field,
        encoding_format=body.encoding_format,
        embed_dtype=body.embed_dtype,
        endianness=body.endianness,
        beside=beside,
    )


def _several(
    service: Service, body: PoolingFields, outputs: list[Output], tasks: tuple[str, ...], form: Form | None
) -> list[Any]:
    """Return the value of each input: a sparse vector, or several kinds of embeddings by their names."""
    columns: dict[str, list[Any]] = {}
    for task in tasks:
        of_task = outputs if task == tasks[0] else [output.others[task] for output in outputs]
        columns[TASKS[task].kind] = [
            answers.value(output, service, return_tokens=body.return_tokens) for output in of_task
        ]
    if form is not None:
        columns["dense"] = form(columns["dense"])
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
