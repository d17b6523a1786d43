"""Late chunking: a document is read as a whole by `token_embed`, and its tokens' states are averaged chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.core import LateChunk, LateChunkingMetadata, Sequence
from cenote.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.core import PoolingParams
    from cenote.pipeline.rendering import Renderer, TextOptions


def late(
    renderer: Renderer, prompts: Seq[Any], task: str, params: PoolingParams, options: TextOptions
) -> list[Sequence]:
    """Sequences of whole documents whose rows are chunks, each with what its rows stand for.

    Raises:
        BadRequest: a prompt is no plain text or empty, `options` cut or pad it, the tokenizer keeps no offsets, the
            model encodes queries and documents differently, or as `Renderer.render`.
        TooLong: a document has more tokens than the model reads.
    """
    params = renderer.check(task, params)
    assert params.late_chunking_params is not None
    if renderer.prompts.two_sided:
        raise BadRequest(
            f"late_chunking_params: {renderer.info.name} is a late-interaction model, whose vectors are compared token "
            "by token and not by chunks",
            param="late_chunking_params",
        )
    given = {"truncate_prompt_tokens": options.truncate, "truncation_side": options.side, "padding": options.pad}
    if unwanted := [name for name, value in given.items() if value is not None and value is not False]:
        raise BadRequest(
            f"late chunking reads whole documents, so it takes no {' and no '.join(unwanted)}", param=unwanted[0]
        )
    texts = [_text(prompt) for prompt in prompts]
    if not texts:
        raise BadRequest("You must pass at least one prompt", param="input")
    applied = options.prompt or renderer.prompts.choose()
    before = applied.text
    whole = renderer.bounded([before + text for text in texts], options)
    found = renderer.encodings(whole, add_special_tokens=options.add_special_tokens)
    if found is None:
        raise BadRequest(
            f"late chunking needs a fast tokenizer: that of {renderer.info.name} keeps no character offsets",
            param="late_chunking_params",
        )
    size = params.late_chunking_params.chunk_size
    sequences = []
    for encoding in found:
        text = renderer.fit(renderer.from_encoding(encoding), options)
        chunks = late_chunks(encoding.offsets, size, len(before))
        metadata = LateChunkingMetadata(size, len(text.ids), chunks)
        sequences.append(
            Sequence(text.ids, task, params, text.type_ids, adapter=applied.adapter, late_chunking=metadata)
        )
    return sequences


def late_chunks(offsets: Seq[tuple[int, int]], size: int, prompt: int = 0) -> list[LateChunk]:
    """The chunks of `size` tokens each.

    Args:
        offsets: of each token, in characters; of a special token, empty.
        size: tokens of a chunk.
        prompt: characters before the caller's text.
    """
    chunks = []
    for first in range(0, len(offsets), size):
        end = min(first + size, len(offsets))
        own = [(max(a - prompt, 0), b - prompt) for a, b in offsets[first:end] if a < b and b > prompt]
        span = (min(a for a, _ in own), max(b for _, b in own)) if own else None
        chunks.append(LateChunk((first, end), span))
    return chunks


def _text(prompt: Any) -> str:
    """The plain text of a prompt."""
    if isinstance(prompt, Mapping) and set(prompt) == {"prompt"}:
        prompt = prompt["prompt"]
    if isinstance(prompt, Mapping):
        raise BadRequest(
            f"late chunking takes plain text, got a prompt with {', '.join(map(str, prompt))}", param="input"
        )
    if not isinstance(prompt, str):
        is_ids = isinstance(prompt, (list, tuple, np.ndarray)) and all(isinstance(i, (int, np.integer)) for i in prompt)
        got = "token ids" if is_ids else type(prompt).__name__
        raise BadRequest(f"late chunking takes plain text, got {got}", param="input")
    if not prompt:
        raise BadRequest("late chunking takes plain text, got an empty one", param="input")
    return prompt
