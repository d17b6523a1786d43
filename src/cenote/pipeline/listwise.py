"""Listwise reranking: one prompt with a query and many documents, as the authors of jina-reranker-v3 make it.

Documents are cut into blocks that fit a prompt. Each prompt gives a vector for each of its documents and one for the
query; a document's score is its cosine to the mean of the query's vectors, weighed by the best document of each block.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from cenote.conventions import LISTWISE_MARKERS
from cenote.errors import BadRequest
from cenote.pipeline.pairs import check_no_template

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as Seq

    from cenote.core import Output, PoolingParams, Sequence
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.pairs import PairOptions
    from cenote.pipeline.pipeline import Service
    from cenote.tensors.similarity import Array

TASK = "token_embed"

DOCUMENT, QUERY = LISTWISE_MARKERS

MOST_QUERY_TOKENS = 512
"""Tokens kept of a query, as by the authors; likewise the others."""
MOST_DOCUMENT_TOKENS = 2048
MOST_DOCUMENTS = 125
"""Documents of a prompt."""

BEFORE = (
    "<|im_start|>system\n"
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to "
    "the query. If the query is a question, how relevant a passage is depends on how well it answers the question. If "
    "not, try to analyze the intent of the query and assess how well each passage satisfies the intent. If an "
    "instruction is provided, you should follow the instruction when determining the ranking."
    "<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def prompt(query: str, documents: Seq[str], instruction: str | None = None) -> str:
    """Return the prompt of a query and its documents, whose texts lose the markers that they have."""
    query, *documents = (text.replace(QUERY, "").replace(DOCUMENT, "") for text in (query, *documents))
    task = (
        f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier. "
        f"Rank the passages based on their relevance to query: {query}\n"
    )
    if instruction:
        task += f"<instruct>\n{instruction}\n</instruct>\n"
    passages = "".join(f'<passage id="{i}">\n{text}{DOCUMENT}\n</passage>\n' for i, text in enumerate(documents))
    return f"{BEFORE}{task}{passages}<query>\n{query}{QUERY}\n</query>{AFTER}"


def render(
    service: Service,
    queries: Seq[str],
    documents: Seq[str],
    params: PoolingParams,
    text_options: TextOptions,
    options: PairOptions,
) -> tuple[list[Sequence], list[int]]:
    """Return prompts, and the number of the query of each.

    Raises:
        BadRequest: an option has no effect here.
        TooLong: a prompt has more tokens than the model takes.
    """
    check_no_template(service.info.name, "listwise reranker by a prompt of its own", options, read=("instruction",))
    service.pairs.check(replace(options, kwargs={}))
    params = service.renderer.check(TASK, params)
    instruction = options.kwargs.get("instruction")
    sequences: list[Sequence] = []
    owners: list[int] = []
    short_queries = service.pairs.cut(queries, options.max_tokens_per_query or MOST_QUERY_TOKENS)
    short_documents = service.pairs.cut(documents, options.max_tokens_per_doc or MOST_DOCUMENT_TOKENS)
    share = len(documents) // len(queries)
    for number, query in enumerate(short_queries):
        for block in _blocks(service, query, short_documents[number * share : (number + 1) * share]):
            (sequence,) = service.renderer.render([prompt(query, block, instruction)], TASK, params, text_options)
            sequences.append(_marked(service, sequence, len(block)))
            owners.append(number)
    return sequences, owners


def _blocks(service: Service, query: str, documents: Seq[str]) -> Iterator[list[str]]:
    """Yield the documents of each prompt."""
    renderer = service.renderer
    limit = min(renderer.tokenizer.model_max_length, service.info.max_model_len)
    room = limit - 2 * len(renderer.tokenize(query))
    lengths = [len(ids) for ids in renderer.tokenize_all(list(documents))]
    block: list[str] = []
    left = room
    for text, length in zip(documents, lengths, strict=True):
        block.append(text)
        left -= length
        if len(block) >= MOST_DOCUMENTS or left <= min(MOST_DOCUMENT_TOKENS, limit // 4):
            yield block
            block, left = [], room
    if block:
        yield block


def _marked(service: Service, sequence: Sequence, count: int) -> Sequence:
    """Return `sequence` with the places of its markers, the query's last.

    Raises:
        BadRequest: the prompt was cut, and lost markers.
    """
    vocabulary = service.renderer.tokenizer.get_vocab()
    markers = {vocabulary[DOCUMENT], vocabulary[QUERY]}
    places = tuple(i for i, token in enumerate(sequence.ids) if token in markers)
    if len(places) != count + 1:
        raise BadRequest(
            f"the prompt of {count} documents lost some when it was cut; send fewer, or set max_tokens_per_doc",
            param="truncate_prompt_tokens",
        )
    return replace(sequence, keep=places)


def scores(outputs: Seq[Output], owners: Seq[int]) -> Array:
    """Return the score of each document, float32 `[N]`, by the prompts of each query, which follow one another."""
    parts = []
    for _, of_query in groupby(zip(owners, outputs, strict=True), key=itemgetter(0)):
        blocks = [output.data for _, output in of_query]
        weights = [float((1 + _cosines(block[:-1], block[-1]).max()) / 2) for block in blocks]
        query_D = np.average([block[-1] for block in blocks], axis=0, weights=weights)
        parts += [_cosines(block[:-1], query_D) for block in blocks]
    return np.concatenate(parts).astype(np.float32)


def _cosines(rows_ND: Array, query_D: Array) -> Array:
    norms_N = np.linalg.norm(rows_ND, axis=-1) * np.linalg.norm(query_D)
    cosines_N: Array = rows_ND @ query_D / np.maximum(norms_N, np.finfo(np.float32).tiny)
    return cosines_N
