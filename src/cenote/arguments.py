"""What the methods of `LLM` take and return, made from and into what the engine takes and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.config import unknown_name
from cenote.core import PairTemplate, PoolingParams, template_text
from cenote.errors import BadRequest
from cenote.outputs import EmbeddingOutput, PoolingOutput, SparseEmbedding
from cenote.pipeline.pairs import PairOptions
from cenote.pipeline.rendering import TextOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cenote.core import Output
    from cenote.pipeline.rendering import Renderer


def as_tensors(output: Output) -> PoolingOutput:
    """A result as `LLM.encode` returns it: CPU tensors that share its memory."""
    import torch

    return PoolingOutput(
        torch.from_numpy(output.data),
        None if output.indices is None else torch.from_numpy(output.indices),
        {task: as_tensors(other) for task, other in output.others.items()},
    )


def comparable(outputs: Any) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """A result as `similarities` takes it: a vector, a matrix, or rising indices with their values."""
    if isinstance(outputs, EmbeddingOutput):
        return np.asarray(outputs.embedding, dtype=np.float32)
    if isinstance(outputs, SparseEmbedding):
        return np.asarray(outputs.indices, dtype=np.int64), np.asarray(outputs.values, dtype=np.float32)
    if isinstance(outputs, PoolingOutput):
        data = outputs.data.numpy()
        return data if outputs.indices is None else (outputs.indices.numpy(), data)
    raise BadRequest(f"embeddings are compared, got {type(outputs).__name__}")


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


def pair_options(options: Mapping[str, Any], chat_template: str | None) -> PairOptions:
    """Return the options of `LLM.score` and `LLM.rerank` for pairs.

    Raises:
        BadRequest: an option is unknown, or sets a reserved variable of the template.
    """
    known = ("max_tokens_per_query", "max_tokens_per_doc", "instruction", "chat_template_kwargs")
    for name in options:
        if name not in known:
            raise BadRequest(unknown_name("scoring option", name, known), param=name)
    template = None if chat_template is None else PairTemplate(template_text(chat_template))
    return PairOptions.of(template=template, **options)


def sparse_embedding(output: Output, renderer: Renderer) -> SparseEmbedding:
    """Return a sparse result as `LLM.embed_sparse` does, with its entries as text."""
    assert output.indices is not None
    ids = output.indices.tolist()
    return SparseEmbedding(ids, output.data.tolist(), renderer.token_strings(ids))


def listed_prompts(prompts: Any) -> list[Any]:
    """Prompts as a list: one text, mapping or list of ids is a single prompt."""
    if isinstance(prompts, (str, bytes)) or hasattr(prompts, "keys") or not hasattr(prompts, "__iter__"):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and all(isinstance(i, (int, np.integer)) for i in listed) else listed


def per_prompt(params: Any, count: int) -> PoolingParams | list[PoolingParams]:
    """`pooling_params` for all prompts, or a list with one for each."""
    if params is None:
        return PoolingParams()
    if isinstance(params, PoolingParams):
        return params
    listed: list[PoolingParams] = list(params)
    if len(listed) != count:
        raise BadRequest(f"The lengths of prompts ({count}) and pooling_params ({len(listed)}) must be the same.")
    return listed
