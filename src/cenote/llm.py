"""`LLM`: the engine from Python. It enters where a request enters, at rendering, and blocks on the same futures.

Names, arguments and outputs are those of vLLM's offline API, so that its examples run with the import changed.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
import weakref
from collections.abc import Collection
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cenote.adapters import LoRARequest
from cenote.arguments import (
    as_tensors,
    comparable,
    listed_params,
    of_kind,
    pair_options,
    plugin_data,
    side,
    single,
    sparse_embedding,
    tasks_of,
    text_options,
)
from cenote.calls import Calls
from cenote.config import EngineConfig, ModelConfig, PoolerConfig
from cenote.core import UNLIMITED, PoolingParams
from cenote.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RankedDocument,
    ScoringOutput,
    ScoringRequestOutput,
    SparseEmbedding,
)
from cenote.pipeline import operations
from cenote.pipeline.inputs import listed
from cenote.pipeline.pipeline import Service
from cenote.pipeline.ranking import pair_ids
from cenote.settings import OFFLINE, resolve
from cenote.tasks import PLUGIN
from cenote.tensors.similarity import similarities

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Seq

    import torch

    from cenote.calls import LoraRequests
    from cenote.core import ModelInfo, Output, Sequence
    from cenote.pipeline.entities import Entity
    from cenote.pipeline.inputs import Pair, Prompt
    from cenote.pipeline.options import TextOptions

log = logging.getLogger(__name__)


class LLM:
    """A pooling model in this process.

    Args:
        model: folder or hub id; `None` = the embedded all-MiniLM-L6-v2.
        runner: "auto" or "pooling".
        convert: "auto", "none", "embed", "classify" or "sparse": conversion of a model that does not pool by itself.
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
        options = {**OFFLINE, **options}
        options |= {"model": model, "runner": runner, "convert": convert}
        if pooler_config is not None:
            options["pooler_config"] = pooler_config
        if hf_overrides is not None:
            options["hf_overrides"] = hf_overrides
        (model_config, engine_config), notes = resolve(options, (ModelConfig, EngineConfig))
        assert isinstance(model_config, ModelConfig)
        assert isinstance(engine_config, EngineConfig)
        for note in notes:
            log.info(note)
        if model_config.task is not None:
            warnings.warn(notes[0], FutureWarning, stacklevel=2)
        self._service = Service.open(model_config, engine_config, max_queued=UNLIMITED, adds_adapters=True)
        # Also at exit: a device thread that outlives the interpreter aborts the process.
        weakref.finalize(self, self._service.engine.close)
        self._numbers = itertools.count()
        self._calls = Calls(self._service, model_config.lora_modules)

    @property
    def info(self) -> ModelInfo:
        """The model: the contract that inputs are validated against, and how it runs (`info.report`)."""
        return self._service.info

    def embed(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        lora_request: LoraRequests = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
    ) -> list[EmbeddingRequestOutput] | list[PoolingRequestOutput[PoolingOutput]]:
        """Return one embedding per prompt, in order.

        A model whose embeddings are token vectors (ColBERT, or any with `pooler_config.task` "token_embed") gives the
        matrices of `encode`; with late chunking every model does.

        Args:
            prompts: text, token ids, `{"prompt": ...}`, `{"prompt_token_ids": ...}`, or a list of those.
            use_tqdm: show a progress bar.
            pooling_params: for all prompts, or one for each.
            lora_request: adapter for all prompts, or one or `None` for each.
            tokenization_kwargs: `truncate_prompt_tokens`, `truncation_side`, `padding`, `add_special_tokens`, or
                Hugging Face's `truncation` and `max_length`.
            prompt: text put before every input.
            prompt_name: one of the model's prompts, put before every input.
            input_type: "query", "document", or one of the model's prompts.

        Raises:
            BadRequest: a `ValueError`: an argument or a prompt is wrong.
        """
        options = self._text_options(tokenization_kwargs, prompt, prompt_name, input_type)
        (task,) = tasks_of(pooling_params, self._vector_task(pooling_params))
        results = self._calls.run(
            prompts,
            pooling_params,
            use_tqdm,
            lora_request,
            lambda part, params: operations.encode(self._service, part, task, params, options),
        )
        if task == "token_embed":
            return self._tensors(results)
        return [
            EmbeddingRequestOutput(self._number(), EmbeddingOutput.of(output.data), list(sequence.ids))
            for sequence, output in results
        ]

    def encode(
        self,
        prompts: Prompt | Seq[Prompt],
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        pooling_task: str | Seq[str] | None = None,
        lora_request: LoraRequests = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Return the result of any task as float32 tensors: `[D]` for sequence tasks, `[T, D]` for token tasks.

        Args:
            prompts: as for `embed`; or `{"data": ...}` for the IO-processor plugin, whose answer is in `outputs`.
            pooling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar.
            pooling_task: a task that the model offers, or "plugin"; default: `pooling_params.task`, then
                `pooler_config.task`, then the model's first. One forward answers several, the first in `outputs.data`,
                the others in `outputs.others`.
            lora_request: as for `embed`.
            tokenization_kwargs: as for `embed`, as are the others.
            prompt: see `embed`.
            prompt_name: see `embed`.
            input_type: see `embed`.

        Raises:
            BadRequest: as `embed`; or there is no plugin, or it refuses the data.
            PluginFailed: the plugin fails.
        """
        tasks = tasks_of(pooling_params, pooling_task)
        if PLUGIN in tasks[:1] or (hasattr(prompts, "keys") and "data" in prompts):
            return self._run_plugin(
                prompts, next(iter(tasks), None), pooling_params, use_tqdm, lora_request, tokenization_kwargs
            )
        task, *also = tasks or [self.info.default_task]
        options = self._text_options(tokenization_kwargs, prompt, prompt_name, input_type)
        results = self._calls.run(
            prompts,
            pooling_params,
            use_tqdm,
            lora_request,
            lambda part, params: operations.encode(self._service, part, task, params, options, also=tuple(also)),
        )
        return self._tensors(results)

    def embed_sparse(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        top_k: int | None = None,
        use_tqdm: bool = True,
        lora_request: LoraRequests = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
    ) -> list[PoolingRequestOutput[SparseEmbedding]]:
        """Return one sparse embedding per prompt: vocabulary entries and their weights (SPLADE, bge-m3).

        Args:
            prompts: as for `embed`.
            top_k: number of the largest weights to keep; `None` = all.
            use_tqdm: show a progress bar.
            lora_request: as for `embed`.
            tokenization_kwargs: as for `embed`, as are the prompts.
            prompt: see `embed`.
            prompt_name: see `embed`.
            input_type: see `embed`.

        Raises:
            BadRequest: the model has no lexical head, or as `embed`.
        """
        renderer = self._service.renderer
        options = self._text_options(tokenization_kwargs, prompt, prompt_name, input_type)
        results = self._calls.run(
            prompts,
            PoolingParams(top_k=top_k),
            use_tqdm,
            lora_request,
            lambda part, params: operations.encode(self._service, part, "sparse", params, options),
        )
        return [
            PoolingRequestOutput(self._number(), sparse_embedding(output, renderer), list(sequence.ids))
            for sequence, output in results
        ]

    def similarity(self, first: Seq[PoolingRequestOutput[Any]], second: Seq[PoolingRequestOutput[Any]]) -> torch.Tensor:
        """Return the similarity of each of `first` with each of `second`: `[len(first), len(second)]`, float32.

        By the checkpoint's `similarity_fn_name`, else cosine of dense embeddings, MaxSim of token vectors, dot product
        of sparse embeddings. Distances are negative.

        Args:
            first: results of `embed`, `embed_sparse` or `encode`, or their `outputs`; queries, for MaxSim.
            second: results of the same method.
        """
        import torch

        queries, documents = comparable(first), comparable(second)
        if not queries or not documents:
            return torch.zeros(len(queries), len(documents), dtype=torch.float32)
        rows = [similarities(query, documents, self.info.similarity) for query in queries]
        return torch.from_numpy(np.stack(rows))

    def classify(
        self,
        prompts: Prompt | Pair | Seq[Prompt | Pair],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        lora_request: LoraRequests = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """Return the value of every class per prompt, in order.

        Args:
            prompts: as for `embed`; also pairs of texts, `{"text": ..., "text_pair": ...}` or, in a list, tuples of
                two, for models that classify pairs (NLI, cross-encoders).
            use_tqdm: show a progress bar.
            pooling_params: `use_activation=False` gives logits.
            lora_request: as for `embed`.
            tokenization_kwargs: as for `embed`.

        Raises:
            BadRequest: the model has no classification head, or as `embed`.
        """
        options = text_options(tokenization_kwargs)
        tasks_of(pooling_params, "classify")
        results = self._calls.run(
            prompts,
            pooling_params,
            use_tqdm,
            lora_request,
            lambda part, params: operations.classify(self._service, part, params, options),
        )
        return [
            ClassificationRequestOutput(
                request_id=self._number(),
                outputs=ClassificationOutput(classes.values.tolist(), classes.label),
                prompt_token_ids=list(sequence.ids),
            )
            for sequence, classes in results
        ]

    def token_classify(
        self,
        prompts: str | Seq[str],
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Seq[str] = ("O",),
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[list[Entity]]]:
        """Return the entities of each text, as Transformers' token-classification pipeline does.

        Args:
            prompts: one text or several.
            aggregation_strategy: "none", "simple", "first", "average" or "max".
            ignore_labels: labels that are no entities.
            use_tqdm: show a progress bar.
            lora_request: adapter to run with.
            tokenization_kwargs: as for `embed`.

        Raises:
            BadRequest: the model does not label tokens, or as `embed`.
        """
        texts = listed(prompts)
        job = operations.find_entities(
            self._service,
            texts,
            text_options(tokenization_kwargs),
            aggregation=aggregation_strategy,
            ignore_labels=of_kind("ignore_labels", ignore_labels, Collection) or (),
        )
        of_texts = self._calls.answer(job, lora_request, use_tqdm)
        return [
            PoolingRequestOutput(request_id=self._number(), outputs=entities, prompt_token_ids=list(sequence.ids))
            for sequence, entities in zip(job.sequences, of_texts, strict=True)
        ]

    def score(
        self,
        data_1: Prompt | Seq[Prompt],
        data_2: Prompt | Seq[Prompt],
        /,
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        score_type: str | None = None,
        **options: Any,
    ) -> list[ScoringRequestOutput]:
        """Return one score per query and document, in order. Pairs are 1:1, 1:N or N:N.

        Args:
            data_1: the query or queries: texts, and for models that take them pictures, as for `embed`, or content
                parts, `{"content": [{"type": "image_url", "image_url": {"url": ...}}]}`.
            data_2: the document or documents, likewise.
            use_tqdm: show a progress bar.
            pooling_params: `use_activation`, and in its `extra_kwargs` the same as `options`.
            lora_request: adapter to run with.
            tokenization_kwargs: as for `embed`.
            chat_template: Jinja template over messages `query` and `document` instead of the model's (cross-encoders).
            score_type: one of `info.score_types`, as "cross-encoder" or "bi-encoder"; default: the first of them.
            options: `max_tokens_per_query`, `max_tokens_per_doc`, `instruction`, `chat_template_kwargs`.

        Raises:
            BadRequest: the lists do not pair up, the model cannot score, or as `embed`.
        """
        renderer = self._service.renderer
        queries, documents = side(data_1, renderer), side(data_2, renderer)
        params = single(pooling_params, PoolingParams, "pooling_params") or PoolingParams()
        job = operations.score(
            self._service,
            queries,
            documents,
            params,
            text_options(tokenization_kwargs),
            pair_options(params, options, chat_template),
            score_type,
        )
        scores = self._calls.answer(job, lora_request, use_tqdm)
        return [
            ScoringRequestOutput(
                self._number(), ScoringOutput(float(score)), pair_ids(job.sequences, len(scores), pair)
            )
            for pair, score in enumerate(scores)
        ]

    def rerank(
        self,
        query: Prompt,
        documents: Prompt | Seq[Prompt],
        *,
        top_n: int = 0,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        score_type: str | None = None,
        **options: Any,
    ) -> list[RankedDocument]:
        """Return the documents by falling relevance to the query.

        Args:
            query: a text, or another form that `score` takes.
            documents: the documents to rank, likewise.
            top_n: number of documents to return; 0 = all.
            use_tqdm: as in `score`, as are the other arguments.
            pooling_params: see `score`.
            lora_request: see `score`.
            tokenization_kwargs: see `score`.
            chat_template: see `score`.
            score_type: see `score`.
            options: see `score`.

        Raises:
            BadRequest: `top_n` is negative, or as `score`.
        """
        items, renderer = listed(documents), self._service.renderer
        params = single(pooling_params, PoolingParams, "pooling_params") or PoolingParams()
        (one_query,) = side([query], renderer)
        job = operations.rerank(
            self._service,
            one_query,
            side(items, renderer),
            top_n,
            params,
            text_options(tokenization_kwargs),
            pair_options(params, options, chat_template),
            score_type,
        )
        ranked = self._calls.answer(job, lora_request, use_tqdm)
        return [RankedDocument(rank.index, rank.score, items[rank.index]) for rank in ranked]

    def reward(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        lora_request: LoraRequests = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Return the reward of each prompt as a tensor.

        Models that rate an input (`[1]`) or its tokens (`[T, 1]`) give raw numbers; process reward models give one row
        per step, `[S, C]`, the softmax over its classes.

        Args:
            prompts: as for `embed`; render a conversation by the model's chat template before.
            use_tqdm: show a progress bar.
            pooling_params: `use_activation`, and for process reward models `step_tag_id`, `returned_token_ids`.
            lora_request: as for `embed`.
            tokenization_kwargs: as for `embed`.

        Raises:
            BadRequest: the model is not a reward model.
        """
        options = text_options(tokenization_kwargs)
        results = self._calls.run(
            prompts,
            pooling_params,
            use_tqdm,
            lora_request,
            lambda part, params: operations.reward(self._service, part, params, options),
        )
        return self._tensors(results)

    @property
    def llm_engine(self) -> Any:
        """The names of labels and the length, where scripts for vLLM look for them.

        `llm_engine.vllm_config.model_config.hf_config.id2label`, `llm_engine.model_config.max_model_len`.
        """
        info = self.info
        labels = dict(enumerate(info.labels))
        config = SimpleNamespace(id2label=labels, num_labels=info.num_labels, architectures=[info.architecture])
        model = SimpleNamespace(hf_config=config, max_model_len=info.max_model_len)
        return SimpleNamespace(model_config=model, vllm_config=SimpleNamespace(model_config=model))

    def get_tokenizer(self) -> Any:
        """Return a copy of the model's Transformers tokenizer, as calling one may switch truncation or padding on."""
        return copy.deepcopy(self._service.renderer.tokenizer)

    def close(self) -> None:
        """Finish and stop the device thread. An `LLM` that is garbage-collected needs no closing."""
        self._service.engine.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM cannot be pickled: it has threads and loaded weights; make it in the process that uses it, for "
            "instance in the initializer of a pool"
        )

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text_options(
        self,
        tokenization_kwargs: Mapping[str, Any] | None,
        prompt: str | None,
        prompt_name: str | None,
        input_type: str | None,
    ) -> TextOptions:
        """Return how texts become ids, with the prompt before each of them."""
        for name, value in {"prompt": prompt, "prompt_name": prompt_name, "input_type": input_type}.items():
            of_kind(name, value, str)
        applied = self._service.renderer.prompts.choose(prompt=prompt, name=prompt_name, input_type=input_type)
        return text_options(tokenization_kwargs)._replace(prompt=applied)

    def _run_plugin(
        self,
        prompt: Any,
        task: str | None,
        pooling_params: PoolingParams | Seq[PoolingParams] | None,
        use_tqdm: bool,
        lora_request: LoraRequests,
        tokenization_kwargs: Mapping[str, Any] | None,
    ) -> list[PoolingRequestOutput[Any]]:
        """Return the IO-processor plugin's answer to `{"data": ...}`."""
        operations.check_plugin(self._service, task)
        data = plugin_data(prompt)
        params = single(pooling_params, PoolingParams, "pooling_params")
        adapter = single(lora_request, LoRARequest, "lora_request")
        number = self._number()
        options = text_options(tokenization_kwargs)
        job = operations.plugin(self._service, data, number, options, params=params)
        answer = self._calls.answer(job, adapter, use_tqdm)
        return [PoolingRequestOutput(request_id=number, outputs=answer, prompt_token_ids=[])]

    def _number(self) -> str:
        """Return the number of the next output."""
        return str(next(self._numbers))

    def _vector_task(self, params: PoolingParams | Seq[PoolingParams] | None) -> str:
        """Return the task of `embed`: "token_embed" if the model or the parameters are about tokens, else "embed"."""
        is_late = any(one.late_chunking_params for one in listed_params(params))
        return "token_embed" if is_late or self.info.vector_task == "token_embed" else "embed"

    def _tensors(self, results: list[tuple[Sequence, Output]]) -> list[PoolingRequestOutput[PoolingOutput]]:
        return [
            PoolingRequestOutput(
                request_id=self._number(),
                outputs=as_tensors(output),
                prompt_token_ids=list(sequence.ids),
                late_chunking=sequence.late_chunking,
            )
            for sequence, output in results
        ]
