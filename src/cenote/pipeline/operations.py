"""The operations of a model: each checks its arguments and returns a `Job`.

`LLM` and the server both call these functions, so that both refuse the same things in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.core import PoolingParams
from cenote.errors import BadRequest
from cenote.pipeline import listwise
from cenote.pipeline.entities import check_aggregation, check_labels, entities, softmax
from cenote.pipeline.inputs import is_count
from cenote.pipeline.job import Job
from cenote.pipeline.late_chunking import joined
from cenote.pipeline.pairs import CUTS_TEXTS, check_no_template, texts_of
from cenote.pipeline.ranking import SideOutputs, Way, check_pairing, choose, reward_task
from cenote.tasks import PLUGIN, check_named, check_task
from cenote.tensors.similarity import ranking

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from collections.abc import Sequence as Seq

    from cenote.core import Output, Sequence
    from cenote.pipeline.entities import Entity
    from cenote.pipeline.inputs import Pair, Prompt, Side
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.pairs import PairOptions
    from cenote.pipeline.pipeline import Service
    from cenote.pipeline.plugins import Plugin
    from cenote.tensors.similarity import Array

    Params = PoolingParams | Seq[PoolingParams]
    """Parameters for all prompts, or one for each."""

NO_PLUGIN = (
    "No IOProcessor plugin installed. Send a prompt instead of `data`, or name an installed plugin: "
    "--io-processor-plugin NAME, LLM(io_processor_plugin=NAME)."
)
WRONG_TASK = "The 'data' field is only supported for the 'plugin' pooling task."


class Classes(NamedTuple):
    """Classes of one input.

    Attributes:
        values: float32 `[C]`, probabilities or logits.
        label: name of the class with the largest value; `None` if the checkpoint names none.
    """

    values: Array
    label: str | None


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's place among the documents of the request, and its score."""

    index: int
    score: float


def encode(
    service: Service,
    prompts: Seq[Prompt | Pair],
    task: str,
    params: Params,
    options: TextOptions,
    *,
    also: tuple[str, ...] = (),
) -> Job[list[Output]]:
    """Run `task` on each prompt.

    Args:
        service: the model.
        prompts: as `Service.render` takes them.
        task: one of the model's.
        params: of the task.
        options: how text becomes ids.
        also: further tasks of the same forward, whose results are in `Output.others`.

    Raises:
        BadRequest: the model does not offer a task or a parameter, or a prompt cannot be rendered.
    """
    for name in also:
        check_task(name, service.info.tasks)
    if isinstance(params, PoolingParams):
        sequences = service.render(prompts, task, params, options)
    else:
        sequences = _rendered_one_by_one(service, prompts, task, params, options)
    return Job(_also(sequences, also), list)


def embed_chunks(
    service: Service, documents: Seq[Seq[str]], params: PoolingParams, options: TextOptions
) -> Job[list[Array]]:
    """Embed documents that come in chunks: each is read as a whole, and gives a vector per chunk, float32 `[N, D]`.

    Raises:
        BadRequest: as `cenote.pipeline.late_chunking.joined`.
    """
    sequences = joined(service.renderer, documents, params, options)
    return Job(sequences, lambda outputs: [output.data for output in outputs])


def classify(service: Service, prompts: Seq[Prompt | Pair], params: Params, options: TextOptions) -> Job[list[Classes]]:
    """Rate each prompt by every class.

    Raises:
        BadRequest: as `encode`.
    """
    labels = service.info.labels

    def label_of(values: Array) -> str | None:
        return labels[int(values.argmax())] if labels else None

    def finish(outputs: list[Output]) -> list[Classes]:
        return [Classes(output.data, label_of(output.data)) for output in outputs]

    return encode(service, prompts, "classify", params, options).then(finish)


def find_entities(
    service: Service,
    texts: Seq[str],
    options: TextOptions,
    *,
    aggregation: str = "none",
    ignore_labels: Collection[str] = ("O",),
) -> Job[list[list[Entity]]]:
    """Find the named entities of each text, as Transformers' token-classification pipeline: scores are the softmax.

    Raises:
        BadRequest: there is no text, or the aggregation is unknown.
        TaskNotOffered: the model does not label tokens.
    """
    if not texts:
        raise BadRequest("You must pass at least one prompt", param="input")
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest("entities are found in text: prompts must be str, not token ids", param="input")
    check_aggregation(aggregation)
    check_labels(service.info)
    params = PoolingParams(use_activation=False)
    annotated = service.renderer.annotated(texts, "token_classify", params, options)

    def finish(outputs: list[Output]) -> list[list[Entity]]:
        return [
            entities(
                text,
                part.encoding,
                softmax(output.data),
                service.info.labels,
                service.renderer.tokenizer,
                first=part.first,
                aggregation=aggregation,
                ignore_labels=ignore_labels,
            )
            for text, part, output in zip(texts, annotated, outputs, strict=True)
        ]

    return Job([part.sequence for part in annotated], finish, is_slow=True)


