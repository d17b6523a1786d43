"""The dialect of Text Embeddings Inference and of Hugging Face's hub: `{"inputs"}` in, bare lists out.

The hub names a model in the path (`/models/NAME`, `/models/NAME/pipeline/TASK`). `POST /` answers as the model is made
for: with vectors, sparse vectors, classes or entities.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

import cenote
from cenote import metrics
from cenote.core import PoolingParams
from cenote.errors import BadRequest, TaskNotOffered
from cenote.pipeline import operations
from cenote.pipeline.entities import softmax
from cenote.pipeline.options import TextOptions
from cenote.pipeline.tokenizing import FastTokenizer
from cenote.server.admission import RENDER_THREADS
from cenote.server.dialects.home import home
from cenote.server.routes import Dialect, Route
from cenote.server.wire import answers
from cenote.server.wire.encoding import json_response, typed
from cenote.server.wire.entities import EntityFields, entities_of
from cenote.server.wire.fields import Body, Many, Queued, Some, TokenIds, first_of, prompts_in
from cenote.server.wire.pairs import DIRECTIONS, Direction, RankingFields, rank
from cenote.server.wire.plain import encoded
from cenote.tensors.similarity import pairwise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as Seq

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import ModelInfo, Output, Sequence
    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Classes, Ranked
    from cenote.pipeline.pipeline import Service
    from cenote.pipeline.rendering import Renderer
    from cenote.server.errors import Fault
    from cenote.server.routes import Handler
    from cenote.server.serving import Serving
    from cenote.server.wire.entities import Forms
    from cenote.server.wire.fields import Lengths
    from cenote.tensors.similarity import Array

Texts = TokenIds | str | Many[str | TokenIds]
Classified = str | Many[str] | Many[Many[str]]


class Sentences(BaseModel):
    """A sentence, and those that are compared with it."""

    source_sentence: str
    sentences: Some[str]


class TeiFields(Queued):
    """Fields of every request. The hub's clients put some of them into `parameters`."""

    model: str | None = None
    truncate: bool | None = Field(None, description="cut what is too long; default: as the server does")
    truncation_direction: Direction | None = Field(None, description="end that is cut; default: the tokenizer's")
    parameters: Any = Field(None, description="object of further fields, where the hub's clients put them")
    _characters: int = PrivateAttr(0)

    @classmethod
    def check_lengths(cls, values: Any, lengths: Lengths) -> None:
        """See `Body.check_lengths`."""
        super().check_lengths(values, lengths)
        if isinstance(values, dict):
            super().check_lengths(values.get("parameters"), lengths)

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, values: Any) -> Any:
        """Put the fields of `parameters` beside the others."""
        parameters = values.get("parameters") if isinstance(values, dict) else None
        return {**parameters, **values} if isinstance(parameters, dict) else values

    @model_validator(mode="after")
    def _count(self) -> TeiFields:
        self._characters = _characters(getattr(self, "inputs", ""))
        return self

    @property
    def characters(self) -> int:
        """Characters of all texts."""
        return self._characters

    def text_options(self) -> TextOptions:
        """Return how text becomes ids. What is cut is content: special tokens stay at both ends."""
        length = -1 if self.truncate else None
        return TextOptions(length, content_side=DIRECTIONS[self.truncation_direction], whole=self.truncate is False)


