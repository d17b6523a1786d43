"""Refusals of ids and parameters that a model has no place for, by its `ModelInfo`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cenote.core import UNLIMITED
from cenote.errors import BadRequest, TooLong
from cenote.tasks import check_params, check_task

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.core import ModelInfo, PoolingParams
    from cenote.pipeline.tokenizing import Text

OF_STEPS = ("step_tag_id", "returned_token_ids")
"""Parameters that only process reward models take."""


def checked(info: ModelInfo, task: str, params: PoolingParams) -> PoolingParams:
    """Return `params` with the task filled in.

    Raises:
        BadRequest: the model does not offer the task or a parameter.
    """
    check_params(check_task(task, info.tasks), params)
    _check_step(info, params)
    return replace(params, task=task, extra_kwargs=None, dimensions=_dimensions(info, params.dimensions))


def check_vocabulary(info: ModelInfo, ids: Seq[int], *, param: str = "input") -> None:
    """Raise `BadRequest` for ids of a request that are outside the vocabulary, or no integers."""
    for farthest in _ends(ids, param):
        if farthest not in range(info.vocab_size):
            raise BadRequest(
                f"Token id {farthest} is out of vocabulary; {info.name} takes ids from 0 to {info.vocab_size - 1}. "
                "Send text, if another tokenizer made the ids (LangChain's OpenAIEmbeddings: "
                "check_embedding_ctx_length=False)",
                param=param,
            )


def check_types(info: ModelInfo, text: Text) -> None:
    """Raise `BadRequest` for token type ids beyond the model's table, made by a tokenizer that does not fit it."""
    if text.type_ids is not None and max(text.type_ids) >= (info.type_vocab_size or UNLIMITED):
        raise BadRequest(
            f"got tokens of type {max(text.type_ids)}, but {info.name} knows types below {info.type_vocab_size}, "
            "so it reads no pairs of texts; send single texts, or a pair joined to one",
            param="input",
        )


def unknown_token(info: ModelInfo, token: str, number: int) -> BadRequest:
    """Return the refusal of a token beyond the model's embeddings, made by a tokenizer that does not fit it."""
    return BadRequest(
        f"got the token {token!r} (id {number}), for which {info.name} has no embedding; its ids go from 0 to "
        f"{info.vocab_size - 1}, and its tokenizer knows more; leave that token out",
        param="input",
    )


def too_long(limit: int, count: str) -> TooLong:
    """Return the refusal of an input, in the words of vLLM, which clients match on."""
    return TooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains "
        f"{count} input tokens, which exceeds this limit even without any output tokens. Please reduce the length "
        "of the input prompt.",
        param="input_tokens",
    )


def _dimensions(info: ModelInfo, dimensions: int | None) -> int | None:
    """Return the length to which vectors are cut; `None` = not. Some clients always send the full length, or 0.

    Raises:
        BadRequest: the model does not allow it, in the words of vLLM, which clients match on.
    """
    if dimensions in (None, 0, info.dimension):
        return None
    name, allowed, width = info.name, info.matryoshka, info.dimension
    if allowed is None:
        fault = (
            f"Model '{name}' does not support Matryoshka embeddings; "
            f"dimensions must be unset (received dimensions={dimensions})."
        )
    elif allowed and dimensions not in allowed:
        fault = f"Model '{name}' only supports Matryoshka dimensions {list(allowed)}, got {dimensions}."
    elif not 1 <= dimensions <= width:
        fault = f"Model '{name}' only supports dimensions in range [1, {width}], got {dimensions}."
    else:
        return dimensions
    raise BadRequest(fault, param="dimensions")


def _check_step(info: ModelInfo, params: PoolingParams) -> None:
    for name in OF_STEPS:
        if getattr(params, name) is not None and not info.step:
            raise BadRequest(
                f"{name} is for process reward models (pooling type STEP); {info.name} is not one", param=name
            )
    if params.step_tag_id is not None:
        check_vocabulary(info, [params.step_tag_id], param="step_tag_id")
    for column in params.returned_token_ids or ():
        if column not in info.columns:
            raise BadRequest(
                f"returned_token_ids: {column} is no column of {info.name}'s head", param="returned_token_ids"
            )


def _ends(ids: Seq[int], param: str) -> tuple[int, int]:
    """Return the lowest and the highest of some ids, and of 0, which every vocabulary has."""
    try:
        values = np.asarray(ids, dtype=np.int64)
    except OverflowError:
        return min(0, *ids), max(0, *ids)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"token ids must be integers: {error}", param=param) from None
    return int(values.min(initial=0)), int(values.max(initial=0))
