"""Score and rerank: which sequences rate a request's pairs, and how their outputs become scores.

By what the model offers: a cross-encoder reads query and document together; a bi-encoder compares one vector of each;
late interaction compares the vectors of their tokens by MaxSim; sparse embeddings are compared, or all three. In all
but the first a query is encoded once for all its documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from cenote.errors import BadRequest, NotScored, TaskNotOffered
from cenote.tensors.scoring import late_interaction, pairwise, sparse_similarity
from cenote.types import Similarity

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from cenote.engine.pairs import PairOptions, PairRenderer
    from cenote.engine.rendering import Renderer, TextOptions
    from cenote.tensors.scoring import Array, Sparse
    from cenote.types import ModelInfo, Output, PoolingParams, Sequence

SCORE_TYPES: dict[str, str] = {
    "cross-encoder": "classify",
    "bi-encoder": "embed",
    "late-interaction": "token_embed",
    "sparse": "sparse",
    "hybrid": "embed",
}
"""Ways to score, and the task that each runs."""

ALSO: dict[str, tuple[str, ...]] = {"hybrid": ("sparse", "token_embed")}
"""Further tasks of a way to score, answered by the same forward."""

HYBRID_WEIGHTS = (0.4, 0.2, 0.4)
"""Weights of the dense, sparse and late-interaction scores, those of bge-m3's model card."""


@dataclass(frozen=True)
class Plan:
    """What a request runs, and what its outputs mean.

    Attributes:
        sequences: what is submitted, in order.
        score_type: a key of `SCORE_TYPES`.
        queries: how many of `sequences` are queries; 0 for a cross-encoder, whose sequences are pairs.
        similarity: how their embeddings are compared.
    """

    sequences: list[Sequence]
    score_type: str
    queries: int
    similarity: Similarity = field(default_factory=Similarity)

    @property
    def count(self) -> int:
        """Number of scores."""
        return len(self.sequences) - self.queries

    def ids(self, pair: int) -> list[int]:
        """Token ids that pair number `pair` was rated by."""
        own = list(self.sequences[self.queries + pair].ids)
        return [*self.sequences[self._query(pair)].ids, *own] if self.queries else own

    def scores(self, outputs: Seq[Output]) -> Array:
        """`[N]` float32, one per pair, in order."""
        queries, documents = ([o.data for o in part] for part in (outputs[: self.queries], outputs[self.queries :]))
        if self.score_type == "cross-encoder":
            return np.concatenate(documents)
        if self.score_type == "bi-encoder":
            return pairwise([queries[self._query(i)] for i in range(self.count)], documents, self.similarity.vectors)
        asked, given = outputs[: self.queries], outputs[self.queries :]
        if self.score_type == "sparse":
            return self._lexical(asked, given)
        if self.score_type == "hybrid":
            late = [[o.others["token_embed"].data for o in part] for part in (asked, given)]
            lexical = self._lexical(*([o.others["sparse"] for o in part] for part in (asked, given)))
            dense = np.array([queries[self._query(i)] @ documents[i] for i in range(self.count)], dtype=np.float32)
            lengths = np.array([len(late[0][self._query(i)]) for i in range(self.count)], dtype=np.float32)
            parts = (dense, lexical, self._late(late[0], late[1], "maxsim") / lengths)
            weighted: Array = np.sum([w * part for w, part in zip(HYBRID_WEIGHTS, parts, strict=True)], axis=0)
            return weighted.astype(np.float32)
        return self._late(queries, documents, self.similarity.tokens)

    def _late(self, queries: list[Array], documents: list[Array], name: str) -> Array:
        if self.queries == 1:
            return late_interaction(queries[0], documents, name)
        return np.concatenate([late_interaction(q, [d], name) for q, d in zip(queries, documents, strict=True)])

    def _lexical(self, queries: Seq[Output], documents: Seq[Output]) -> Array:
        pairs = [(queries[self._query(i)], documents[i]) for i in range(self.count)]
        scores = [sparse_similarity(_sparse(q), _sparse(d), self.similarity.sparse) for q, d in pairs]
        return np.array(scores, dtype=np.float32)

    def _query(self, pair: int) -> int:
        return 0 if self.queries == 1 else pair


