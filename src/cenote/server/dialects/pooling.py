"""vLLM's own routes: `/pooling`, `/classify`, `/tokenize`, `/detokenize`, and the trip that vector routes share."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from cenote import metrics
from cenote.engine.rendering import ChatOptions
from cenote.errors import BadRequest, PluginFailed
from cenote.plugins import NOT_INSTALLED, WRONG_TASK
from cenote.server.dialects import answers
from cenote.server.dialects.answers import render
from cenote.server.dialects.requests import (
    KINDS_OF_TASKS,
    Body,
    Chat,
    Conversation,
    Inputs,
    Many,
    PoolingFields,
    Some,
    TextInput,
)
from cenote.server.dialects.vectors import TypedFields
from cenote.server.encoding import foreign_response, json_response, vectors_response, with_data
from cenote.server.serving import request_id
from cenote.tasks import PLUGIN, check_task
from cenote.types import PoolingParams

if TYPE_CHECKING:
    from cenote.server.serving import Serving
    from cenote.service import Service
    from cenote.tensors.quantize import Ranges
    from cenote.types import Output, Sequence

log = logging.getLogger(__name__)

LARGE = 65_536
"""Answers with more numbers than this are encoded off the event loop."""


class PoolingRequest(PoolingFields):
    """Body of `POST /pooling`: as `/v1/embeddings`, and the task to run."""

    uncounted = frozenset({"data"})

    task: str | None = Field(None, description="default: the model's default task")
    step_tag_id: Annotated[int, Field(strict=True, ge=0)] | None = None
    returned_token_ids: Some[Annotated[int, Field(strict=True, ge=0)]] | None = None
    data: Any = Field(None, description="input of an IO-processor plugin")

    @property
    def for_plugin(self) -> bool:
        """See `PoolingFields.for_plugin`."""
        return self.data is not None or self.task == PLUGIN


class PairInput(BaseModel):
    """Two texts that are classified together, as Transformers' pipelines spell them."""

    text: str
    text_pair: str


class ClassifyRequest(Inputs):
    """Body of `POST /classify`: `input` (text, ids, pairs of texts, or lists of them) or `messages`."""

    input: PairInput | Many[PairInput] | TextInput | Conversation | Many[Conversation] | None = None  # type: ignore[assignment]

    def prompts(self) -> list[Any]:
        """See `Inputs.prompts`."""
        source: Any = self.input if isinstance(self.input, list) else [self.input]
        if isinstance(source[0] if source else None, PairInput):
            return [pair.model_dump() for pair in source]
        return super().prompts()


class TokenizeRequest(Body, Chat):
    """Body of `POST /tokenize`: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Conversation | None = None
    add_generation_prompt: bool | None = Field(None, description="default: true for `messages`")  # type: ignore[assignment]
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError(
                "input", "Exactly one of `prompt` and `messages` must be given.", {"param": "prompt"}
            )
        return self


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Many[Annotated[int, Field(ge=0, lt=2**63)]]


def router(serving: Serving) -> APIRouter:
    """The routes of this dialect."""
    routes = APIRouter(tags=["vLLM"])

    @routes.post("/pooling")
    async def pooling(body: PoolingRequest, request: Request) -> Response:
        """The result of any task that the model offers: a vector or a matrix per input."""
        if body.for_plugin:
            return await answer_plugin(serving, request, body)
        if body.dimensions is not None:
            raise BadRequest("dimensions is currently not supported", param="dimensions")
        task = body.task or serving.find(body.model).info.default_task
        params = PoolingParams(
            use_activation=body.use_activation,
            top_k=body.top_k,
            step_tag_id=body.step_tag_id,
            returned_token_ids=None if body.returned_token_ids is None else tuple(body.returned_token_ids),
            late_chunking_params=body.late(),
        )
        return await answer_vectors(
            serving, request, body, task, params, prefix="pooling", kind="pooling", field="data"
        )

    @routes.post("/classify")
    @routes.post("/v1/classify", include_in_schema=False)
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """The value of every class per input, and the name of the largest."""
        service = serving.find(body.model)
        body.refuse_media()
        params = PoolingParams(use_activation=body.use_activation)
        sequences, outputs = await serving.compute(
            request,
            service,
            lambda: render(serving, service, body, "classify", params),
            is_plain=body.conversations() is None,
        )
        labels = service.info.labels
        data = [
            {
                "index": i,
                "label": labels[int(output.data.argmax())] if labels else None,
                "probs": output.data,
                "num_classes": len(output.data),
            }
            for i, output in enumerate(outputs)
        ]
        return json_response(with_data(answers.head(serving, request, body, "classify", sequences), data))

    @routes.post("/tokenize")
    @routes.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt or a conversation, also of more tokens than the model reads."""
        service = serving.find(body.model)

        def answered() -> Response:
            ids = _tokens(serving, service, body)
            strings = service.renderer.token_strings(ids) if body.return_token_strs else None
            return json_response(
                {
                    "count": len(ids),
                    "max_model_len": service.info.max_model_len,
                    "tokens": ids,
                    "token_strs": strings,
                }
            )

        return await serving.in_pool("render", answered)

    @routes.post("/detokenize")
    @routes.post("/v1/detokenize", include_in_schema=False)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service = serving.find(body.model)
        text = await serving.in_pool("render", lambda: service.renderer.detokenize(body.tokens))
        return json_response({"prompt": text})

    return routes