def _characters(value: Any) -> int:
    """Return the characters of all texts in `value`."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Sentences):
        return _characters([value.source_sentence, *value.sentences])
    return sum(map(_characters, value)) if isinstance(value, list) else 0


class Prompted(TeiFields):
    """Fields of requests whose texts may have a prompt."""

    prompt_name: str | None = Field(None, description="one of the model's prompts, before every text")

    def prompted(self, renderer: Renderer) -> TextOptions:
        """Return how text becomes ids, behind a prompt.

        Raises:
            BadRequest: the model has no such prompt.
        """
        return self.text_options()._replace(prompt=renderer.prompts.choose(name=self.prompt_name))


class TeiEmbedRequest(Prompted):
    """Body of `POST /embed`: texts, token ids, or both."""

    inputs: Texts
    normalize: bool = True
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32")

    def prompts(self) -> list[Any]:
        """Return the inputs as a list of prompts."""
        return prompts_in(self.inputs)


class PredictRequest(TeiFields):
    """Body of `POST /predict`: a text, a pair of texts (`["a", "b"]`), or a list of lists of one or two texts."""

    inputs: Classified
    raw_scores: bool = False
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(None, description="default: the model's")
    top_k: int | None = Field(None, ge=1, description="number of classes")
    candidate_labels: None = Field(None, description="refused")

    @field_validator("candidate_labels", mode="before")
    @classmethod
    def _own_labels(cls, labels: Any) -> None:
        if labels is not None:
            raise PydanticCustomError(
                "candidate_labels",
                "`candidate_labels` ask for zero-shot classification, which is not served: a classifier answers with "
                "labels of its own; leave them out.",
                {"param": "candidate_labels"},
            )

    def params(self) -> PoolingParams:
        """Return the parameters of the task."""
        is_raw = self.raw_scores or self.function_to_apply is not None
        return PoolingParams(use_activation=False if is_raw else None)


class EntitiesRequest(TeiFields, EntityFields):
    """Body of a request for the named entities of texts."""

    inputs: str | Some[str]
    aggregation_strategy: str = Field("simple", description="none, simple, first, average or max")
    stride: None = Field(None, description="refused")

    @field_validator("stride", mode="before")
    @classmethod
    def _one_window(cls, stride: Any) -> None:
        if stride is not None:
            raise PydanticCustomError(
                "stride",
                "`stride` asks for a long text in windows that overlap, and a text is read in one piece here; leave it "
                "out, and divide long texts.",
                {"param": "stride"},
            )


class SimilarityRequest(Prompted):
    """Body of `POST /similarity`."""

    inputs: Sentences


class RootRequest(TeiEmbedRequest, PredictRequest, EntitiesRequest, SimilarityRequest):
    """Body of `POST /`, for any kind of model."""

    inputs: Sentences | Texts | Many[Many[str]]  # type: ignore[assignment]


class TeiRerankRequest(RankingFields):
    """Body of `POST /rerank` with `texts`."""

    query: str
    texts: Many[str]
    _characters: int = PrivateAttr(0)

    @model_validator(mode="after")
    def _counted(self) -> TeiRerankRequest:
        self._characters = len(self.query) * len(self.texts) + _characters(self.texts)
        return self

    @property
    def characters(self) -> int:
        """Characters of all pairs."""
        return self._characters


class TeiTokenizeRequest(Body):
    """Body of `POST /tokenize` with `inputs`."""

    model: str | None = None
    inputs: str | Many[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Body):
    """Body of `POST /decode`: token ids, or lists of them."""

    model: str | None = None
    ids: TokenIds | Many[TokenIds]
    skip_special_tokens: bool = True


def with_times(handler: Handler) -> Handler:
    """Return a handler that tells in headers what a request took."""

    @wraps(handler)
    async def answer(serving: Serving, request: Request, body: Any) -> Response:
        began = time.monotonic()
        trip = metrics.trip.get() or metrics.Trip()
        token = metrics.trip.set(trip)
        try:
            response = await handler(serving, request, body)
        finally:
            metrics.trip.reset(token)
        total = _milliseconds(time.monotonic() - began)
        headers = {
            "x-compute-type": serving.find(body.model).info.report.device,
            "x-compute-time": total,
            "x-compute-characters": str(body.characters),
            "x-compute-tokens": str(request.state.tokens),
            "x-total-time": total,
            "x-tokenization-time": _milliseconds(request.state.render_seconds),
            "x-queue-time": _milliseconds(_seconds(trip, "queue")),
            "x-inference-time": _milliseconds(_seconds(trip, "forward")),
        }
        response.headers.update(headers)
        return response

    return answer


def _seconds(trip: metrics.Trip, name: str) -> float:
    """Return the time that a request spent in a stage."""
    return sum(stage.ended - stage.began for stage in trip.stages if stage.name == name)


def _milliseconds(seconds: float) -> str:
    return str(round(1000 * seconds))


@with_times
async def embed(serving: Serving, request: Request, body: TeiEmbedRequest) -> Response:
    """One vector per input, normalised unless `normalize` is false."""
    params = PoolingParams(use_activation=body.normalize, dimensions=body.dimensions)

    def encode(outputs: list[Output]) -> Response:
        vectors = [output.data for output in outputs]
        if body.encoding_format == "base64":
            return json_response(typed(vectors, ["base64"])["base64"])
        return json_response([*map(np.ascontiguousarray, vectors)])

    return await _encoded(serving, request, body, "embed", params, encode)


@with_times
async def embed_all(serving: Serving, request: Request, body: TeiEmbedRequest) -> Response:
    """One vector per token of each input, special tokens included; not normalised."""

    def encode(outputs: list[Output]) -> Response:
        return json_response([np.ascontiguousarray(output.data) for output in outputs])

    params = PoolingParams(use_activation=False, dimensions=body.dimensions)
    return await _encoded(serving, request, body, "token_embed", params, encode)


@with_times
async def embed_sparse(serving: Serving, request: Request, body: TeiEmbedRequest) -> Response:
    """The entries of the vocabulary with a weight, per input."""

    def encode(outputs: list[Output]) -> Response:
        return json_response([_weights(output) for output in outputs])

    return await _encoded(serving, request, body, "sparse", PoolingParams(), encode, is_slow=True)


def _weights(output: Output) -> list[dict[str, Any]]:
    assert output.indices is not None
    return [{"index": i, "value": value} for i, value in zip(output.indices.tolist(), output.data, strict=True)]


async def _encoded(
    serving: Serving,
    request: Request,
    body: TeiEmbedRequest,
    task: str,
    params: PoolingParams,
    encode: Callable[[list[Output]], Response],
    *,
    is_slow: bool = False,
) -> Response:
    """Answer a request for the results of a task, whose encoding may be slow."""
    service = serving.find(body.model)
    options = body.prompted(service.renderer)
    return await encoded(
        serving, request, service, body, body.prompts(), task, params, options, encode, is_slow=is_slow
    )


@with_times
async def predict(serving: Serving, request: Request, body: PredictRequest) -> Response:
    """The classes of a text or a pair by falling score; a list of such lists for a list of lists."""
    is_one = isinstance(body.inputs, str) or isinstance(first_of(body.inputs), str)
    return await _classified(serving, request, body, [body.inputs] if is_one else body.inputs, is_flat=is_one)


@with_times
async def text_classification(serving: Serving, request: Request, body: PredictRequest) -> Response:
    """A list of classes by falling score for each input, also for one; a list of texts is not a pair here."""
    is_one = isinstance(body.inputs, str)
    return await _classified(serving, request, body, [body.inputs] if is_one else body.inputs)


async def _classified(
    serving: Serving, request: Request, body: PredictRequest, inputs: Any, *, is_flat: bool = False
) -> Response:
    """Answer a request for classes.

    Args:
        inputs: texts, or lists of one or two texts.
        is_flat: the classes of the first input are the answer.
    """
    service = serving.find(body.model)
    serving.check_count(len(inputs))

    def make() -> Job[Response]:
        prompts = [_prompt(item) for item in inputs]
        job = operations.classify(service, prompts, body.params(), body.text_options())

        def encode(classified: list[Classes]) -> Response:
            entries = [_classes(classes.values, service.info, body) for classes in classified]
            return json_response(entries[0] if is_flat else entries)

        return replace(job, is_slow=True).then(encode)

    return await serving.answer(request, service, body, make)


def _prompt(item: Any) -> Any:
    """Return a text, or a pair of texts, as a prompt.

    Raises:
        BadRequest: it is neither.
    """
    texts = [item] if isinstance(item, str) else item
    if len(texts) not in (1, 2) or not isinstance(texts[0], str):
        raise BadRequest(
            f"got an input of {len(texts)} parts; expected a text, or a list of one or two texts; "
            'several texts are a list of lists: [["a"], ["b"]]',
            param="inputs",
        )
    return texts[0] if len(texts) == 1 else dict(zip(("text", "text_pair"), texts, strict=True))


def _sigmoid(values: Array) -> Array:
    probabilities: Array = np.reciprocal(1 + np.exp(-values))
    return probabilities


FUNCTIONS: dict[str, Callable[[Array], Array]] = {"softmax": softmax, "sigmoid": _sigmoid, "none": np.asarray}
"""Functions of logits, by the names of Transformers' pipeline."""


