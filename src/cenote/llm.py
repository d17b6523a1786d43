"""`LLM`: the engine from Python. It enters where a request enters, at rendering, and blocks on the same futures.

Names, arguments and outputs are those of vLLM's offline API, so that its examples run with the import changed.
"""

from __future__ import annotations

import itertools
import logging
import warnings
import weakref
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from cenote.config import EngineConfig, ModelConfig, PoolerConfig, resolve, unknown_name
from cenote.engine.rendering import TextOptions
from cenote.errors import BadRequest, ConfigError
from cenote.service import Service
from cenote.tasks import TASKS
from cenote.types import EmbeddingOutput, EmbeddingRequestOutput, PoolingOutput, PoolingParams, PoolingRequestOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Seq

    from tqdm import tqdm

    from cenote.engine.rendering import Prompt
    from cenote.types import ModelInfo, Output, Sequence

log = logging.getLogger(__name__)

RENDERED_AT_ONCE = 1024
R = TypeVar("R")


class LLM:
    """A pooling model in this process.

    Args:
        model: folder or hub id; `None` = the embedded all-MiniLM-L6-v2.
        runner: "auto" or "pooling".
        convert: "auto", "none" or "embed": how a model that does not pool by itself is made to.
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
        legacy_task = options.pop("task", None)
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
        if legacy_task is not None:
            _check_legacy_task(legacy_task)
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
    ) -> list[EmbeddingRequestOutput]:
        """One embedding per prompt, in order.

        Args:
            prompts: text, token ids, `{"prompt": ...}`, `{"prompt_token_ids": ...}`, or a list of those.
            use_tqdm: show a progress bar.
            pooling_params: for all prompts, or one for each.
            tokenization_kwargs: `truncate_prompt_tokens`, `truncation_side`, `padding`, `add_special_tokens`.

        Raises:
            BadRequest: a `ValueError` that says what was wrong with which argument.
        """
        return self._run(
            prompts,
            "embed",
            pooling_params,
            use_tqdm,
            tokenization_kwargs,
            lambda sequence, output: EmbeddingRequestOutput(
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
        pooling_task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The result of any task, as tensors: `[D]` for sequence tasks, `[T, D]` for token tasks, float32.

        Args:
            prompts: as for `embed`.
            pooling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar.
            pooling_task: "embed" or "token_embed"; default: `pooler_config.task`, else the model's first.
            tokenization_kwargs: as for `embed`.
        """
        import torch

        return self._run(
            prompts,
            pooling_task or self.info.default_task,
            pooling_params,
            use_tqdm,
            tokenization_kwargs,
            lambda sequence, output: PoolingRequestOutput(
                request_id=str(next(self._numbers)),
                outputs=PoolingOutput(torch.from_numpy(output.data)),
                prompt_token_ids=list(sequence.ids),
            ),
        )

    def get_tokenizer(self) -> Any:
        """The model's Transformers tokenizer."""
        return self._service.renderer.tokenizer

    def close(self) -> None:
        """Finish and stop the device thread. An `LLM` that is garbage-collected needs no closing."""
        self._service.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        prompts: Prompt | Seq[Prompt],
        task: str,
        pooling_params: PoolingParams | Seq[PoolingParams] | None,
        use_tqdm: bool,
        tokenization_kwargs: Mapping[str, Any] | None,
        finish: Callable[[Sequence, Output], R],
    ) -> list[R]:
        from tqdm import tqdm

        listed = _listed(prompts)
        params = _per_prompt(pooling_params, len(listed))
        options = text_options(tokenization_kwargs or {})
        renderer, engine = self._service.renderer, self._service.engine
        if not listed:
            raise BadRequest("You must pass at least one prompt")
        futures = []
        results: list[R] = []
        with tqdm(total=len(listed), desc="Pooling", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                for start in range(0, len(listed), RENDERED_AT_ONCE):
                    part = listed[start : start + RENDERED_AT_ONCE]
                    if isinstance(params, PoolingParams):
                        sequences = renderer.render(part, task, params, options)
                    else:
                        sequences = [
                            renderer.render([prompt], task, own, options)[0]
                            for prompt, own in zip(part, params[start : start + RENDERED_AT_ONCE], strict=True)
                        ]
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


def text_options(kwargs: Mapping[str, Any]) -> TextOptions:
    """`tokenization_kwargs` of vLLM as `TextOptions`.

    Raises:
        BadRequest: a key or value is not known.
    """
    known = {"truncate_prompt_tokens", "truncation_side", "truncation", "max_length", "padding", "add_special_tokens"}
    for name in kwargs:
        if name not in known:
            raise BadRequest(unknown_name("tokenization argument", name, known), param=name)
    cut, how = kwargs.get("truncate_prompt_tokens"), kwargs.get("truncation")
    if how not in (None, True, False, "longest_first", "do_not_truncate"):
        raise BadRequest(
            f"truncation must be True, False, 'longest_first' or 'do_not_truncate', got {how!r}", param="truncation"
        )
    if cut is None and how in (True, "longest_first"):
        cut = kwargs.get("max_length", -1)
    if cut is not None and (not isinstance(cut, int) or isinstance(cut, bool) or cut < -1):
        raise BadRequest(
            f"truncate_prompt_tokens must be an integer >= -1, got {cut!r}", param="truncate_prompt_tokens"
        )
    side = kwargs.get("truncation_side")
    if side not in (None, "left", "right"):
        raise BadRequest(f"truncation_side must be 'left' or 'right', got {side!r}", param="truncation_side")
    padding = kwargs.get("padding")
    if padding not in (None, False, "max_length", "do_not_pad"):
        raise BadRequest(f"padding must be 'max_length' or 'do_not_pad', got {padding!r}", param="padding")
    return TextOptions(cut, side, padding == "max_length", bool(kwargs.get("add_special_tokens", True)))


def _listed(prompts: Any) -> list[Any]:
    """Prompts as a list: one text, mapping or list of ids is a single prompt."""
    if isinstance(prompts, (str, bytes)) or hasattr(prompts, "keys") or not hasattr(prompts, "__iter__"):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and all(isinstance(i, (int, np.integer)) for i in listed) else listed


def _per_prompt(params: Any, count: int) -> PoolingParams | list[PoolingParams]:
    if params is None:
        return PoolingParams()
    if isinstance(params, PoolingParams):
        return params
    listed: list[PoolingParams] = list(params)
    if len(listed) != count:
        raise BadRequest(f"The lengths of prompts ({count}) and pooling_params ({len(listed)}) must be the same.")
    return listed


def _check_legacy_task(task: str) -> None:
    """`LLM(task=...)` of older vLLM: accepted where its meaning is still clear."""
    known = {"embed", "embedding", *TASKS}
    if task not in known:
        raise ConfigError(f"task={task!r} is not offered; {unknown_name('task', task, known)}")
    warnings.warn(
        f"LLM(task={task!r}) is the spelling of older releases of vLLM; the task follows from the model, "
        "so it can be left out",
        FutureWarning,
        stacklevel=3,
    )
