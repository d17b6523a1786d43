"""Arguments and results of `LLM`, from and to those of the engine."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cenote.adapters import LoRARequest
from cenote.conventions import PairTemplate, template_text
from cenote.core import PoolingParams
from cenote.errors import BadRequest, unknown_name
from cenote.functions import coalesce, optional
from cenote.outputs import EmbeddingOutput, PoolingOutput, SparseEmbedding
from cenote.pipeline.inputs import Illustrated, content_of, listed
from cenote.pipeline.options import TextOptions
from cenote.pipeline.pairs import PairOptions
from cenote.tasks import check_named

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.core import Output
    from cenote.pipeline.rendering import Renderer


def as_tensors(output: Output) -> PoolingOutput:
    """Return a result as `LLM.encode` does: CPU tensors that share its memory."""
    import torch

    indices = optional(torch.from_numpy, output.indices)
    others = {task: as_tensors(other) for task, other in output.others.items()}
    return PoolingOutput(torch.from_numpy(output.data), indices, others)


def comparable(results: Iterable[Any]) -> list[np.ndarray | tuple[np.ndarray, np.ndarray]]:
    """Return results, or their `outputs`, as `similarities` takes them.

    Each is a vector, a matrix, or rising indices with their values.

    Raises:
        BadRequest: one is not an embedding.
    """
    return [_comparable(getattr(result, "outputs", result)) for result in results]


def _comparable(outputs: Any) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    if isinstance(outputs, EmbeddingOutput):
        return np.asarray(outputs.array, dtype=np.float32)
    if isinstance(outputs, SparseEmbedding):
        indices, values = outputs.arrays
        return np.asarray(indices, dtype=np.int64), np.asarray(values, dtype=np.float32)
    if isinstance(outputs, PoolingOutput):
        data = outputs.data.numpy()
        return data if outputs.indices is None else (outputs.indices.numpy(), data)
    raise BadRequest(f"embeddings are compared, got {type(outputs).__name__}")


T = TypeVar("T")

TOKENIZATION = (
    "truncate_prompt_tokens",
    "truncation_side",
    "truncation",
    "max_length",
    "padding",
    "add_special_tokens",
)
CHOICES: dict[str, tuple[tuple[Any, ...], str]] = {
    "truncation": (
        (None, True, False, "longest_first", "do_not_truncate"),
        "True, False, 'longest_first' or 'do_not_truncate'",
    ),
    "truncation_side": ((None, "left", "right"), "'left' or 'right'"),
    "padding": ((None, False, "max_length", "do_not_pad"), "'max_length' or 'do_not_pad'"),
    "add_special_tokens": ((None, True, False), "True or False"),
}
"""Values of tokenization arguments, and their names in messages."""
PAIRS = ("max_tokens_per_query", "max_tokens_per_doc", "instruction", "chat_template_kwargs")


def text_options(tokenization_kwargs: Mapping[str, Any] | None) -> TextOptions:
    """Return `tokenization_kwargs` of vLLM as `TextOptions`.

    Raises:
        BadRequest: a key or value is unknown.
    """
    kwargs = of_kind("tokenization_kwargs", tokenization_kwargs, Mapping) or {}
    _check_names("tokenization argument", kwargs, TOKENIZATION)
    for name, (values, expected) in CHOICES.items():
        value = kwargs.get(name)
        if value not in values:
            raise BadRequest(f"{name} must be {expected}, got {value!r}", param=name)
    return TextOptions(
        _truncation(kwargs),
        kwargs.get("truncation_side"),
        kwargs.get("padding") == "max_length",
        bool(coalesce(kwargs.get("add_special_tokens"), True)),
    )


def _truncation(kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of tokens to which inputs are cut: -1 = the model's maximum, `None` = they are not."""
    length, max_length = kwargs.get("truncate_prompt_tokens"), kwargs.get("max_length")
    truncation = kwargs.get("truncation")
    cuts = truncation in (True, "longest_first")
    if max_length is not None and (length is not None or not cuts):
        raise BadRequest(
            f"max_length is for truncation=True, without truncate_prompt_tokens; got {dict(kwargs)!r}",
            param="max_length",
        )
    if length is not None and truncation is not None and not cuts:
        raise BadRequest(f"truncate_prompt_tokens cuts, and truncation={truncation!r} does not", param="truncation")
    name = "truncate_prompt_tokens" if max_length is None else "max_length"
    if length is None and cuts:
        length = coalesce(max_length, -1)
    if length is None:
        return None
    if type(length) is not int or length < -1:
        raise BadRequest(f"{name} must be an integer >= -1, got {length!r}", param=name)
    return length


