"""Late chunking: a document is read as a whole by `token_embed`, and its tokens' states are averaged chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.core import LateChunk, LateChunkingMetadata, LateChunkingParams, Sequence
from cenote.errors import BadRequest
from cenote.pipeline.inputs import is_ids
from cenote.pipeline.options import PLAIN, Budget

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.core import PoolingParams
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.rendering import Renderer

REFUSED = {"truncate_prompt_tokens": "truncate", "truncation_side": "side", "padding": "pad"}
"""Parameters that late chunking does not take, with their fields of `TextOptions`."""
PARAM = "late_chunking_params"
"""The parameter of a request that asks for it."""


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
    if params.late_chunking_params.ends:
        raise BadRequest("late_chunking_params: chunks have `chunk_size` tokens each; leave out `ends`", param=PARAM)
    prompt = options.prompt or renderer.prompts.choose()
    texts = [prompt.text + _text(content) for content in prompts]
    tokenizer = renderer.counting(PARAM)
    options = renderer.resolve(options._replace(whole=True), task)
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


def joined(renderer: Renderer, documents: Seq[Seq[str]], params: PoolingParams, options: TextOptions) -> list[Sequence]:
    """Return sequences of documents that come in chunks, which are the rows of its output.

    A document is its chunks with a space between two of them, unless there is white space already. The special tokens
    before and after it, and its prompt, belong to the first and the last chunk.

    Raises:
        BadRequest: a chunk has no tokens, or as `late`.
        TooLong: a document has more tokens than the model reads.
    """
    params = renderer.check("token_embed", params)
    _check(renderer, documents, options)
    prompt = options.prompt or renderer.prompts.choose()
    tokenizer = renderer.counting(PARAM)
    options = renderer.resolve(options._replace(whole=True), "token_embed")
    budget = Budget(renderer.bounds.tokens)
    sequences = []
    for chunks in documents:
        document, bounds = _join(prompt.text, [_text(chunk) for chunk in chunks])
        texts = renderer.bounded([document], options)
        (encoding,) = tokenizer.encodings(texts, special=options.add_special_tokens)
        text = renderer.fit(tokenizer.text_of(encoding), options, budget)
        chunking = LateChunkingParams(len(text.ids), _ends(encoding.offsets, bounds))
        params_of_document = replace(params, late_chunking_params=chunking)
        sequences.append(Sequence(text.ids, "token_embed", params_of_document, text.type_ids, adapter=prompt.adapter))
    return sequences


def _join(prompt: str, chunks: Seq[str]) -> tuple[str, list[int]]:
    """Return a document behind its prompt, and the character at which each chunk but the first one begins."""
    parts, bounds = [prompt, *chunks[:1]], []
    length = sum(map(len, parts))
    for before, chunk in pairwise(chunks):
        bounds.append(length - len(before) + len(before.rstrip()))
        gap = "" if before[-1:].isspace() or chunk[:1].isspace() else " "
        parts += (gap, chunk)
        length += len(gap) + len(chunk)
    return "".join(parts), bounds


def _ends(offsets: Seq[tuple[int, int]], bounds: Seq[int]) -> tuple[int, ...]:
    """Return the token behind each chunk.

    Args:
        offsets: range of characters of each token, empty for special tokens.
        bounds: character at which each chunk but the first one begins.

    Raises:
        BadRequest: a chunk has no tokens.
    """
    offsets_T2 = np.array(offsets)
    content = np.flatnonzero(offsets_T2[:, 1] > offsets_T2[:, 0])
    places = np.searchsorted(offsets_T2[content, 0], bounds)
    empty = np.flatnonzero(np.diff([0, *places, len(content)]) < 1)
    if len(empty):
        raise BadRequest(f"chunk {empty[0]} has no tokens, so there is no vector for it; leave it out", param="input")
    return (*content[places].tolist(), len(offsets))


def _check(renderer: Renderer, prompts: Seq[Any], options: TextOptions) -> None:
    """Raise `BadRequest` if the model or the options do not go with late chunking, or there is no prompt."""
    if renderer.prompts.two_sided:
        raise BadRequest(
            f"late_chunking_params: {renderer.info.name} is a late-interaction model, whose vectors are compared token "
            "by token and not by chunks",
            param=PARAM,
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