def _tokens(serving: Serving, service: Service, body: TokenizeRequest) -> list[int]:
    """Return the token ids of a request.

    Raises:
        BadRequest: the text is longer than the server tokenises, or the chat template refuses the messages.
    """
    if body.messages is None:
        text = body.prompt or ""
        special = True if body.add_special_tokens is None else body.add_special_tokens
    else:
        chat = body.chat_options(trust_template=serving.config.trust_request_chat_template)
        opens = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
        options = ChatOptions(opens, chat.continue_final_message, chat.template, chat.kwargs)
        text = service.renderer.chat_text(body.messages, options)
        special = bool(body.add_special_tokens)
    size = len(text.encode(errors="replace"))
    if size > serving.config.max_tokenize_bytes:
        raise BadRequest(
            f"the text has {size} bytes; at most {serving.config.max_tokenize_bytes} are tokenised. "
            "Send it in parts, or start the server with a larger --max-tokenize-bytes",
            param="prompt" if body.messages is None else "messages",
        )
    return service.renderer.tokenize(text, add_special_tokens=special)


async def answer_plugin(serving: Serving, request: Request, body: PoolingRequest) -> Response:
    """The trip of a request whose input and answer are an IO-processor plugin's.

    Raises:
        BadRequest: there is no plugin, or it refuses the data.
        PluginFailed: it fails.
    """
    service = serving.find(body.model)
    if body.task not in (None, PLUGIN):
        raise BadRequest(WRONG_TASK, param="data")
    if service.plugin is None:
        raise BadRequest(NOT_INSTALLED, param="data")
    if body.input is not None or body.messages is not None:
        raise BadRequest("a request for a plugin has `data`, and neither `input` nor `messages`", param="data")
    body.refuse_media()
    number = f"pooling-{request_id(request, body.request_id)}"
    call = service.plugin.call(body.data, number)

    def rendered() -> list[Sequence]:
        prompts, task, params = call.prepare(service.info)
        serving.check_count(len(prompts))
        return service.render(prompts, task, params, body.options(is_chat=False))

    def answered() -> Response:
        answer = call.finish(sequences, outputs)
        try:
            return foreign_response({"request_id": number, "created_at": int(time.time()), "data": answer})
        except TypeError as error:
            raise call.failed(ValueError(f"its answer does not fit into JSON: {error}")) from error

    try:
        sequences, outputs = await serving.compute(request, service, rendered)
        return await serving.in_pool("encode", answered)
    except PluginFailed as error:
        log.error("%s", error.message, exc_info=error.__cause__)  # where in the plugin it was
        raise


async def answer_vectors(
    serving: Serving,
    request: Request,
    body: PoolingFields,
    task: str,
    params: PoolingParams | None = None,
    *,
    also: tuple[str, ...] = (),
    prefix: str,
    kind: str,
    field: str,
) -> Response:
    """The whole trip of a request whose answer is a vector, a matrix or a sparse vector per input, or several."""
    service = serving.find(body.model)
    body.refuse_media()
    params = params or PoolingParams(
        use_activation=body.use_activation,
        dimensions=body.dimensions,
        top_k=body.top_k,
        late_chunking_params=body.late(),
    )
    if also and params.late_chunking_params is not None:
        raise BadRequest(
            f"late chunking is for the task 'token_embed' alone, not for {[task, *also]}", param="late_chunking_params"
        )
    applied = body.applied(service.renderer.prompts)
    for name in also:
        check_task(name, service.info.tasks)
    small = body if isinstance(body, TypedFields) and body.vector_types() else None
    ranges: list[Ranges | None] = []

    def rendered() -> list[Sequence]:
        sequences = render(serving, service, body, task, params, applied)
        if small is not None:
            ranges.append(small.ranges(service, (task, *also), params))
        if (also or task == "sparse") and body.encoding_format != "float":
            raise BadRequest(
                f"sparse embeddings and several kinds at once have only the encoding_format 'float', "
                f"got {body.encoding_format!r}",
                param="encoding_format",
            )
        return [replace(sequence, also=also) for sequence in sequences] if also else sequences

    sequences, outputs = await serving.compute(request, service, rendered, is_plain=body.conversations() is None)
    head = answers.head(serving, request, body, prefix, sequences, applied)
    if also or any(output.indices is not None for output in outputs):
        return await serving.in_pool(
            "encode", lambda: _several(service, body, head, outputs, task, kind, field, small, ranges)
        )
    vectors = [output.data for output in outputs]

    def encode() -> Response:
        if small is not None:
            values = small.values(vectors, *ranges)
            return json_response(
                with_data(head, [{"index": i, "object": kind, field: own} for i, own in enumerate(values)])
            )
        return vectors_response(
            head,
            vectors,
            kind=kind,
            field=field,
            encoding_format=body.encoding_format,
            embed_dtype=body.embed_dtype,
            endianness=body.endianness,
            beside=[{"late_chunking": s.late_chunking} for s in sequences] if params.late_chunking_params else None,
        )

    if sum(v.size for v in vectors) > LARGE:
        return await serving.in_pool("encode", encode)
    with metrics.stage("encode").time():
        return encode()


def _several(
    service: Service,
    body: PoolingFields,
    head: dict[str, Any],
    outputs: list[Output],
    task: str,
    kind: str,
    field: str,
    small: TypedFields | None,
    ranges: list[Ranges | None],
) -> Response:
    """An answer with sparse embeddings, or with several kinds; of several, each is under its name."""

    def shown(output: Output) -> Any:
        return answers.value(output, service, return_tokens=body.return_tokens)

    dense = [output if task == "embed" else output.others.get("embed") for output in outputs]
    forms = small.values([own.data for own in dense if own is not None], *ranges) if small is not None else None
    data = []
    for i, output in enumerate(outputs):
        values = {task: shown(output), **{name: shown(other) for name, other in output.others.items()}}
        if forms is not None:
            values["embed"] = forms[i]
        content = values[task] if not output.others else {KINDS_OF_TASKS[name]: own for name, own in values.items()}
        data.append({"index": i, "object": kind, field: content})
    return json_response(with_data(head, data))
