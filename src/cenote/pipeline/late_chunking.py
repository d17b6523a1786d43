"""Late chunking: a document is read as a whole by `token_embed`, and its tokens' states are averaged chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cenote.core import LateChunk, LateChunkingMetadata, Sequence
from cenote.errors import BadRequest
from cenote.pipeline.inputs import is_ids
from cenote.pipeline.options import PLAIN, Budget
from cenote.pipeline.tokenizing import FastTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.core import PoolingParams
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.rendering import Renderer

REFUSED = {"truncate_prompt_tokens": "truncate", "truncation_side": "side", "padding": "pad"}
"""Parameters that late chunking does not take, with their fields of `TextOptions`."""


def late(
    renderer: Renderer, prompts: Seq[Any], task: str, params: PoolingParams, options: TextOptions
) -> list[Sequence]:
    """Return sequences of whole documents, each with the metadata of its chunks, which are the rows of its output.

    Raises:
        BadRequest: a prompt is not plain text or is empty, `options` cut or pad it, the tokenizer keeps no offsets, the
            model encodes queries and documents differently, or as `Renderer.render`.
        TooLong: a document has more tokens than the model reads.
    """
    params = renderer.check(task, params)
    assert params.late_chunking_params is not None
    _check(renderer, prompts, options)
    size = params.late_chunking_params.chunk_size
    prompt = options.prompt or renderer.prompts.choose()
    texts = [prompt.text + _text(content) for content in prompts]
    tokenizer = renderer.backend
    if not isinstance(tokenizer, FastTokenizer):
        raise BadRequest(
            f"late chunking needs a fast tokenizer: that of {renderer.info.name} keeps no character offsets",
            param="late_chunking_params",
        )
    options = options._replace(limit=renderer.info.limit(task))
    encodings = tokenizer.encodings(renderer.bounded(texts, options), special=options.add_special_tokens)
    sequences = []
    budget = Budget(renderer.bounds.tokens)
    for encoding in encodings:
        text = renderer.fit(tokenizer.text_of(encoding), options, budget)
        chunks = late_chunks(encoding.offsets, size, len(prompt.text))
        metadata = LateChunkingMetadata(size, len(text.ids), chunks)
        sequences.append(
            Sequence(text.ids, task, params, text.type_ids, adapter=prompt.adapter, late_chunking=metadata)
        )
    return sequences


def _check(renderer: Renderer, prompts: Seq[Any], options: TextOptions) -> None:
    """Raise `BadRequest` if the model or the options do not go with late chunking, or there is no prompt."""
    if renderer.prompts.two_sided:
        raise BadRequest(
            f"late_chunking_params: {renderer.info.name} is a late-interaction model, whose vectors are compared token "
            "by token and not by chunks",
            param="late_chunking_params",
        )
    refused = [name for name, field in REFUSED.items() if getattr(options, field) != getattr(PLAIN, field)]
    if refused:
        raise BadRequest(
            f"late chunking reads whole documents, so it takes no {' and no '.join(refused)}", param=refused[0]
        )
    if not prompts:
        raise BadRequest("You must pass at least one prompt", param="input")


def late_chunks(offsets: Seq[tuple[int, int]], size: int, prompt: int = 0) -> list[LateChunk]:
    """Return the chunks of `size` tokens each.

    Args:
        offsets: range of characters of each token, empty for special tokens.
        size: tokens of a chunk.
        prompt: characters before the caller's text.
    """
    chunks = []
    for first in range(0, len(offsets), size):
        end = min(first + size, len(offsets))
        chunks.append(LateChunk((first, end), _span(offsets[first:end], prompt)))
    return chunks


def _span(offsets: Seq[tuple[int, int]], prompt: int) -> tuple[int, int] | None:
    """Return the range of characters of some tokens in the text after the prompt; `None` if they have none."""
    after_prompt = [(max(start - prompt, 0), end - prompt) for start, end in offsets if max(start, prompt) < end]
    if not after_prompt:
        return None
    starts, ends = zip(*after_prompt, strict=True)
    return min(starts), max(ends)


def _text(prompt: Any) -> str:
    """Return the plain text of a prompt."""
    if isinstance(prompt, Mapping) and set(prompt) == {"prompt"}:
        prompt = prompt["prompt"]
    if isinstance(prompt, str) and prompt:
        return prompt
    raise BadRequest(f"late chunking takes plain text, got {_kind(prompt)}", param="input")


def _kind(prompt: Any) -> str:
    """Name a prompt that is not a text, or an empty one."""
    if isinstance(prompt, Mapping):
        return f"a prompt with {', '.join(map(str, prompt))}"
    if isinstance(prompt, str):
        return "an empty one"
    return "token ids" if is_ids(prompt) else type(prompt).__name__