def _check_names(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    unknown = set(map(str, names)).difference(known)
    if unknown:
        name = min(unknown)
        raise BadRequest(unknown_name(kind, name, known), param=name)


def pair_options(params: PoolingParams, options: Mapping[str, Any], chat_template: str | None) -> PairOptions:
    """Return the options of `LLM.score` and `LLM.rerank` for pairs, those in `params.extra_kwargs` too.

    Raises:
        BadRequest: an option is unknown, or sets a reserved variable of the template.
    """
    further = of_kind("extra_kwargs", params.extra_kwargs, Mapping)
    options = {**(further or {}), **options}
    _check_names("scoring option", options, PAIRS)
    of_kind("chat_template_kwargs", options.get("chat_template_kwargs"), Mapping)
    source = optional(template_text, of_kind("chat_template", chat_template, str))
    return PairOptions.of(template=optional(PairTemplate, source), **options)


def sparse_embedding(output: Output, renderer: Renderer) -> SparseEmbedding:
    """Return a sparse result as `LLM.embed_sparse` does, with its entries as text."""
    assert output.indices is not None
    tokens = renderer.token_strings(output.indices.tolist())
    return SparseEmbedding(output.indices, output.data, tokens)  # type: ignore[arg-type] # kept as arrays


def of_kind(name: str, value: T, kind: type[Any]) -> T:
    """Return the argument `name`.

    Raises:
        BadRequest: it is neither `None` nor of that kind.
    """
    if value is None or isinstance(value, kind):
        return value
    raise BadRequest(f"{name} must be a {kind.__name__}, got {value!r:.100}", param=name)


def listed_texts(texts: str | Iterable[str]) -> list[str]:
    """Return one text or several as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


def side(items: Any, renderer: Renderer) -> list[str | Illustrated]:
    """Return queries or documents as the operations take them.

    Args:
        items: one or several: a text, a picture, `{"content": parts}`, or a mapping as `LLM.embed` takes it.
        renderer: of the model.

    Raises:
        BadRequest: an item is none of these, or the model takes no pictures.
    """
    return [_side(item, place, renderer) for place, item in enumerate(listed(items))]


def _side(item: Any, place: int, renderer: Renderer) -> str | Illustrated:
    if isinstance(item, Mapping) and isinstance(item.get("content"), (str, list, tuple)):
        content = item["content"]
        parts = [content] if isinstance(content, str) else content
        return renderer.conversations.of_parts(parts, item.get("mm_processor_kwargs"))
    prompt = content_of(item, place)
    if isinstance(prompt, list):
        raise BadRequest("queries and documents are texts or pictures, got token ids", param="documents")
    if isinstance(prompt, Illustrated) and not prompt.sources:
        return "\n".join(map(str, prompt.content))
    return prompt


def lora_per_prompt(requests: LoRARequest | Seq[LoRARequest | None] | None, count: int) -> list[LoRARequest | None]:
    """Return the adapter of each prompt.

    Raises:
        BadRequest: there are not as many as prompts, or one is not a `LoRARequest`.
    """
    if requests is None or isinstance(requests, LoRARequest):
        return [requests] * count
    if isinstance(requests, str) or not isinstance(requests, Iterable):
        raise BadRequest(f"got {requests!r:.100}, expected a LoRARequest or one for each prompt", param="lora_request")
    listed = _as_many(requests, count, "lora_request")
    if not all(isinstance(request, LoRARequest | None) for request in listed):
        raise BadRequest(f"got {listed!r:.200}, expected a LoRARequest or None for each prompt", param="lora_request")
    return listed


def per_prompt(params: Any, count: int) -> PoolingParams | list[PoolingParams]:
    """Return `pooling_params` for all prompts, or a list with one for each.

    Raises:
        BadRequest: there are not as many as prompts.
    """
    if params is None:
        return PoolingParams()
    if isinstance(params, PoolingParams):
        return params
    return _as_many(params, count, "pooling_params")


def listed_params(params: Any) -> list[PoolingParams]:
    """Return the `pooling_params` of a call as a list, empty for `None`.

    Raises:
        BadRequest: they are not `PoolingParams`, or some for each prompt.
    """
    if params is None or isinstance(params, PoolingParams):
        return [] if params is None else [params]
    each = list(params) if isinstance(params, Collection) else [params]
    for one in each:
        if not isinstance(one, PoolingParams):
            raise BadRequest(
                f"pooling_params must be a PoolingParams, or a list with one for each prompt, got {one!r:.100}",
                param="pooling_params",
            )
    return each


def tasks_of(params: Any, tasks: str | Iterable[str] | None) -> list[str]:
    """Return the tasks of a call: those that it names, else the one that its parameters name.

    Raises:
        BadRequest: the parameters name another one, or several; or something is not of its kind.
    """
    each = listed_params(params)
    of_params = list(filter(None, (one.task for one in each)))
    of_call = list(dict.fromkeys(listed_texts(of_kind("pooling_task", tasks, Iterable) or of_params[:1])))
    for one in each:
        check_named(one, of_call)
    return of_call


def _as_many(values: Iterable[T], count: int, name: str) -> list[T]:
    """Return the values of an argument, of which there is one for each prompt."""
    listed = list(values)
    if len(listed) != count:
        raise BadRequest(f"The lengths of prompts ({count}) and {name} ({len(listed)}) must be the same.")
    return listed


def plugin_data(prompts: Any) -> Any:
    """Return the data for a plugin in `{"data": ...}`.

    Raises:
        BadRequest: it has another form.
    """
    if not hasattr(prompts, "keys") or set(prompts) != {"data"}:
        raise BadRequest(
            f"the 'plugin' task takes {{'data': ...}} and nothing else, got {prompts!r:.100}", param="data"
        )
    return prompts["data"]


def single(value: Any, kind: type[T], name: str) -> T | None:
    """Return the argument `name` of a call that takes one for all prompts, not a list.

    Raises:
        BadRequest: it is not of that kind.
    """
    if value is None or isinstance(value, kind):
        return value
    raise BadRequest(f"this call takes one `{kind.__name__}`, not a list, got {value!r:.100}", param=name)
