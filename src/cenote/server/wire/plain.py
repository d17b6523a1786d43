"""The trip of requests whose answer is nothing but the results of one task."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cenote.pipeline import operations
from cenote.server.wire import sizes

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Output, PoolingParams
    from cenote.pipeline.job import Job
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.pipeline import Service
    from cenote.server.serving import Serving
    from cenote.server.wire.fields import Queued


async def encoded(
    serving: Serving,
    request: Request,
    service: Service,
    body: Queued,
    prompts: Seq[Any],
    task: str,
    params: PoolingParams,
    options: TextOptions,
    encode: Callable[[list[Output]], Response],
    *,
    is_slow: bool = False,
) -> Response:
    """Answer with the results of `task`. When `encode` runs, `request.state.tokens` tells their tokens.

    Args:
        serving: the models.
        request: the request.
        service: the model.
        body: of the request.
        prompts: as `Service.render` takes them.
        task: one of the model's.
        params: of the task.
        options: how text becomes ids.
        encode: makes the response.
        is_slow: `encode` takes long even for small outputs.

    Raises:
        BadRequest: there are too many prompts, the answer would be too large, or as `operations.encode`.
    """
    serving.check_count(len(prompts))
    limit = serving.config.max_response_bytes

    def checked(outputs: list[Output]) -> Response:
        sizes.check_weights(limit, outputs)
        return encode(outputs)

    def make() -> Job[Response]:
        job = operations.encode(service, prompts, task, params, options)
        count = sizes.numbers(service.info, job.sequences)
        sizes.check(limit, count, sizes.JSON_NUMBER)
        return replace(job, is_slow=is_slow).then(checked)

    is_short = serving.is_short(request, service, len(prompts), options.prompt, pads=options.pad)
    return await serving.answer(request, service, body, make, is_short=is_short)