def _classes(values: Array, info: ModelInfo, body: PredictRequest) -> list[dict[str, Any]]:
    values = FUNCTIONS[body.function_to_apply or "none"](values)
    return answers.classes(info, values, body.top_k)


@with_times
async def token_classification(serving: Serving, request: Request, body: EntitiesRequest) -> Response:
    """The named entities of a text, or a list of them for each text of a list."""

    def encode(forms: Forms, _: Seq[Sequence]) -> Response:
        return json_response(forms[0] if isinstance(body.inputs, str) else forms)

    return await entities_of(serving, request, body, body.inputs, body.text_options(), encode)


@with_times
async def similarity(serving: Serving, request: Request, body: SimilarityRequest) -> Response:
    """The cosine of a sentence with each of several others."""
    service = serving.find(body.model)
    options = body.prompted(service.renderer)
    texts = [body.inputs.source_sentence, *body.inputs.sentences]

    def encode(outputs: list[Output]) -> Response:
        source, *others = [output.data for output in outputs]
        return json_response(pairwise([source] * len(others), others, "cosine"))

    return await encoded(
        serving, request, service, body, texts, "embed", PoolingParams(), options, encode, is_slow=True
    )


@with_times
async def rerank(serving: Serving, request: Request, body: TeiRerankRequest) -> Response:
    """The texts by falling relevance to the query, as a bare list."""
    return await in_order(serving, request, body, (body.query, body.texts))


