"""vLLM's own routes: `/pooling`, `/classify`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from cenote.core import PoolingParams
from cenote.errors import BadRequest, PluginFailed
from cenote.functions import coalesce, optional
from cenote.pipeline import operations
from cenote.pipeline.options import ChatOptions
from cenote.server.routes import Dialect, Route
from cenote.server.serving import request_id
from cenote.server.wire import answers
from cenote.server.wire.encoding import foreign_response, json_response, with_data
from cenote.server.wire.fields import (
    Body,
    Chat,
    Conversation,
    Inputs,
    Many,
    PoolingFields,
    Some,
    TextInput,
    first_of,
)
from cenote.server.wire.pooling import answer_vectors
from cenote.tasks import PLUGIN

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.inputs import Illustrated
    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Classes
    from cenote.pipeline.pipeline import Service
    from cenote.server.serving import Serving

log = logging.getLogger(__name__)


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
        if isinstance(self.input, PairInput):
            return [self.input.model_dump()]
        prompts = super().prompts()
        if isinstance(first_of(prompts), PairInput):
            return [pair.model_dump() for pair in prompts]
        return prompts


class TokenizeRequest(Body, Chat):
    """Body of `POST /tokenize`: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Conversation | None = None
    add_generation_prompt: bool | None = Field(None, description="default: true for `messages`")  # type: ignore[assignment]
    return_token_strs: bool | None = False
    tools: list[dict[str, Any]] | None = Field(None, description="variable of the chat template")
    mm_processor_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError(
                "input", "Exactly one of `prompt` and `messages` must be given.", {"param": "prompt"}
            )
        return self

    def tokenized_chat(self, *, trust_template: bool) -> ChatOptions:
        """Return how messages become text: by default with the beginning of the model's answer.

        Raises:
            BadRequest: the request brings a template, and the server does not trust those.
        """
        chat = self.chat_options(trust_template=trust_template)
        opens = self.add_generation_prompt
        if opens is None:
            opens = not self.continue_final_message
        tools = {"tools": self.tools} if self.tools else {}
        return ChatOptions(opens, chat.continue_final_message, chat.template, {**chat.kwargs, **tools})


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Many[Annotated[int, Field(ge=0, lt=2**63)]]


async def pooling(serving: Serving, request: Request, body: PoolingRequest) -> Response:
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
        returned_token_ids=optional(tuple, body.returned_token_ids),
        late_chunking_params=body.late(),
    )
    return await answer_vectors(serving, request, body, task, params, prefix="pooling", kind="pooling", field="data")


async def classify(serving: Serving, request: Request, body: ClassifyRequest) -> Response:
    """The value of every class per input, and the name of the largest."""
    service = serving.find(body.model)
    body.check_media(service)
    params = PoolingParams(use_activation=body.use_activation)

    def make() -> Job[Response]:
        prompts, options = answers.prompts_of(serving, service, body)
        job = operations.classify(service, prompts, params, options)

        def encode(inputs: list[Classes]) -> Response:
            data = [
                {"index": i, "label": classes.label, "probs": classes.values, "num_classes": len(classes.values)}
                for i, classes in enumerate(inputs)
            ]
            return json_response(with_data(answers.head(serving, request, body, "classify", job.sequences), data))

        return job.then(encode)

    is_short = answers.is_short(serving, request, service, body)
    return await serving.answer(request, service, body, make, is_short=is_short)


async def tokenize(serving: Serving, request: Request, body: TokenizeRequest) -> Response:
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

    return await serving.rendered(request, answered)


async def detokenize(serving: Serving, request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids, as vLLM, Cohere and llama.cpp call it: a body does not tell which of them is meant."""
    service = serving.find(body.model)
    text = await serving.rendered(request, lambda: service.renderer.detokenize(body.tokens))
    return json_response({"prompt": text, "text": text, "content": text})


def _tokens(serving: Serving, service: Service, body: TokenizeRequest) -> list[int]:
    """Return the token ids of a request.

    Raises:
        BadRequest: the text is longer than the server tokenises, or the chat template refuses the messages.
    """
    special = body.add_special_tokens
    if body.messages is None:
        content: str | Illustrated = body.prompt or ""
        special = coalesce(special, True)
    else:
        chat = body.tokenized_chat(trust_template=serving.config.trust_request_chat_template)
        content = service.renderer.conversations.prompt(body.messages, chat, body.mm_processor_kwargs)
    text = content if isinstance(content, str) else "".join(content.texts)
    serving.check_size(text, "prompt" if body.messages is None else "messages")
    if isinstance(content, str):
        return service.renderer.tokenize(content, add_special_tokens=bool(special))
    return service.renderer.expanded(content, add_special_tokens=bool(special))


async def answer_plugin(serving: Serving, request: Request, body: PoolingRequest) -> Response:
    """Answer a request whose input and answer are an IO-processor plugin's.

    Raises:
        BadRequest: there is no plugin, or it refuses the data.
        PluginFailed: it fails.
    """
    service = serving.find(body.model)
    plugin = operations.check_plugin(service, body.task)
    if body.input is not None or body.messages is not None:
        raise BadRequest("a request for a plugin has `data`, and neither `input` nor `messages`", param="data")
    body.refuse_media()
    number = f"pooling-{request_id(request, body.request_id)}"
    options = body.options(is_chat=False)

    def encode(answer: Any) -> Response:
        try:
            return foreign_response({"request_id": number, "created_at": int(time.time()), "data": answer})
        except TypeError as error:
            raise plugin.failed(ValueError(f"its answer does not fit into JSON: {error}")) from error

    check_count = partial(serving.check_count, param="data")

    def make() -> Job[Response]:
        job = operations.plugin(service, body.data, number, options, check_count=check_count)
        return job.then(encode)

    try:
        return await serving.answer(request, service, body, make)
    except PluginFailed as error:
        log.error("%s", error.message, exc_info=error.__cause__)  # where in the plugin it was
        raise


async def tokenizer_info(serving: Serving, request: Request, body: None) -> Response:
    """Class, settings and chat template of the first model's tokenizer, if the operator wants them told."""
    if not serving.config.enable_tokenizer_info_endpoint:
        raise HTTPException(404, "Not Found")
    tokenizer = serving.find(None).renderer.tokenizer
    settings = {**tokenizer.init_kwargs, **tokenizer.special_tokens_map}
    told = {name: settings[name] for name in settings if isinstance(settings[name], PLAIN) and name not in PATHS}
    return json_response(
        {**told, "tokenizer_class": type(tokenizer).__name__, "chat_template": tokenizer.chat_template}
    )


PLAIN = (str, int, float, type(None))
"""Types of settings of a tokenizer that are told; others are objects of Transformers."""
PATHS = {"name_or_path", "tokenizer_file", "vocab_file", "merges_file", "is_local", "local_files_only"}
"""Settings that lead to files of the server, or say how these were found."""

DIALECT = Dialect(
    "vLLM",
    (
        Route("/pooling", pooling, PoolingRequest),
        Route("/classify", classify, ClassifyRequest, aliases=("/v1/classify",), purpose="classify"),
        Route("/tokenize", tokenize, TokenizeRequest, aliases=("/v1/tokenize",)),
        Route("/detokenize", detokenize, DetokenizeRequest, aliases=("/v1/detokenize",)),
        Route("/tokenizer_info", tokenizer_info, method="GET"),
    ),
    prefix="vllm",
)