def _sparse(output: Output) -> Sparse:
    assert output.indices is not None
    return output.indices, output.data


def plan(
    renderer: Renderer,
    pairs: PairRenderer,
    queries: Seq[str],
    documents: Seq[str],
    params: PoolingParams,
    text_options: TextOptions,
    options: PairOptions,
    score_type: str | None = None,
) -> Plan:
    """Render one query for each document, or one for all of them.

    Raises:
        BadRequest: the lists do not pair up, or as the renderers.
        NotScored: the model cannot score, or not so.
    """
    if not queries:
        raise BadRequest("At least one text element must be given", param="queries")
    if not documents:
        raise BadRequest("At least one text_pair element must be given", param="documents")
    if len(queries) not in (1, len(documents)):
        raise BadRequest("Input lengths must be either 1:1, 1:N or N:N", param="documents")
    score_type = choose(renderer.info, score_type)
    task = SCORE_TYPES[score_type]
    if params.late_chunking_params is not None:
        raise BadRequest("late_chunking_params: texts are scored whole, not by chunks", param="late_chunking_params")
    if score_type == "cross-encoder":
        repeated = [*queries] * (len(documents) // len(queries))
        joined = list(zip(repeated, documents, strict=True))
        return Plan(pairs.render(joined, task, params, text_options, options), score_type, 0)
    if options.kwargs or options.template:
        raise BadRequest(
            f"{renderer.info.name} scores as a {score_type}, which renders no pairs: "
            f"{', '.join(sorted(options.kwargs)) or 'a template'} would have no effect",
            param=min(options.kwargs, default="chat_template"),
        )
    pairs.check(options)
    prompts = renderer.prompts
    sequences: list[Sequence] = []
    for prompt, texts, most in (
        (prompts.of("query"), queries, options.max_tokens_per_query),
        (prompts.of("document"), documents, options.max_tokens_per_doc),
    ):
        sequences += renderer.render(pairs.cut(texts, most), task, params, text_options._replace(prompt=prompt))
    if also := ALSO.get(score_type):
        sequences = [replace(s, also=also) for s in sequences]
    return Plan(sequences, score_type, len(queries), renderer.info.similarity)


def choose(info: ModelInfo, asked: str | None) -> str:
    """The way to score: `asked`, also as "cross", "bi" or "late", else the model's first."""
    if not info.score_types:
        if info.num_labels > 1:
            raise NotScored(
                f"Scoring API is only enabled for num_labels == 1. {info.name} has {info.num_labels} labels; "
                "classify gives the value of each"
            )
        raise NotScored(f"This model does not support the Scoring API. It offers: {', '.join(info.tasks)}")
    if asked is None:
        return info.score_types[0]
    spelled = asked.lower().replace("_", "-")
    found = next((name for name in SCORE_TYPES if spelled in (name, name.partition("-")[0])), None)
    if found is None:
        raise BadRequest(f"score_type must be one of {', '.join(SCORE_TYPES)}, got {asked!r}", param="score_type")
    if found not in info.score_types:
        raise BadRequest(
            f"{info.name} cannot score as a {found}; it offers {', '.join(info.score_types)}", param="score_type"
        )
    return found


def reward_task(info: ModelInfo) -> tuple[str, bool]:
    """The task that gives a model's reward, and whether its activation is applied.

    Unless the user says otherwise, only the classes of a step are probabilities; a reward of an input or a token is the
    head's raw number.

    Raises:
        TaskNotOffered: the model gives no reward.
    """
    if not info.reward:
        labels = f"; it has {info.num_labels} labels, and a reward has one" if info.num_labels else ""
        raise TaskNotOffered(
            f"{info.name} is no reward model{labels}. It offers: {', '.join(info.tasks)}", param="task"
        )
    return info.reward, info.activates_reward
