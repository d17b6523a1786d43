"""Score and rerank: the ways in which a model rates pairs, and the scores out of its outputs.

The way depends on the outputs of the model: a cross-encoder reads query and document together; a bi-encoder compares
one vector of each; late interaction compares the vectors of their tokens by MaxSim; sparse embeddings are compared, or
all three. In these a query is encoded once for all its documents. A listwise reranker reads a query with many of them.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from cenote.errors import BadRequest, NotScored, TaskNotOffered
from cenote.tensors.similarity import late_interaction, pairwise, sparse_similarity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sized
    from collections.abc import Sequence as Seq

    from cenote.core import ModelInfo, Output, Sequence, Similarity
    from cenote.tensors.similarity import Array, Sparse

HYBRID_WEIGHTS = (0.4, 0.2, 0.4)
"""Weights of the dense, sparse and late-interaction scores, from bge-m3's model card."""


@dataclass(frozen=True)
class SideOutputs:
    """Outputs of the queries and of the documents of a request, one query for each document or one for all.

    Attributes:
        queries: empty for cross-encoders, whose documents are pairs.
    """

    queries: Seq[Output]
    documents: Seq[Output]

    @property
    def pairs(self) -> list[tuple[Output, Output]]:
        """Each document with its query."""
        queries = [*self.queries] * (len(self.documents) // len(self.queries))
        return list(zip(queries, self.documents, strict=True))

    def of(self, task: str) -> SideOutputs:
        """Return the outputs of a further task."""
        return SideOutputs(_others(self.queries, task), _others(self.documents, task))


def _others(outputs: Iterable[Output], task: str) -> list[Output]:
    return [output.others[task] for output in outputs]


def _data(outputs: Iterable[Output]) -> list[Array]:
    return [output.data for output in outputs]


def _cross_encoder(sides: SideOutputs, _: Similarity) -> Array:
    return np.concatenate(_data(sides.documents))


def _bi_encoder(sides: SideOutputs, similarity: Similarity) -> Array:
    queries, documents = zip(*sides.pairs, strict=True)
    return pairwise(_data(queries), _data(documents), similarity.vectors)


def _late_interaction(sides: SideOutputs, similarity: Similarity) -> Array:
    return _late(sides, similarity.tokens, similarity)


def _late(sides: SideOutputs, name: str, similarity: Similarity) -> Array:
    if len(sides.queries) == 1:
        query, documents = sides.queries[0].data, _data(sides.documents)
        return late_interaction(query, documents, name, is_apart=similarity.is_apart)
    scores = [late_interaction(query.data, [document.data], name) for query, document in sides.pairs]
    return np.concatenate(scores)


def _sparse(sides: SideOutputs, similarity: Similarity) -> Array:
    scores = [sparse_similarity(_entries(q), _entries(d), similarity.sparse) for q, d in sides.pairs]
    return np.array(scores, dtype=np.float32)


def _entries(output: Output) -> Sparse:
    assert output.indices is not None
    return output.indices, output.data


def _hybrid(sides: SideOutputs, similarity: Similarity) -> Array:
    tokens = sides.of("token_embed")
    dense = np.array([query.data @ document.data for query, document in sides.pairs], dtype=np.float32)
    lengths = np.array([len(query.data) for query, _ in tokens.pairs], dtype=np.float32)
    parts = (dense, _sparse(sides.of("sparse"), similarity), _late(tokens, "maxsim", similarity) / lengths)
    weighted: Array = np.sum([weight * part for weight, part in zip(HYBRID_WEIGHTS, parts, strict=True)], axis=0)
    return weighted.astype(np.float32)


@dataclass(frozen=True)
class Way:
    """A way to score pairs.

    Attributes:
        name: in requests and in `ModelInfo.score_types`.
        task: run on each query and document, or on each pair.
        scores: makes scores, float32 `[N]`, of the outputs; `None` for lists.
        also: further tasks of the same forward.
        of_pairs: query and document are one sequence.
        of_lists: a query and many documents are (`cenote.pipeline.listwise`).
    """

    name: str
    task: str
    scores: Callable[[SideOutputs, Similarity], Array] | None = None
    also: tuple[str, ...] = ()
    of_pairs: bool = False
    of_lists: bool = False


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("cross-encoder", "classify", _cross_encoder, of_pairs=True),
        Way("bi-encoder", "embed", _bi_encoder),
        Way("late-interaction", "token_embed", _late_interaction),
        Way("sparse", "sparse", _sparse),
        Way("hybrid", "embed", _hybrid, also=("sparse", "token_embed")),
        Way("listwise", "token_embed", of_lists=True),
    )
}

