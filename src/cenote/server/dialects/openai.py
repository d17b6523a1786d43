"""OpenAI's dialect, with vLLM's extensions, under Azure's paths too: `/v1/embeddings` and `/v1/models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cenote.core import ModelInfo, PoolingParams
from cenote.errors import BadRequest
from cenote.pipeline import operations
from cenote.pipeline.prompts import Applied, Prompts
from cenote.server.routes import Dialect, Route
from cenote.server.wire import answers, items, sizes
from cenote.server.wire.encoding import entries, json_response, vectors_response, with_data
from cenote.server.wire.fields import Many, Some, first_of
from cenote.server.wire.pooling import answer_vectors
from cenote.server.wire.vectors import TypedFields
from cenote.tasks import KINDS, TASKS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.pipeline.job import Job
    from cenote.pipeline.pipeline import Service
    from cenote.server.serving import Serving
    from cenote.server.wire.fields import Conversation
    from cenote.tensors.similarity import Array


class EmbeddingRequest(TypedFields):
    """Body of `POST /v1/embeddings`: `input` (text, ids, or lists of them) or `messages`."""

    output_dimension: int | None = Field(None, description="as `dimensions` (Voyage)")
    task: str | None = Field(None, description="embed, token_embed or sparse; or, as Jina has it, an `input_type`")

    modality: str | Many[str] | None = Field(
        None, description="text, image (inputs are URLs) or text_image; or one for each input (NIM, Infinity)"
    )
    lora_path: str | Some[str | None] | None = Field(None, description="name of an adapter of the model (SGLang)")
    normalized: bool | None = Field(None, description="as `use_activation` (Jina, Mixedbread)")
    return_multivector: Literal[False] = Field(False, description="false (Jina)")

    @model_validator(mode="before")
    @classmethod
    def _objects(cls, values: Any) -> Any:
        """Take inputs that are objects as texts, or where one has a picture as content parts; messages have a role."""
        if not isinstance(values, dict) or values.get("input") is None:
            return values
        inputs = items.read(values["input"], values.get("modality"))
        return values if inputs is values["input"] else {**values, "input": inputs}

    @model_validator(mode="after")
    def _one_activation(self) -> EmbeddingRequest:
        if self.use_activation is None and self.normalized is not None:
            self.use_activation = self.normalized
        return self

    @property
    def is_plain(self) -> bool:
        """See `Inputs.is_plain`."""
        return super().is_plain and not isinstance(first_of(self.input), dict)

    def conversations(self) -> list[Conversation] | None:
        """See `Inputs.conversations`; inputs of content parts have no role."""
        conversations = super().conversations()
        first = first_of(first_of(conversations))
        return None if items.is_object(first) and self.messages is None else conversations

    @model_validator(mode="after")
    def _one_dimension(self) -> EmbeddingRequest:
        if self.output_dimension is None:
            return self
        if self.dimensions not in (None, self.output_dimension):
            raise PydanticCustomError(
                "dimensions",
                "`dimensions` and `output_dimension` are the same; only one of them can be given.",
                {"param": "output_dimension"},
            )
        self.dimensions = self.output_dimension
        return self

    @model_validator(mode="after")
    def _one_adapter(self) -> EmbeddingRequest:
        paths = self.lora_path if isinstance(self.lora_path, list) else [self.lora_path]
        if len({*paths}) > 1:
            raise PydanticCustomError(
                "lora_path",
                "`lora_path` names several adapters; a request runs with one: send one request for each.",
                {"param": "lora_path"},
            )
        return self

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that the request runs with."""
        return self.lora_path[0] if isinstance(self.lora_path, list) else self.lora_path

    def tasks(self, info: ModelInfo) -> tuple[str, ...]:
        """Return the tasks of the request, the first one being that of `embedding`."""
        types = self.embedding_types or ()
        if not KINDS.keys().isdisjoint(types):  # beside kinds, forms of a vector mean the dense one
            return tuple(dict.fromkeys(KINDS.get(name, "embed") for name in types))
        if self.task in TASKS:
            return (str(self.task),)
        if self.late_chunking_params is not None:
            return ("token_embed",)
        if self.vector_types():
            return ("embed",)
        return (info.vector_task,)

    def applied(self, prompts: Prompts) -> Applied:
        """See `PoolingFields.applied`."""
        as_type = None if self.task in TASKS else self.task
        return prompts.choose(prompt=self.prompt, name=self.prompt_name, input_type=self.input_type or as_type)