async def in_order(serving: Serving, request: Request, body: RankingFields, sides: Any) -> Response:
    """Answer with the documents by falling relevance to the query, as a bare list; see `rank`."""

    def form(head: dict[str, Any], ranked: list[Ranked], texts: list[str]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{"index": rank.index, "score": rank.score} for rank in ranked]
        if body.shows():
            results = [result | {"text": texts[result["index"]]} for result in results]
        return results

    return await rank(serving, request, body, sides, form)


OF_TASKS: dict[str, Handler] = {
    "embed": embed,
    "token_embed": embed_all,
    "sparse": embed_sparse,
    "classify": text_classification,
    "token_classify": token_classification,
}
"""What `POST /` answers with, by the default task of the model."""


async def root(serving: Serving, request: Request, body: RootRequest) -> Response:
    """The result of the model's default task, or the similarity of sentences."""
    if isinstance(body.inputs, Sentences):
        body.model = body.model or serving.models.made_for("embed")
        return await similarity(serving, request, body)
    handler = OF_TASKS[serving.find(body.model).info.default_task]
    return await handler(serving, request, body)


async def tokenize(serving: Serving, request: Request, body: TeiTokenizeRequest) -> Response:
    """The tokens of each text, with their characters."""
    renderer = serving.find(body.model).renderer
    prompt = renderer.prompts.choose(name=body.prompt_name)

    def tokens() -> Response:
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        prompted = [prompt.text + text for text in texts]
        for text in prompted:
            serving.check_size(text, "inputs")
        return json_response([[*_tokens(renderer, text, special=body.add_special_tokens)] for text in prompted])

    return await serving.rendered(request, tokens)


def _tokens(renderer: Renderer, text: str, *, special: bool) -> Iterator[dict[str, Any]]:
    """Yield the tokens of a text. A slow tokenizer knows no characters, so their text is the vocabulary's."""
    if not isinstance(renderer.backend, FastTokenizer):
        ids = renderer.tokenize(text, add_special_tokens=special)
        specials = frozenset(renderer.tokenizer.all_special_ids)
        for number, entry in zip(ids, renderer.token_strings(ids), strict=True):
            yield _token(number, entry, number in specials)
        return
    (encoding,) = renderer.backend.encodings([text], special=special)
    columns = (encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets)
    for number, entry, mark, (start, stop) in zip(*columns, strict=True):
        yield _token(number, entry, True) if mark else _token(number, text[start:stop], False, start, stop)


def _token(number: int, text: str, special: bool, start: int | None = None, stop: int | None = None) -> dict[str, Any]:
    return {"id": number, "text": text, "special": special, "start": start, "stop": stop}