SPELLED = {name.partition("-")[0]: way for name, way in WAYS.items()} | WAYS
"""Ways by the first part of their names, too: "cross", "bi", "late"."""


def pair_ids(sequences: Seq[Sequence], count: int, pair: int) -> list[int]:
    """Return the token ids of query and document of a scored pair.

    Args:
        sequences: sequences of the request, queries first.
        count: number of pairs.
        pair: index of the pair.
    """
    if len(sequences) <= count and sequences[0].keep is not None:  # listwise: the prompt that has the document
        ends = list(accumulate(len(sequence.keep or ()) - 1 for sequence in sequences))
        return list(sequences[bisect(ends, pair)].ids)
    queries = len(sequences) - count
    document = list(sequences[queries + pair].ids)
    if not queries:
        return document
    query = sequences[0 if queries == 1 else pair]
    return [*query.ids, *document]


def check_pairing(queries: Sized, documents: Sized) -> None:
    """Raise `BadRequest` unless there is one query for all documents, or one for each."""
    if not queries:
        raise BadRequest("At least one text element must be given", param="queries")
    if not documents:
        raise BadRequest("At least one text_pair element must be given", param="documents")
    if len(queries) not in (1, len(documents)):
        raise BadRequest("Input lengths must be either 1:1, 1:N or N:N", param="documents")


def choose(info: ModelInfo, score_type: str | None) -> Way:
    """Return the way called `score_type`, also as "cross", "bi" or "late"; by default the model's first.

    Raises:
        BadRequest: there is no such way, or the model does not offer it.
        NotScored: the model cannot score.
    """
    if not info.score_types:
        raise _not_scored(info)
    if score_type is None:
        return WAYS[info.score_types[0]]
    way = SPELLED.get(str(score_type).lower().replace("_", "-"))
    if way is None:
        raise BadRequest(f"score_type must be one of {', '.join(WAYS)}, got {score_type!r}", param="score_type")
    if way.name not in info.score_types:
        raise BadRequest(
            f"{info.name} cannot score as a {way.name}; it offers {', '.join(info.score_types)}", param="score_type"
        )
    return way


def _not_scored(info: ModelInfo) -> NotScored:
    if info.num_labels > 1 and "classify" in info.tasks:
        return NotScored(
            f"Scoring API is only enabled for num_labels == 1. {info.name} has {info.num_labels} labels; "
            "classify gives the value of each"
        )
    return NotScored(f"This model does not support the Scoring API. It offers: {', '.join(info.tasks)}")


def reward_task(info: ModelInfo, *, of_tokens: bool) -> tuple[str, bool]:
    """Return the task that gives a model's reward, and whether its activation is applied by default.

    By default the classes of a step are probabilities, and the reward of an input or a token is the head's raw number.

    Args:
        info: of the model.
        of_tokens: a model that rates tokens gives the rows of `token_classify`, also one that is not a reward model.

    Raises:
        TaskNotOffered: the model gives no reward.
    """
    rates_tokens = info.reward == "token_classify" and not info.step
    if rates_tokens and not of_tokens and "classify" in info.tasks:
        return "classify", info.activates_reward
    if info.reward:
        return info.reward, info.activates_reward
    if of_tokens and "token_classify" in info.tasks:
        return "token_classify", info.classifies
    labels = f"; it has {info.num_labels} labels, and a reward has one" if info.num_labels else ""
    raise TaskNotOffered(f"{info.name} is not a reward model{labels}. It offers: {', '.join(info.tasks)}", param="task")