def score(
    service: Service,
    queries: Seq[Side],
    documents: Seq[Side],
    params: PoolingParams,
    text_options: TextOptions,
    pair_options: PairOptions,
    score_type: str | None = None,
) -> Job[Array]:
    """Score one query with each document, or each query with its own: float32 `[N]`.

    Raises:
        BadRequest: the lists do not pair up, an option has no effect, a text cannot be rendered, or there are pictures
            and the model takes none, or none in pairs.
        NotScored: the model cannot score.
    """
    check_pairing(queries, documents)
    way = choose(service.info, score_type)
    check_named(params, ("score", way.task))
    if params.late_chunking_params is not None:
        raise BadRequest("late_chunking_params: texts are scored whole, not by chunks", param="late_chunking_params")
    if way.of_lists:
        only_texts = f"{service.info.name} scores as a {way.name}, and takes only texts"
        texts = (texts_of(queries, only_texts), texts_of(documents, only_texts))
        sequences, owners = listwise.render(service, *texts, params, text_options, pair_options)
        return Job(sequences, lambda outputs: listwise.scores(outputs, owners), is_slow=True)
    if way.of_pairs:
        repeated = [*queries] * (len(documents) // len(queries))
        pairs = list(zip(repeated, documents, strict=True))
        sequences = service.pairs.render(pairs, way.task, params, text_options, pair_options)
        count = 0
    else:
        sequences = _rendered_sides(service, way, queries, documents, params, text_options, pair_options)
        count = len(queries)
    similarity, compare = service.info.similarity, way.scores
    assert compare is not None

    def finish(outputs: list[Output]) -> Array:
        return compare(SideOutputs(outputs[:count], outputs[count:]), similarity)

    return Job(sequences, finish, is_slow=True)


def rerank(
    service: Service,
    query: Side,
    documents: Seq[Side],
    top_n: int | None,
    params: PoolingParams,
    text_options: TextOptions,
    pair_options: PairOptions,
    score_type: str | None = None,
) -> Job[list[Ranked]]:
    """Sort documents by falling relevance to the query.

    Args:
        top_n: maximum number of results; 0 or `None` = all.

    Raises:
        BadRequest: `top_n` is negative, or as `score`.
    """
    if top_n is not None and not is_count(top_n):
        raise BadRequest(f"top_n must be a non-negative integer, got {top_n!r}", param="top_n")

    def ranked(scores: Array) -> list[Ranked]:
        return [Ranked(i, float(scores[i])) for i in ranking(scores, top_n)]

    job = score(service, [query], documents, params, text_options, pair_options, score_type)
    return job.then(ranked)


def reward(
    service: Service, prompts: Seq[Prompt | Pair], params: Params, options: TextOptions, *, of_tokens: bool = True
) -> Job[list[Output]]:
    """Rate each prompt by the model's reward head.

    Args:
        of_tokens: a model that rates every token returns all rewards, not only the last one.

    Raises:
        TaskNotOffered: the model gives no reward.
        BadRequest: as `encode`.
    """
    task, activates = reward_task(service.info, of_tokens=of_tokens)

    def filled(params: PoolingParams) -> PoolingParams:
        check_named(params, ("reward", task))
        return replace(params, use_activation=params.activates(activates))

    if isinstance(params, PoolingParams):
        return encode(service, prompts, task, filled(params), options)
    return encode(service, prompts, task, [*map(filled, params)], options)


def plugin(
    service: Service,
    data: Any,
    request_id: str,
    options: TextOptions,
    *,
    task: str | None = None,
    params: PoolingParams | None = None,
    check_count: Callable[[int], None] | None = None,
) -> Job[Any]:
    """Let the IO-processor plugin make prompts of `data`, and an answer of their outputs.

    Args:
        request_id: the request's id, for the plugin.
        task: task that the request names.
        params: parameters of the request, which the plugin may change.
        check_count: raises for a number of prompts that is too large.

    Raises:
        BadRequest: the request names another task than "plugin", there is no plugin, or it refuses the data.
        PluginFailed: the plugin fails.
    """
    call = check_plugin(service, task).call(data, request_id)
    prompts, model_task, model_params = call.prepare(service.info, params)
    if check_count is not None:
        check_count(len(prompts))
    sequences = service.render(prompts, model_task, model_params, options)
    return Job(sequences, lambda outputs: call.finish(sequences, outputs), is_slow=True)


def check_plugin(service: Service, task: str | None) -> Plugin:
    """Return the model's plugin.

    Raises:
        BadRequest: there is none, or the request names another task.
    """
    if task not in (None, PLUGIN):
        raise BadRequest(WRONG_TASK, param="data")
    if service.plugin is None:
        raise BadRequest(NO_PLUGIN, param="data")
    return service.plugin


def _rendered_one_by_one(
    service: Service,
    prompts: Seq[Prompt | Pair],
    task: str,
    params: Seq[PoolingParams],
    options: TextOptions,
) -> list[Sequence]:
    """Render prompts, each with its own parameters."""
    sequences: list[Sequence] = []
    for prompt, params_of_prompt in zip(prompts, params, strict=True):
        sequences += service.render([prompt], task, params_of_prompt, options)
    return sequences


def _rendered_sides(
    service: Service,
    way: Way,
    queries: Seq[Side],
    documents: Seq[Side],
    params: PoolingParams,
    text_options: TextOptions,
    options: PairOptions,
) -> list[Sequence]:
    """Render queries, then documents, each with the prompt of its side."""
    check_no_template(service.info.name, f"{way.name}, which renders no pairs", options)
    service.pairs.check(options)
    prompts = service.renderer.prompts
    sides = (
        (prompts.of("query"), queries, options.max_tokens_per_query),
        (prompts.of("document"), documents, options.max_tokens_per_doc),
    )
    sequences: list[Sequence] = []
    for prompt, contents, limit in sides:
        cut = service.pairs.cut(texts_of(contents, CUTS_TEXTS), limit) if limit else contents
        sequences += service.renderer.render(cut, way.task, params, text_options._replace(prompt=prompt))
    return _also(sequences, way.also)


def _also(sequences: list[Sequence], tasks: tuple[str, ...]) -> list[Sequence]:
    """Return `sequences` with further tasks of the same forward."""
    if not tasks:
        return sequences
    return [replace(sequence, also=tasks) for sequence in sequences]
