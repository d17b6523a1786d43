"""`LLM`: the engine from Python. It enters where a request enters, at rendering, and blocks on the same futures.

Names, arguments and outputs are those of vLLM's offline API, so that its examples run with the import changed.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from cenote.arguments import as_tensors, comparable, listed_prompts, per_prompt, text_options
from cenote.config import EngineConfig, ModelConfig, PoolerConfig, resolve, unknown_name
from cenote.engine.entities import check_aggregation, check_labels, entities
from cenote.engine.pairs import PairOptions
from cenote.engine.scoring import plan, reward_task
from cenote.errors import BadRequest
from cenote.plugins import NOT_INSTALLED, WRONG_TASK
from cenote.service import Service
from cenote.tasks import PLUGIN, check_task
from cenote.tensors.scoring import ranking, similarities
from cenote.types import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PairTemplate,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    RankedDocument,
    ScoringOutput,
    ScoringRequestOutput,
    SparseEmbedding,
    template_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Seq

    import torch
    from tqdm import tqdm

    from cenote.engine.entities import Entity
    from cenote.engine.prompts import Applied
    from cenote.engine.rendering import Prompt
    from cenote.engine.scoring import Plan
    from cenote.types import ModelInfo, Output, Pair, Sequence

log = logging.getLogger(__name__)

RENDERED_AT_ONCE = 1024
R = TypeVar("R")


class LLM:
    """A pooling model in this process.

    Args:
        model: folder or hub id; `None` = the embedded all-MiniLM-L6-v2.
        runner: "auto" or "pooling".
        convert: "auto", "none", "embed" or "classify": how a model that does not pool by itself is made to.
        pooler_config: `PoolerConfig` or a mapping of its fields.
        hf_overrides: mapping merged into the checkpoint's config, or a function of it.
        options: any other field of `cenote.config.ModelConfig` and `EngineConfig`.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed.
        CheckpointError: the checkpoint cannot be honoured.

    Example:
        >>> llm = LLM(runner="pooling")
        >>> (output,) = llm.embed("Hello, my name is")
        >>> len(output.outputs.embedding)
        384
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        runner: str = "auto",
        convert: str = "auto",
        pooler_config: PoolerConfig | Mapping[str, Any] | None = None,
        hf_overrides: Mapping[str, Any] | Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        given = {"model": model, "runner": runner, "convert": convert, **options}
        if pooler_config is not None:
            given["pooler_config"] = pooler_config
        if hf_overrides is not None:
            given["hf_overrides"] = hf_overrides
        (model_config, engine_config), notes = resolve(given, (ModelConfig, EngineConfig))
        assert isinstance(model_config, ModelConfig)
        assert isinstance(engine_config, EngineConfig)
        for note in notes:
            log.info(note)
        if model_config.task is not None:
            warnings.warn(notes[0], FutureWarning, stacklevel=2)
        self._service = Service.load(model_config, engine_config, max_queued=1 << 40)
        # Also at exit: a device thread that outlives the interpreter aborts the process.
        weakref.finalize(self, self._service.engine.close)
        self._numbers = itertools.count()

    @property
    def info(self) -> ModelInfo:
        """What was resolved about the model."""
        return self._service.info

    def embed(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One embedding per prompt, in order.

        Args:
            prompts: text, token ids, `{"prompt": ...}`, `{"prompt_token_ids": ...}`, or a list of those.
            use_tqdm: show a progress bar.
            pooling_params: for all prompts, or one for each.
            tokenization_kwargs: `truncate_prompt_tokens`, `truncation_side`, `padding`, `add_special_tokens`.
            prompt: text put before every input.
            prompt_name: one of the model's prompts, put before every input.
            input_type: "query", "document", or one of the model's prompts.

        Raises:
            BadRequest: a `ValueError` that says what was wrong with which argument.
        """
        return self._run(
            prompts,
            "embed",
            pooling_params,
            use_tqdm,
            tokenization_kwargs,
            applied=self._service.renderer.prompts.choose(prompt=prompt, name=prompt_name, input_type=input_type),
            finish=lambda sequence, output: EmbeddingRequestOutput(
                request_id=str(next(self._numbers)),
                outputs=EmbeddingOutput(output.data.tolist()),
                prompt_token_ids=list(sequence.ids),
            ),
        )

    def encode(
        self,
        prompts: Prompt | Seq[Prompt],
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        pooling_task: str | Seq[str] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The result of any task, as tensors: `[D]` for sequence tasks, `[T, D]` for token tasks, float32.

        Args:
            prompts: as for `embed`; or `{"data": ...}` for the IO-processor plugin, whose answer is the one output's
                `outputs`.
            pooling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar.
            pooling_task: a task that the model offers, or "plugin"; default: `pooling_params.task`, then
                `pooler_config.task`, then the model's first. Several tasks are answered by one forward, the first one
                in `outputs.data`, the others in `outputs.others`.
            tokenization_kwargs: as for `embed`, as are the prompts.
            prompt: see `embed`.
            prompt_name: see `embed`.
            input_type: see `embed`.

        Raises:
            BadRequest: as `embed`; or there is no plugin, or it refuses the data.
            PluginFailed: the plugin fails.
        """
        own = pooling_params.task if isinstance(pooling_params, PoolingParams) else None
        tasks = [pooling_task] if isinstance(pooling_task, str) else list(pooling_task or ())
        task, also = next(iter(tasks), own), tuple(tasks[1:])
        if task == PLUGIN or (hasattr(prompts, "keys") and "data" in prompts):
            return self._run_plugin(prompts, task, pooling_params, use_tqdm, tokenization_kwargs)
        return self._run(
            prompts,
            task or self.info.default_task,
            pooling_params,
            use_tqdm,
            tokenization_kwargs,
            applied=self._service.renderer.prompts.choose(prompt=prompt, name=prompt_name, input_type=input_type),
            also=also,
            finish=lambda sequence, output: PoolingRequestOutput(
                request_id=str(next(self._numbers)),
                outputs=as_tensors(output),
                prompt_token_ids=list(sequence.ids),
                late_chunking=sequence.late_chunking,
            ),
        )

    def embed_sparse(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        top_k: int | None = None,
        use_tqdm: bool = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
    ) -> list[PoolingRequestOutput[SparseEmbedding]]:
        """One sparse embedding per prompt: vocabulary entries and their weights (SPLADE, bge-m3).

        Args:
            prompts: as for `embed`.
            top_k: keep only so many of the largest weights.
            use_tqdm: show a progress bar.
            tokenization_kwargs: as for `embed`, as are the prompts.
            prompt: see `embed`.
            prompt_name: see `embed`.
            input_type: see `embed`.

        Raises:
            BadRequest: the model has no lexical head, or as `embed`.
        """
        renderer = self._service.renderer

        def finish(sequence: Sequence, output: Output) -> PoolingRequestOutput[SparseEmbedding]:
            assert output.indices is not None
            ids = output.indices.tolist()
            found = SparseEmbedding(ids, output.data.tolist(), renderer.token_strings(ids))
            return PoolingRequestOutput(str(next(self._numbers)), found, list(sequence.ids))

        return self._run(
            prompts,
            "sparse",
            PoolingParams(top_k=top_k),
            use_tqdm,
            tokenization_kwargs,
            applied=renderer.prompts.choose(prompt=prompt, name=prompt_name, input_type=input_type),
            finish=finish,
        )

    def similarity(self, first: Seq[PoolingRequestOutput[Any]], second: Seq[PoolingRequestOutput[Any]]) -> torch.Tensor:
        """How alike embeddings are, each of `first` with each of `second`: `[len(first), len(second)]` float32.

        By the checkpoint's `similarity_fn_name`, else cosine of dense embeddings, MaxSim of token vectors, dot product
        of sparse embeddings. Distances are negative.

        Args:
            first: results of `embed`, `embed_sparse` or `encode`, or their `outputs`; queries, for MaxSim.
            second: results of the same method.
        """
        import torch

        rows = [[comparable(getattr(output, "outputs", output)) for output in side] for side in (first, second)]
        if not rows[0] or not rows[1]:
            return torch.zeros(len(rows[0]), len(rows[1]))
        return torch.from_numpy(np.stack([similarities(query, rows[1], self.info.similarity) for query in rows[0]]))

    def classify(
        self,
        prompts: Prompt | Pair | Seq[Prompt | Pair],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """The value of every class per prompt, in order.

        Args:
            prompts: as for `embed`; also pairs of texts, `{"text": ..., "text_pair": ...}` or tuples of two, for models
                that classify pairs (NLI, cross-encoders).
            use_tqdm: show a progress bar.
            pooling_params: `use_activation=False` gives logits.
            tokenization_kwargs: as for `embed`.

        Raises:
            BadRequest: the model has no classification head, or as `embed`.
        """
        labels = self.info.labels
        return self._run(
            prompts,
            "classify",
            pooling_params,
            use_tqdm,
            tokenization_kwargs,
            finish=lambda sequence, output: ClassificationRequestOutput(
                request_id=str(next(self._numbers)),
                outputs=ClassificationOutput(
                    output.data.tolist(), labels[int(output.data.argmax())] if labels else None
                ),
                prompt_token_ids=list(sequence.ids),
            ),
        )

    def token_classify(
        self,
        prompts: str | Seq[str],
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Seq[str] = ("O",),
        use_tqdm: bool = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[list[Entity]]]:
        """The entities of each text, as Transformers' token-classification pipeline finds them.

        Args:
            prompts: one text or several.
            aggregation_strategy: "none", "simple", "first", "average" or "max".
            ignore_labels: labels that are no entities.
            use_tqdm: show a progress bar.
            tokenization_kwargs: as for `embed`.

        Raises:
            BadRequest: the model does not label tokens, or as `embed`.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise BadRequest("You must pass at least one prompt")
        if not all(isinstance(text, str) for text in texts):
            raise BadRequest("entities are found in text: prompts must be str, not token ids")
        params = PoolingParams(use_activation=True)
        options = text_options(tokenization_kwargs or {})
        renderer = self._service.renderer
        check_aggregation(aggregation_strategy)
        check_labels(self.info)
        rendered = renderer.annotated(texts, "token_classify", params, options)
        outputs = self._submit([sequence for sequence, _ in rendered], use_tqdm)
        return [
            PoolingRequestOutput(
                request_id=str(next(self._numbers)),
                outputs=entities(
                    text,
                    encoding,
                    output.data,
                    self.info.labels,
                    renderer.tokenizer,
                    aggregation=aggregation_strategy,
                    ignore_labels=ignore_labels,
                ),
                prompt_token_ids=list(sequence.ids),
            )
            for text, (sequence, encoding), output in zip(texts, rendered, outputs, strict=True)
        ]

    def score(
        self,
        data_1: str | Seq[str],
        data_2: str | Seq[str],
        /,
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        score_type: str | None = None,
        **options: Any,
    ) -> list[ScoringRequestOutput]:
        """How well texts go together: one score per pair, in order. Pairs are 1:1, 1:N or N:N.

        Args:
            data_1: the query or queries.
            data_2: the document or documents.
            use_tqdm: show a progress bar.
            pooling_params: `use_activation`, and what `options` take, in its `extra_kwargs`.
            tokenization_kwargs: as for `embed`.
            chat_template: Jinja template over messages `query` and `document` instead of the model's (cross-encoders).
            score_type: "cross-encoder", "bi-encoder" or "late-interaction"; default: the model's first.
            options: `max_tokens_per_query`, `max_tokens_per_doc`, `instruction`, `chat_template_kwargs`.

        Raises:
            BadRequest: the lists do not pair up, the model cannot score, or as `embed`.
        """
        queries, documents = ([d] if isinstance(d, str) else list(d) for d in (data_1, data_2))
        params = pooling_params or PoolingParams()
        made = self._plan(queries, documents, params, tokenization_kwargs, chat_template, score_type, options)
        scores = made.scores(self._submit(made.sequences, use_tqdm))
        return [
            ScoringRequestOutput(
                request_id=str(next(self._numbers)),
                outputs=ScoringOutput(float(score)),
                prompt_token_ids=made.ids(pair),
            )
            for pair, score in enumerate(scores)
        ]

    def rerank(
        self,
        query: str,
        documents: Seq[str],
        *,
        top_n: int = 0,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        score_type: str | None = None,
        **options: Any,
    ) -> list[RankedDocument]:
        """The documents by falling relevance to the query.

        Args:
            query: what is looked for.
            documents: where.
            top_n: how many to return; 0 = all.
            use_tqdm: as in `score`, as are the other arguments.
            pooling_params: see `score`.
            tokenization_kwargs: see `score`.
            chat_template: see `score`.
            score_type: see `score`.
            options: see `score`.

        Raises:
            BadRequest: `top_n` is negative, or as `score`.
        """
        if isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 0:
            raise BadRequest(f"top_n must be a non-negative integer, got {top_n!r}", param="top_n")
        documents = [documents] if isinstance(documents, str) else list(documents)
        params = pooling_params or PoolingParams()
        made = self._plan([query], documents, params, tokenization_kwargs, chat_template, score_type, options)
        scores = made.scores(self._submit(made.sequences, use_tqdm))
        return [RankedDocument(i, float(scores[i]), documents[i]) for i in ranking(scores, top_n)]

    def reward(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The reward of each prompt, as a tensor: raw numbers from models that rate an input (`[1]`) or its tokens
        (`[T, 1]`), and from process reward models one row per step, `[S, C]`, the softmax over its classes.

        Args:
            prompts: as for `embed`; a conversation must be rendered by the model's chat template before.
            use_tqdm: show a progress bar.
            pooling_params: `use_activation`, and for process reward models `step_tag_id`, `returned_token_ids`.
            tokenization_kwargs: as for `embed`.

        Raises:
            BadRequest: the model gives no reward.
        """
        task, default = reward_task(self.info)

        def filled(params: PoolingParams) -> PoolingParams:
            return replace(params, use_activation=default) if params.use_activation is None else params

        one = PoolingParams() if pooling_params is None else pooling_params
        return self.encode(
            prompts,
            filled(one) if isinstance(one, PoolingParams) else [filled(params) for params in one],
            use_tqdm=use_tqdm,
            pooling_task=task,
            tokenization_kwargs=tokenization_kwargs,
        )

    def get_tokenizer(self) -> Any:
        """A copy of the model's Transformers tokenizer: calling it may switch truncation or padding on."""
        return copy.deepcopy(self._service.renderer.tokenizer)

    def close(self) -> None:
        """Finish and stop the device thread. An `LLM` that is garbage-collected needs no closing."""
        self._service.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_plugin(
        self,
        prompt: Any,
        task: str | None,
        pooling_params: PoolingParams | Seq[PoolingParams] | None,
        use_tqdm: bool,
        tokenization_kwargs: Mapping[str, Any] | None,
    ) -> list[PoolingRequestOutput[Any]]:
        """What the IO-processor plugin makes of `{"data": ...}`."""
        plugin = self._service.plugin
        if task not in (None, PLUGIN):
            raise BadRequest(WRONG_TASK, param="data")
        if plugin is None:
            raise BadRequest(NOT_INSTALLED, param="data")
        if not hasattr(prompt, "keys") or set(prompt) != {"data"}:
            raise BadRequest(
                f"the 'plugin' task takes {{'data': ...}} and nothing else, got {prompt!r:.100}", param="data"
            )
        if pooling_params is not None and not isinstance(pooling_params, PoolingParams):
            raise BadRequest("the 'plugin' task takes one `PoolingParams`, not a list", param="pooling_params")
        number = str(next(self._numbers))
        call = plugin.call(prompt["data"], number)
        prompts, task, params = call.prepare(self.info, pooling_params)
        sequences = self._service.render(prompts, task, params, text_options(tokenization_kwargs or {}))
        answer = call.finish(sequences, self._submit(sequences, use_tqdm))
        return [PoolingRequestOutput(request_id=number, outputs=answer, prompt_token_ids=[])]

    def _plan(
        self,
        queries: list[str],
        documents: list[str],
        params: PoolingParams,
        tokenization_kwargs: Mapping[str, Any] | None,
        chat_template: str | None,
        score_type: str | None,
        options: Mapping[str, Any],
    ) -> Plan:
        given = {**(params.extra_kwargs or {}), **options}
        kwargs = dict(given.pop("chat_template_kwargs", None) or {})
        if (instruction := given.pop("instruction", None)) is not None:
            kwargs.setdefault("instruction", instruction)
        limits = {"max_tokens_per_query", "max_tokens_per_doc"}
        for name in given:
            if name not in limits:
                known = {*limits, "instruction", "chat_template_kwargs"}
                raise BadRequest(unknown_name("scoring option", name, known), param=name)
        template = None if chat_template is None else PairTemplate(template_text(chat_template))
        return plan(
            self._service.renderer,
            self._service.pairs,
            queries,
            documents,
            params,
            text_options(tokenization_kwargs or {}),
            PairOptions(template=template, kwargs=kwargs, **given),
            score_type,
        )

    def _submit(self, sequences: list[Sequence], use_tqdm: bool) -> list[Output]:
        """Run `sequences` as one request."""
        from tqdm import tqdm

        with tqdm(total=len(sequences), desc="Pooling", disable=not use_tqdm, dynamic_ncols=True) as bar:
            return self._service.engine.submit(sequences, progress=lambda done: _advance(bar, done)).result()

    def _run(
        self,
        prompts: Prompt | Pair | Seq[Prompt | Pair],
        task: str,
        pooling_params: PoolingParams | Seq[PoolingParams] | None,
        use_tqdm: bool,
        tokenization_kwargs: Mapping[str, Any] | None,
        *,
        finish: Callable[[Sequence, Output], R],
        applied: Applied | None = None,
        also: tuple[str, ...] = (),
    ) -> list[R]:
        from tqdm import tqdm

        listed = listed_prompts(prompts)
        params = per_prompt(pooling_params, len(listed))
        options = text_options(tokenization_kwargs or {})._replace(prompt=applied)
        render, engine = self._service.render, self._service.engine
        for name in also:
            check_task(name, self.info.tasks)
        if not listed:
            raise BadRequest("You must pass at least one prompt")
        futures = []
        results: list[R] = []
        with tqdm(total=len(listed), desc="Pooling", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                for start in range(0, len(listed), RENDERED_AT_ONCE):
                    part = listed[start : start + RENDERED_AT_ONCE]
                    if isinstance(params, PoolingParams):
                        sequences = render(part, task, params, options)
                    else:
                        sequences = [
                            render([prompt], task, own, options)[0]
                            for prompt, own in zip(part, params[start : start + RENDERED_AT_ONCE], strict=True)
                        ]
                    sequences = [replace(s, also=also) for s in sequences] if also else sequences
                    futures.append((sequences, engine.submit(sequences, progress=lambda done: _advance(bar, done))))
                for sequences, future in futures:
                    results += [finish(s, output) for s, output in zip(sequences, future.result(), strict=True)]
            except BaseException:
                for _, future in futures:
                    future.cancel()
                raise
        return results


def _advance(bar: tqdm[NoReturn], done: int) -> None:
    bar.update(done)