async def embeddings(serving: Serving, request: Request, body: EmbeddingRequest) -> Response:
    """One vector per input; of search models also token vectors and sparse weights."""
    if body.late_chunking:
        return await _joined(serving, request, body)
    task, *also = body.tasks(serving.find(body.model).info)
    params = PoolingParams(
        use_activation=body.use_activation,
        dimensions=body.dimensions,
        top_k=body.top_k,
        late_chunking_params=body.late(),
    )
    return await answer_vectors(
        serving, request, body, task, params, also=tuple(also), prefix="embd", kind="embedding", field="embedding"
    )


async def _joined(serving: Serving, request: Request, body: EmbeddingRequest) -> Response:
    """Answer a request whose inputs are chunks of one text, as Jina has it."""
    service = serving.find(body.model)
    body.refuse_media()
    if body.conversations() is not None or body.late_chunking_params is not None:
        raise BadRequest(
            "`late_chunking` takes the chunks of one text in `input`, neither messages nor `late_chunking_params`",
            param="late_chunking",
        )
    applied = body.applied(service.renderer.prompts)
    params = PoolingParams(use_activation=body.use_activation, dimensions=body.dimensions)

    def make() -> Job[Response]:
        chunks, options = answers.prompts_of(serving, service, body, applied)
        job = operations.embed_chunks(service, [chunks], params, options)
        count = sizes.numbers(service.info, job.sequences)
        sizes.check(serving.config.max_response_bytes, count, body.number_bytes)
        form = body.form(service, ("embed",), params)

        def encode(documents: list[Array]) -> Response:
            head = answers.head(serving, request, body, "embd", job.sequences, applied)
            vectors = [*documents[0]]
            if form is not None:
                return json_response(with_data(head, entries("embedding", "embedding", form(vectors))))
            return vectors_response(
                head,
                vectors,
                kind="embedding",
                field="embedding",
                encoding_format=body.encoding_format,
                embed_dtype=body.embed_dtype,
                endianness=body.endianness,
            )

        return job.then(encode)

    return await serving.answer(request, service, body, make)


async def models(serving: Serving, request: Request, body: None) -> Response:
    """One card per name under which a model is served, and per adapter that requests choose by name."""
    names = [(view, name) for view in serving.models.views for name in view.names]
    cards = [_card(serving, *named) for named in names]
    return json_response({"object": "list", "data": cards, "models": [_cohere_card(*named) for named in names]})


async def model(serving: Serving, request: Request, body: None) -> Response:
    """The card of a model, with the keys that clients of Cohere and of the hub read."""
    name = request.state.model
    service = serving.find(name)
    return json_response({
        **_card(serving, service, name),
        **_cohere_card(service, name),
        "modelId": name,
        "sha": service.info.report.revision,
        "pipeline_tag": _pipeline(service.info),
    })  # fmt: skip


PIPELINES = {"classify": "text-classification", "token_classify": "token-classification"}
"""The hub's names of pipelines, by our tasks; of others it has one."""


def _pipeline(info: ModelInfo) -> str:
    return "text-ranking" if answers.is_ranker(info) else PIPELINES.get(info.default_task, "feature-extraction")


def _cohere_card(service: Service, name: str) -> dict[str, Any]:
    endpoints, length = answers.capabilities(service.info), service.info.max_model_len
    return {"name": name, "endpoints": endpoints, "finetuned": False, "context_length": length}


def _card(serving: Serving, service: Service, name: str) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": serving.started,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": serving.started,
        "owned_by": "cenote",
        "root": service.root or service.info.report.source,
        "parent": service.parent,
        "max_model_len": service.info.max_model_len,
        "permission": [permission],
    }


DIALECT = Dialect(
    "OpenAI",
    (
        Route(
            "/v1/embeddings",
            embeddings,
            EmbeddingRequest,
            aliases=("/embeddings", "/deployments/{model}/embeddings", "/v1/deployments/{model}/embeddings"),
            purpose="vectors",
        ),
        Route("/v1/models", models, method="GET", aliases=("/models",)),
        Route("/v1/models/{model}", model, method="GET"),
    ),
    prefix="openai",
)