async def decode(serving: Serving, request: Request, body: DecodeRequest) -> Response:
    """The text of each list of token ids."""
    renderer = serving.find(body.model).renderer

    def texts() -> Response:
        lists: Any = body.ids if isinstance(first_of(body.ids), list) else [body.ids]
        skip = body.skip_special_tokens
        return json_response([renderer.detokenize(ids, skip_special_tokens=skip) for ids in lists])

    return await serving.rendered(request, texts)


async def info(serving: Serving, request: Request, body: None) -> Response:
    """The model, in the words of Text Embeddings Inference."""
    name = request.state.model
    service = serving.find(name)
    report = service.info.report
    return json_response({
        "model_id": serving.name(name),
        "model_sha": report.revision,
        "model_dtype": report.dtype,
        "served_model_name": serving.name(name),
        "model_type": _model_type(service),
        "max_concurrent_requests": UNBOUNDED,
        "max_input_length": service.info.limit(service.info.default_task),
        "max_batch_tokens": report.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": serving.config.max_client_batch_size,
        "auto_truncate": service.renderer.auto_truncate,
        "tokenization_workers": RENDER_THREADS,
        "version": cenote.__version__,
        "sha": None,
        "docker_label": None,
    })  # fmt: skip


UNBOUNDED = (1 << 31) - 1
"""Requests are bounded by the time that they wait, and not in number; clients take no null here."""
POOLINGS = {"lasttoken": "last_token"}
"""Names of poolings that differ from ours."""


def _model_type(service: Service) -> dict[str, Any]:
    """Return the kind of a model: embedding, classifier or reranker."""
    info = service.info
    labels = answers.labels(info)
    numbers = range(len(labels))
    names = {
        "id2label": dict(zip(map(str, numbers), labels, strict=True)),
        "label2id": dict(zip(labels, numbers, strict=True)),
    }
    if answers.is_ranker(info):
        return {"reranker": names}
    if info.default_task in ("classify", "token_classify"):
        return {"classifier": names}
    pooling = "splade" if info.default_task == "sparse" else info.report.pooling
    return {"embedding": {"pooling": POOLINGS.get(pooling, pooling)}}


ERROR_TYPES = {401: "Unauthorized", 429: "Overloaded", 500: "Backend", 503: "Unhealthy"}


def error(fault: Fault) -> dict[str, Any]:
    """Return the body of an error, whose clients read `error` as a text."""
    kind = ERROR_TYPES.get(fault.status, "Validation")
    return {"error": fault.message, "error_type": "Backend" if isinstance(fault.error, TaskNotOffered) else kind}


RANKED = frozenset({"texts"})
GIVEN = frozenset({"inputs"})
DIALECT = Dialect(
    "Text Embeddings Inference",
    (
        Route("/", home, method="GET", is_described=False, is_open=True),
        Route("/", root, RootRequest),
        Route("/", rerank, TeiRerankRequest, is_described=False, marks=RANKED, purpose="score"),
        Route("/embed", embed, TeiEmbedRequest, aliases=("/pipeline/feature-extraction",), purpose="embed"),
        Route("/embed_all", embed_all, TeiEmbedRequest, purpose="token_embed"),
        Route("/embed_sparse", embed_sparse, TeiEmbedRequest, purpose="sparse"),
        Route("/predict", predict, PredictRequest, purpose="classify"),
        Route(
            "/pipeline/text-classification",
            text_classification,
            PredictRequest,
            is_described=False,
            purpose="classify",
        ),
        Route(
            "/pipeline/token-classification",
            token_classification,
            EntitiesRequest,
            is_described=False,
            purpose="token_classify",
        ),
        Route(
            "/similarity", similarity, SimilarityRequest, aliases=("/pipeline/sentence-similarity",), purpose="embed"
        ),
        Route(
            "/rerank",
            rerank,
            TeiRerankRequest,
            aliases=("/pipeline/text-ranking", "/reranking", "/v1/reranking"),
            is_described=False,
            marks=RANKED,
            purpose="score",
        ),
        Route("/tokenize", tokenize, TeiTokenizeRequest, is_described=False, marks=GIVEN),
        Route("/decode", decode, DecodeRequest),
        Route("/info", info, method="GET"),
    ),
    error,
    prefix="tei",
)
